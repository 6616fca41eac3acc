"""The table of a comparison: a row per cell, the learning rate that validation picks, and a proof of equal batches."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.eval.compare.cells import FINISHED, INTERRUPTED, MISSING, Cell, Outcome, run_folder
from zoo.kernels.errors import DataError
from zoo.train.folder import RunFolder, replace_text

RESULTS = "results.csv"
LEARNT = 0.9
"""Accuracy of which the table tells when it was first reached."""
_FIRST = ("label", "arch", "lr", "seed", "status", "reason", "chosen", "params", "steps", "best_step", "tokens")
_LAST = ("steps_to_90", "batch_hash", "wall_seconds", "tokens_per_second", "peak_memory_bytes", "run")

Row = dict[str, Any]


def cell_row(folder: Path, cell: Cell, outcome: Outcome | None, metric: str) -> Row:
    """What is known of a cell.

    Args:
        folder: Of the comparison.
        cell: The cell.
        outcome: How it ended; None: it was not begun, or it is under way.
        metric: What the contestants are ranked by.
    """
    run = run_folder(folder, cell)
    summary = run.read_summary() or {}
    if outcome is None:
        outcome = Outcome(INTERRUPTED if run.path.exists() else MISSING)
    row: Row = {"label": cell.label, "arch": cell.arch, "lr": cell.lr, "seed": cell.seed}
    row |= {"status": outcome.status, "reason": outcome.reason, "run": run.path.relative_to(folder).as_posix()}
    if outcome.status == FINISHED:
        scores = summary.get("metrics", {})
        row |= course(summary) | {"steps_to_90": steps_to(run, LEARNT)}
        row |= {f"val_{metric}": scores.get("val", {}).get(metric)} | test_scores(scores.get("test", {}), metric)
    return row


def course(summary: Mapping[str, Any]) -> Row:
    """How the training of a finished run went; its scores are not in this."""
    return {
        key: summary.get(key) for key in (*_FIRST, *_LAST) if key in summary and key not in ("arch", "seed", "status")
    }


def test_scores(metrics: Mapping[str, float], metric: str) -> Row:
    """Those on test data, of all and of each slice, by one metric."""
    return {f"test_{key}": value for key, value in metrics.items() if key.partition("/")[0] == metric}


def steps_to(run: RunFolder, accuracy: float) -> int | None:
    """The step of the first validation with that accuracy; None where there was none."""
    with run.metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("val/acc") and float(row["val/acc"]) >= accuracy:
                return int(row["step"])
    return None


def choose(rows: Sequence[Row], metric: str, *, higher_is_better: bool) -> None:
    """Marks, for each label, the rows of the learning rate with the best median of the validation metric over seeds.

    A failed run is worse than any other; of equal learning rates the smaller is taken. A label of which nothing has
    ended has no choice.
    """
    ended = [row for row in rows if row["status"] not in (INTERRUPTED, MISSING)]
    for row in rows:
        row["chosen"] = False
    for label in dict.fromkeys(row["label"] for row in ended):
        by_lr: dict[float, list[float]] = {}
        for row in ended:
            if row["label"] == label:
                value = row.get(f"val_{metric}") if row["status"] == FINISHED else None
                score = -math.inf if value is None else value if higher_is_better else -value
                by_lr.setdefault(row["lr"], []).append(score)
        best = max(sorted(by_lr), key=lambda lr: statistics.median(by_lr[lr]))
        for row in rows:
            row["chosen"] = row["chosen"] or (row["label"] == label and row["lr"] == best)


def check_batches(
    runs: Iterable[tuple[str, int | None, Mapping[str, Any]]],
    mend: Callable[[str, str], str] = lambda first, second: "delete the folder of the one that is wrong",
) -> None:
    """Holds the hashes of training batches against each other: those of one seed are the same as far as runs went.

    Args:
        runs: Name, seed and summary of each finished run.
        mend: What to do about two runs that differ, of their names.

    Raises:
        DataError: Two runs of one seed were given other batches.
    """
    seen: dict[tuple[int | None, str], tuple[str, str]] = {}
    for name, seed, summary in runs:
        # The hash after 1, 2, 4, 8, ... batches, and after the last.
        hashes = {
            **(summary.get("batch_hash_after") or {}),
            f"{summary.get('tokens')} tokens": summary.get("batch_hash"),
        }
        for after, digest in hashes.items():
            first, expected = seen.setdefault((seed, after), (name, digest))
            if digest != expected:
                raise DataError(
                    f"{first} and {name}, both of seed {seed}, were not trained on the same batches (hash "
                    f"{expected[:12]} and {digest[:12]}): they cannot stand in one table; {mend(first, name)}"
                )


def write(folder: Path, rows: Sequence[Row], metric: str) -> None:
    """Writes results.csv."""
    scores = [f"val_{metric}", f"test_{metric}"]
    slices = dict.fromkeys(key for row in rows for key in row if key.startswith(f"test_{metric}/"))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*_FIRST, *scores, *slices, *_LAST], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _text(value) for key, value in row.items()})
    replace_text(folder / RESULTS, text.getvalue())


def _text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
