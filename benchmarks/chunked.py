"""Sequences longer than memory: scoring in chunks against one forward pass, and a million tokens.

Four layers, d 256. First, 65,536 tokens: `zoo.score` in chunks of 4,096 against the model's forward pass over all of
them at once, which holds every logit, and against `zoo.score` in a single chunk. The gate before the clock: chunks give
the same log-likelihoods as the forward pass. Time in turn within one process; memory beyond weights and tokens, each in
a process of its own. Then a million tokens in bounded memory, timed once.

    python benchmarks/chunked.py                    # writes benchmarks/results/chunked.json
    python benchmarks/chunked.py --only million     # measures these rows again, keeps the others
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zoo
from zoo.eval.measure import machine_info, peak_memory_bytes

HERE = Path(__file__).parent
VOCABULARY, CHUNK, LENGTH, LONG = 256, 4096, 65_536, 1_000_000
SIZE = {"vocab_size": VOCABULARY, "d_model": 256, "n_layers": 4}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "mamba": ("mamba", {}, None),
    "transformer window=256": ("transformer", {"window": 256}, None),
    "transformer cache=streaming": ("transformer", {}, {"sinks": 4, "window": 1024}),
}
WAYS = {"chunks": CHUNK, "one chunk": LENGTH, "forward": None}
"""How the tokens are read: `zoo.score` in chunks of so many, or (None) one forward pass with all its logits."""


def build(name: str) -> zoo.Model:
    torch.manual_seed(0)
    arch, settings, cache = MODELS[name]
    model = zoo.create_model(arch, **SIZE, **settings).eval()
    if cache is not None:
        zoo.set_cache(model, "streaming", **cache)
    return model


def tokens_of(length: int) -> np.ndarray:
    """Tokens as they lie in a file: a byte each."""
    return np.random.default_rng(0).integers(VOCABULARY, size=(1, length), dtype=np.uint8)


def forward(model: zoo.Model, tokens: np.ndarray) -> Tensor:
    """Logits of the whole sequence at once."""
    with torch.inference_mode():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits


def prepare(name: str, length: int, chunk: int | None) -> Callable[[], Any]:
    """For both measurements: a short call first, so that code is compiled and loaded."""
    model, tokens = build(name), tokens_of(length)

    def call(some: np.ndarray = tokens) -> Tensor:
        return forward(model, some) if chunk is None else zoo.score(model, some, chunk=chunk)

    call(tokens[:, : 2 * CHUNK])
    return call


def against_one_shot(name: str, rounds: int) -> dict[str, Any]:
    """Time and memory of each way to read `LENGTH` tokens."""
    model, tokens = build(name), tokens_of(LENGTH)
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = forward(model, tokens)[:, :-1]
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    error = (zoo.score(model, tokens, chunk=CHUNK) - expected).abs().max().item()
    assert error < 1e-4, error  # nats; fp32, added up in another order
    del logits, model
    calls = {way: prepare(name, LENGTH, chunk) for way, chunk in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in list(WAYS)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            calls[way]()
            seconds[way].append(time.perf_counter() - begun)
    memory = {way: peak_memory_bytes(prepare, name, LENGTH, chunk) for way, chunk in WAYS.items()}
    rows = {way: {"seconds": min(seconds[way]), "peak_memory_bytes": memory[way]} for way in WAYS}
    ratios = {
        way: {
            "time": statistics.median(a / b for a, b in zip(seconds["chunks"], seconds[way], strict=True)),
            "memory": memory["chunks"] / memory[way],
        }
        for way in ("one chunk", "forward")
    }
    return {
        "model": name,
        "tokens": LENGTH,
        "chunk": CHUNK,
        "largest_error_nats": error,
        "rounds": rounds,
        **rows,
        "chunks_over": ratios,
    }


def prepare_timed(name: str, length: int, chunk: int, file: str) -> Callable[[], None]:
    """As `prepare`; the call leaves its seconds in a file, because only memory comes back from the other process."""
    call = prepare(name, length, chunk)

    def timed() -> None:
        begun = time.perf_counter()
        call()
        Path(file).write_text(repr(time.perf_counter() - begun))

    return timed


def million(name: str) -> dict[str, Any]:
    """A million tokens, once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds"
        memory = peak_memory_bytes(prepare_timed, name, LONG, CHUNK, str(file))
        seconds = float(file.read_text())
    row = {"model": name, "tokens": LONG, "chunk": CHUNK, "peak_memory_bytes": memory}
    return row | {"seconds": seconds, "tokens_per_second": LONG / seconds}


def show(results: dict[str, list[dict]]) -> None:
    table = Table("model", "tokens", "read", "seconds", "MiB", "time of chunks over it", "memory of chunks over it")
    for row in results["one_shot"]:
        for way in WAYS:
            ratio = row["chunks_over"].get(way)
            shown = ("", "") if ratio is None else (f"{ratio['time']:.2f}", f"{ratio['memory']:.3f}")
            seconds, memory = f"{row[way]['seconds']:.1f}", f"{row[way]['peak_memory_bytes'] / 2**20:,.0f}"
            table.add_row(row["model"], f"{row['tokens']:,}", way, seconds, memory, *shown)
    for row in results["million"]:
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}"
        table.add_row(row["model"], f"{row['tokens']:,}", "chunks", f"{row['seconds']:.1f}", memory, "", "")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="measure the rows that have this in 'one_shot|million: MODEL'")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "chunked.json")
    args = parser.parse_args()
    results: dict[str, list[dict]] = {"one_shot": [], "million": []}
    if args.only and args.out.exists():
        results |= {kind: json.loads(args.out.read_text()).get(kind, []) for kind in results}
    plan = [("one_shot", name) for name in list(MODELS)[:2]]
    plan += [("million", name) for name in ("mamba", "transformer cache=streaming")]
    for kind, name in plan:
        if args.only in f"{kind}: {name}":
            row = against_one_shot(name, args.rounds) if kind == "one_shot" else million(name)
            others = [old for old in results[kind] if old["model"] != name]
            results[kind] = [*others, row | {"git_commit": machine_info()["git_commit"]}]
            print(json.dumps(row), flush=True)
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps({"machine": machine_info()} | results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
