"""Several models at several lengths: a row for each model, by its training length, a column for each test length."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Column, Table

ENOUGH = 0.9
"""Accuracy from which on a length counts as mastered."""


@dataclass(frozen=True)
class Row:
    """What one model scored."""

    model: str
    trained: int | None
    """Tokens per sequence in its training; None where its folder does not tell."""
    accuracies: dict[int, float]
    """By tokens per sequence in the test; empty where nothing came out."""
    reason: str = ""
    """Why nothing did."""

    @property
    def effective(self) -> int | None:
        """The longest length that it masters together with all shorter ones."""
        mastered = None
        for length, accuracy in sorted(self.accuracies.items()):
            if accuracy < ENOUGH:
                break
            mastered = length
        return mastered


def by_length(metrics: dict[str, float]) -> dict[int, float]:
    """The accuracies of `metrics` by length."""
    found = ((re.fullmatch(r"acc/seq_len=(\d+)", name), value) for name, value in metrics.items())
    return {int(match[1]): value for match, value in found if match}


def table(rows: Sequence[Row]) -> Table:
    """Accuracy, training length against test length."""
    lengths = _lengths(rows)
    heads = ["trained at", *(f"{length:,}" for length in lengths), f"{ENOUGH:g} up to"]
    shown = Table("model", *(Column(head, justify="right") for head in heads), title="accuracy by length")
    for row in sorted(rows, key=lambda row: row.trained or 0):
        cells = [f"{row.accuracies[length]:.4f}" if length in row.accuracies else "n/a" for length in lengths]
        shown.add_row(row.model, _number(row.trained), *cells, _number(row.effective))
    return shown


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each model and length."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["model", "trained_at", "tested_at", "acc", "note"])
    for row in rows:
        for length in _lengths(rows):
            writer.writerow([row.model, row.trained, length, row.accuracies.get(length), row.reason])
    return file.getvalue()


def _lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({length for row in rows for length in row.accuracies})


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
