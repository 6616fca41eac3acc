"""`python -m zoo.score model=FOLDER text=FILE`: how well a trained model predicts a text of any length.

Only ever run, never imported: `zoo.score` is the function of `zoo.scoring`.

Letters: B rows, T tokens.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from zoo.codec import Codec
from zoo.command import ModelSettings, load_model, parse_command, print_help
from zoo.console import run_cli
from zoo.kernels.errors import ConfigError, DataError
from zoo.memory import PeakMemory, synchronize
from zoo.scoring import stream
from zoo.settings import setting

OWNER = "zoo score"
FIRST_BUCKET = 64
"""Positions below this are one row of the table; from there each row has twice the positions of the one before."""


@dataclass(kw_only=True)
class ScoreConfig(ModelSettings):
    """What to score, and how."""

    text: str | None = setting(None, "file with the text to score")
    tokens: str | None = setting(None, "or a .npy file of token ids, (time,) or (rows, time)")
    chunk: int = setting(
        4096, "tokens read at once: memory and speed; the result only with h2o and growing scalings", minimum=1
    )
    overlap: int = setting(0, "with carry=false: tokens of the last window that are read again as context", minimum=0)
    carry: bool = setting(True, "carry the state from chunk to chunk; false: windows of chunk tokens")
    out: str | None = setting(None, "file for the log-likelihood of each token, .csv or .npy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text is None) == (self.tokens is None):
            raise ConfigError("zoo score needs one of the two: text=FILE or tokens=FILE.npy")
        if self.out is not None:
            if Path(self.out).suffix not in (".csv", ".npy"):
                self.fail("out", "expected a file name that ends in .csv or .npy")
            if not Path(self.out).absolute().parent.is_dir():
                self.fail("out", "there is no such folder: make it first")


def main() -> None:
    """Prints what the text costs the model, over all of it and by position."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print_help(ScoreConfig, "zoo score model=runs/mamba-pystdlib text=book.txt")
        return
    config, policies = parse_command(ScoreConfig, arguments, OWNER)
    model, codec = load_model(config, policies)
    tokens, sizes = _read(config, codec)
    device = model.embedding.weight.device
    list(stream(model, tokens[:, :2]))  # compiles and loads what is needed before the clock starts
    memory = PeakMemory(device)
    memory.reset()
    before, begun = memory.bytes(), time.perf_counter()
    pieces = stream(model, tokens, chunk=config.chunk, overlap=config.overlap, carry=config.carry)
    scores = np.concatenate(list(_with_progress(pieces, tokens.shape[1])), axis=1)  # (B, T - 1)
    synchronize(device)
    seconds, peak = time.perf_counter() - begun, memory.bytes()
    if config.out is not None:
        _write(Path(config.out), tokens, scores)
    nll = -float(scores.mean(dtype=np.float64))
    rows = {"tokens scored": f"{scores.size:,}", "nll per token": f"{nll:.4f} nats", "perplexity": _perplexity(nll)}
    if sizes is not None:
        rows["bits per byte"] = f"{nll * scores.size / math.log(2) / int(sizes[1:].sum(dtype=np.int64)):.4f}"
    rows["tokens per second"] = f"{tokens.size / seconds:,.0f}"
    rows["peak memory"] = f"{peak / 2**20:,.0f} MiB, {(peak - before) / 2**20:,.0f} MiB of it for scoring"
    summary = Table(show_header=False)
    for name, value in rows.items():
        summary.add_row(name, value)
    console = Console()
    console.print(summary)
    console.print(_by_position(scores))


def _read(config: ScoreConfig, codec: Codec | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens (B, T), and where they are text, the bytes of each (T,)."""
    sizes = None
    if config.text is not None:
        if codec is None:
            raise ConfigError(f"model={config.model} was not trained on text: give token ids with tokens=FILE.npy")
        try:
            document = Path(config.text).read_bytes()
        except OSError as error:
            raise DataError(f"text={config.text}: cannot be read ({error.strerror})") from error
        tokens, sizes = codec.encode_document(document)
    else:
        try:
            tokens = np.load(str(config.tokens), mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "no array of numpy"
            raise DataError(f"tokens={config.tokens}: cannot be read ({reason}); expected a .npy file") from error
        if not isinstance(tokens, np.ndarray) or tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
            raise DataError(f"tokens={config.tokens}: expected an array of integers, (time,) or (rows, time)")
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.shape[0] * tokens.shape[1] == 0:
        raise DataError(f"{config.text or config.tokens} is empty: expected at least two tokens")
    if tokens.shape[1] == 1:
        raise DataError(f"{config.text or config.tokens} is one token long: expected two, one to predict the other")
    return tokens, sizes


def _with_progress(pieces: Iterator[torch.Tensor], length: int) -> Iterator[np.ndarray]:
    """The pieces as arrays of numpy, a bar with the time left on the terminal meanwhile."""
    console = Console(stderr=True)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=length - 1)
        for piece in pieces:
            yield piece.numpy()
            progress.advance(task, piece.shape[1])


def _by_position(scores: np.ndarray) -> Table:
    """Mean over rows and over positions, each row of the table twice as many positions as the one before."""
    table = Table("position", "nll per token", "perplexity")
    begin, end = 1, FIRST_BUCKET  # of the tokens that are predicted
    while begin <= scores.shape[1]:
        nll = -float(scores[:, begin - 1 : end - 1].mean(dtype=np.float64))
        table.add_row(f"{begin:,} to {min(end - 1, scores.shape[1]):,}", f"{nll:.4f}", _perplexity(nll))
        begin, end = end, 2 * end
    return table


def _perplexity(nll: float) -> str:
    return f"{math.exp(nll):,.3f}" if nll < 700 else "inf"


def _write(path: Path, tokens: np.ndarray, scores: np.ndarray) -> None:
    """Scores (B, T - 1) as an array, or as a table of row, position, token and its log-likelihood."""
    try:
        if path.suffix == ".npy":
            np.save(path, scores)
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("row", "position", "token", "log_likelihood"))
            for row, (ids, values) in enumerate(zip(tokens, scores, strict=True)):
                lines: Iterator[tuple[Any, ...]] = zip(ids[1:].tolist(), values.tolist(), strict=True)
                writer.writerows((row, at, token, f"{value:.6g}") for at, (token, value) in enumerate(lines, 1))
    except OSError as error:
        raise DataError(f"out={path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run_cli(main))
