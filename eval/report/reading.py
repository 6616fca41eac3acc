"""Reads the folder of a comparison and checks what stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.eval.report.results import Bench, Cell, Comparison, Contestant, Measurement, Metric, number, table_rows
from zoo.eval.report.spread import Spread
from zoo.kernels.errors import DataError

_TRUE = frozenset({"1", "true", "yes"})


def read(folder: Path) -> Comparison:
    """Reads the folder of a comparison.

    Raises:
        DataError: It is none, or a file in it is damaged.
    """
    info = _json(folder / "comparison.json")
    if info is None:
        raise DataError(f"{folder} holds no comparison.json: give the folder of a comparison, as zoo.compare writes it")
    table = folder / "results.csv"
    if not table.exists():
        raise DataError(f"{folder} holds no results.csv: start the comparison again, it goes on where it stopped")
    bench = _json(folder / "bench.json")
    try:
        metric = Metric(info["metric"]["name"], bool(info["metric"]["higher_is_better"]))
        contestants = [_contestant(i, entry) for i, entry in enumerate(info["architectures"])]
        rows = list(table_rows(table))
        known = {who.label for who in contestants}
        cells = [_cell(row) for row in rows]
        strange = sorted({cell.label for cell in cells} - known)
        if strange:
            raise DataError(f"{table} has rows of {', '.join(strange)}, of which comparison.json knows nothing")
        return Comparison(folder, info, metric, contestants, cells, _bench(bench, known), list(rows[0]) if rows else [])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder} is damaged ({type(error).__name__}: {error}): start the comparison again, it writes them anew"
        ) from error


def _contestant(index: int, entry: dict[str, Any]) -> Contestant:
    return Contestant(
        label=str(entry["label"]),
        arch=str(entry.get("arch", entry["label"])),
        index=index,
        settings=dict(entry.get("settings") or {}),
        params=number(entry.get("params")),
        flops_per_token=number(entry.get("flops_per_token")),
        state_bytes={int(key): float(value) for key, value in (entry.get("state_bytes") or {}).items()},
        match=dict(entry.get("match") or {}),
        notes=[str(note) for note in entry.get("notes") or []],
    )


def _cell(row: dict[str, str]) -> Cell:
    return Cell(
        label=row["label"],
        lr=number(row.get("lr")),
        seed=row.get("seed") or "",
        status=row["status"],
        reason=row.get("reason") or "",
        chosen=(row.get("chosen") or "").lower() in _TRUE,
        values=row,
    )


def _bench(found: dict[str, Any] | None, known: set[str]) -> Bench | None:
    if found is None:
        return None
    rows = [_measurement(row) for row in found.get("rows") or [] if row.get("label") in known]
    crossovers = [dict(entry) for entry in found.get("crossovers") or []]
    return Bench(rows, crossovers, dict(found.get("machine") or {}), dict(found.get("reaches") or {}))


def _measurement(row: dict[str, Any]) -> Measurement:
    times, tokens = row.get("seconds") or {}, number(row.get("tokens_per_second"))
    seconds = None
    if number(times.get("median")):
        seconds = Spread(times["median"], times["min"], times["max"], int(times.get("repeats", 1)))
    speed = None if seconds is None or tokens is None else seconds.inverse(tokens * seconds.median)
    return Measurement(
        label=row["label"],
        kind=row["kind"],
        length=int(row["length"]),
        status=row.get("status", "ok"),
        reason=row.get("reason") or "",
        seconds=seconds,
        speed=speed,
        row=row,
    )


def _json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): start the comparison again, it writes it anew") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object: start the comparison again, it writes it anew")
    return found
