"""Where one architecture overtakes another: the order is read off the measured lengths, the place then measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row of `zoo.eval.bench`."""

MARGIN = 0.05
"""Measurements of memory repeat to within such a share."""
STEPS = 16
"""The grid between two measured lengths is no finer than this: four or five halvings."""
_DOES = {"train": ("trains", "train"), "prefill": ("reads", "read"), "decode": ("decodes", "decode")}
_FAILS = {"out_of_memory": "runs out of memory", "too_slow": "is too slow to be measured"}


@dataclass(frozen=True)
class Bracket:
    """Two measured lengths between which the order of two models changes."""

    kind: str
    """Of `zoo.eval.bench.cost.KINDS`."""
    quantity: str
    """"time" or "memory"."""
    faster: str
    """Label of the model that is better (faster, or content with less memory) at `high` and worse at `low`."""
    slower: str
    low: int
    high: int
    slower_status: str = "ok"
    """That of the slower one at `high`."""


def brackets(rows: Sequence[Row], first: str | None = None) -> list[Bracket]:
    """Finds where the order of two models changes by more than the spread.

    Args:
        rows: All rows.
        first: A label whose brackets come first.

    Returns:
        For each pair of labels, kind and quantity, each change of order between two lengths at which it is certain. A
        model that ran out of memory or time is worse than one that did not.
    """
    table = {(row["label"], row["kind"], row["length"]): row for row in rows}
    labels, kinds = list(dict.fromkeys(row["label"] for row in rows)), dict.fromkeys(row["kind"] for row in rows)
    found = []
    for pair in itertools.combinations(labels, 2):
        for kind, quantity in itertools.product(kinds, ("time", "memory")):
            before: tuple[int, int] | None = None
            for length in sorted({row["length"] for row in rows if row["kind"] == kind}):
                one, other = (table.get((label, kind, length)) for label in pair)
                better = None if one is None or other is None else certainly_better(one, other, quantity)
                if better is None:
                    continue
                if before is not None and better != before[0]:
                    status = (other, one)[better]["status"]  # type: ignore[index]
                    found.append(Bracket(kind, quantity, pair[better], pair[1 - better], before[1], length, status))
                before = (better, length)
    return sorted(found, key=lambda bracket: first not in (bracket.faster, bracket.slower))


def certainly_better(one: Row, other: Row, quantity: str) -> int | None:
    """0 where the first row is better by more than the spread, 1 where the other is, None where neither is."""
    bounds = [_bounds(row, quantity) for row in (one, other)]
    if None in bounds:
        return None
    (low, high), (other_low, other_high) = bounds  # type: ignore[misc]
    return 0 if high < other_low else 1 if other_high < low else None


def _bounds(row: Row, quantity: str) -> tuple[float, float] | None:
    """Smallest and largest value of a row; None where it tells nothing."""
    if row["status"] != "ok":
        return (math.inf, math.inf) if row["status"] in _FAILS else None
    if quantity == "time":
        return row["seconds"]["min"], row["seconds"]["max"]
    memory = row["peak_memory_bytes"]
    return memory * (1 - MARGIN / 2), memory * (1 + MARGIN / 2)


def first_length(low: int, high: int, better: Callable[[int], bool], grid: int = 64) -> int | None:
    """Finds by halving the first length from which `better` holds, given that it does not at `low`.

    Args:
        low: A length at which it does not hold.
        high: A longer one, at which it should.
        better: Measures at a length.
        grid: Lengths between are multiples of this (of some of it, where that were more than `STEPS`), and `high`.

    Returns:
        The length, measured; None if it does not hold at `high` either.
    """
    if not better(high):
        return None
    step = grid * math.ceil((high - low) / (grid * STEPS))
    lengths = [*range(low - low % step + step, high, step), high]
    worst, best = -1, len(lengths) - 1
    while best - worst > 1:
        middle = (worst + best) // 2
        if better(lengths[middle]):
            best = middle
        else:
            worst = middle
    return lengths[best]


def crossovers(found: Sequence[tuple[Bracket, int | None]]) -> list[dict[str, Any]]:
    """The entries of bench.json about brackets, each with the length found in it; None: it was not narrowed down.

    Where the order of two models changes back, the first change holds until the second.
    """

    def undone(bracket: Bracket) -> tuple[Bracket, int | None] | None:
        what = (bracket.kind, bracket.quantity, bracket.slower, bracket.faster)
        later = [
            entry
            for entry in found
            if (entry[0].kind, entry[0].quantity, entry[0].faster, entry[0].slower) == what
            and entry[0].low >= bracket.high
        ]
        return min(later, key=lambda entry: entry[0].low, default=None)

    return [_entry(bracket, length, undone(bracket)) for bracket, length in found]


def _entry(bracket: Bracket, from_length: int | None, until: tuple[Bracket, int | None] | None) -> dict[str, Any]:
    does, do = _DOES[bracket.kind]
    if bracket.quantity == "time":
        compared = f"{bracket.faster} {does} faster than {bracket.slower}"
    else:
        compared = f"{bracket.faster} needs less memory to {do} than {bracket.slower}"
    where = _place("from", bracket, from_length)
    end = " on" if until is None else f" {_place('until', *until)}"
    note = " (not narrowed down)" if from_length is None else ""
    if bracket.slower_status in _FAILS:
        note += f"; at T = {bracket.high:,} {bracket.slower} {_FAILS[bracket.slower_status]}"
    return {
        "kind": bracket.kind,
        "quantity": bracket.quantity,
        "faster": bracket.faster,
        "slower": bracket.slower,
        "from_length": bracket.high if from_length is None else from_length,
        "measured": from_length is not None,
        "text": f"{where}{end}, {compared} on this machine{note}",
    }


def _place(word: str, bracket: Bracket, length: int | None) -> str:
    """Where a change of order lies, behind a preposition."""
    if length is None:
        return f"{word} some length between T = {bracket.low:,} and {bracket.high:,}"
    return f"{word} T = {length:,}"
