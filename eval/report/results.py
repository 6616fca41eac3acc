"""What a comparison left in its folder, read once and checked."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.eval.report.spread import Spread

FINISHED = "finished"
SOLVED_AT = 0.9
_STEPS = "steps_to_90"


@dataclass(frozen=True)
class Metric:
    """What the architectures are ranked by."""

    name: str
    higher_is_better: bool

    @property
    def title(self) -> str:
        """Its name in words."""
        return {"acc": "accuracy"}.get(self.name, self.name.replace("_", " "))

    def better(self, value: float, other: float) -> bool:
        """Whether the first is the better one."""
        return value > other if self.higher_is_better else value < other

    def separates(self, first: Spread, second: Spread) -> bool:
        """Whether every value of one is better than every one of the other, and a spread is known at all."""
        return not first.overlaps(second) and first.count + second.count > 2


@dataclass(frozen=True)
class Contestant:
    """An architecture, or a model of the user's own."""

    label: str
    arch: str
    index: int
    """Its place in the comparison, which decides how it is drawn."""
    settings: dict[str, Any]
    params: float | None
    flops_per_token: float | None
    state_bytes: dict[int, float]
    """By the tokens read."""
    match: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Cell:
    """One training run: a contestant, a learning rate, a seed."""

    label: str
    lr: float | None
    seed: str
    status: str
    reason: str
    chosen: bool
    values: dict[str, str]
    """The whole row of the table."""

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.status == FINISHED

    def number(self, column: str) -> float | None:
        """A figure of the row; None where there is none."""
        return number(self.values.get(column))


@dataclass(frozen=True)
class Measurement:
    """One row of the speed measurement."""

    label: str
    kind: str
    length: int
    status: str
    reason: str
    seconds: Spread | None
    speed: Spread | None
    """Tokens per second."""
    row: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether it was measured."""
        return self.status == "ok" and self.seconds is not None

    def number(self, key: str) -> float | None:
        """A figure of the row; None where there is none."""
        return number(self.row.get(key))


@dataclass(frozen=True)
class Bench:
    """Speed and memory against length."""

    rows: list[Measurement]
    crossovers: list[dict[str, Any]]
    machine: dict[str, Any]
    reaches: dict[str, float]

    def of(self, kind: str, label: str | None = None) -> list[Measurement]:
        """The rows of one kind, and of one contestant, by length."""
        rows = [row for row in self.rows if row.kind == kind and label in (None, row.label)]
        return sorted(rows, key=lambda row: row.length)


@dataclass(frozen=True)
class Comparison:
    """All of it."""

    folder: Path
    info: dict[str, Any]
    metric: Metric
    contestants: list[Contestant]
    cells: list[Cell]
    bench: Bench | None
    columns: list[str] = field(default_factory=list)

    @property
    def data(self) -> str:
        """The dataset."""
        return str(self.info.get("data", {}).get("name", "unknown data"))

    @property
    def levels(self) -> dict[str, float]:
        """Values of the metric that show no skill on the test data as a whole, by name."""
        return _levels(self.info.get("data", {}).get("levels"))

    @property
    def levels_by_length(self) -> dict[int, dict[str, float]]:
        """The same on examples of one length, by that; empty where nobody wrote them down."""
        found = self.info.get("data", {}).get("levels_by_length") or {}
        return {int(length): _levels(levels) for length, levels in found.items()}

    @property
    def levels_of_validation(self) -> dict[str, float]:
        """The same on validation data; empty where their examples have other lengths, and nothing is known of these."""
        lengths = self.lengths.get("validation")
        if lengths and lengths == self.lengths.get("test"):
            return self.levels
        return self.levels_by_length.get(lengths[0], {}) if lengths and len(lengths) == 1 else {}

    @property
    def lengths(self) -> dict[str, list[int]]:
        """Tokens of the examples, by split, as far as somebody wrote them down."""
        found = self.info.get("data", {}).get("lengths") or {}
        return {str(split): sorted(map(int, lengths)) for split, lengths in found.items()}

    @property
    def seeds(self) -> list[str]:
        """The seeds that were asked for."""
        return [str(seed) for seed in self.info.get("seeds") or dict.fromkeys(cell.seed for cell in self.cells)]

    @property
    def solved_at(self) -> float:
        """The test accuracy from which on a seed has solved the task."""
        return number((self.info.get("settings") or {}).get("solved_at")) or SOLVED_AT

    @property
    def rates(self) -> dict[str, list[float]]:
        """The learning rates tried, by label."""
        return {
            who.label: sorted({cell.lr for cell in self.cells_of(who.label) if cell.lr is not None})
            for who in self.contestants
        }

    @property
    def trained(self) -> bool:
        """Whether models were trained for it; otherwise finished ones were evaluated."""
        return any(cell.lr is not None for cell in self.cells)

    @property
    def length(self) -> int | None:
        """Tokens of one example of the task, the longest where they differ; None where nobody wrote them down."""
        data = self.info.get("data", {})
        for place in (data, data.get("facts") or {}, data.get("settings") or {}):
            for key in ("length", "seq_len"):
                if number(place.get(key)):
                    return int(place[key])
        sliced = [value for key in ("seq_len", "length") for (value,) in self.slices.get((key,), {})]
        return int(max(sliced)) if sliced else None

    def index(self, label: str) -> int:
        """The place of a contestant."""
        return next(who.index for who in self.contestants if who.label == label)

    def cells_of(self, label: str) -> list[Cell]:
        """All cells of a contestant."""
        return [cell for cell in self.cells if cell.label == label]

    def chosen(self, label: str) -> list[Cell]:
        """The finished cells at the learning rate that validation picked."""
        return [cell for cell in self.cells_of(label) if cell.chosen and cell.finished]

    def spread(self, label: str, column: str) -> Spread | None:
        """A column over the seeds, at the learning rate picked."""
        return Spread.of(cell.number(column) for cell in self.chosen(label))

    def tests(self, label: str) -> list[float]:
        """The metric on test data of each seed that has it, at the learning rate picked."""
        column = f"test_{self.metric.name}"
        return [value for cell in self.chosen(label) if (value := cell.number(column)) is not None]

    def test(self, label: str) -> Spread | None:
        """The metric on test data, over the seeds."""
        return Spread.of(self.tests(label))

    def steps_to_90(self, label: str) -> Spread | None:
        """Steps to the first validation with 0.9 right, over the seeds, infinite for one that never came so far."""
        cells = self.chosen(label)
        if self.metric.name != "acc" or not cells:
            return None
        return Spread.of(math.inf if (steps := cell.number(_STEPS)) is None else steps for cell in cells)

    @cached_property
    def ranking(self) -> list[tuple[Contestant, Spread]]:
        """Who has a result on test data, the best first."""
        found = [(who, result) for who in self.contestants if (result := self.test(who.label)) is not None]
        return sorted(found, key=lambda pair: pair[1].median, reverse=self.metric.higher_is_better)

    @cached_property
    def slices(self) -> dict[tuple[str, ...], dict[tuple[float, ...], str]]:
        """The columns of the slices of the test data: by what they split by, then by its values.

        A column `test_acc/depth=3` is of ("depth",), and one `test_acc/seq_len=512,depth=3` of ("seq_len", "depth").
        """
        found: dict[tuple[str, ...], dict[tuple[float, ...], str]] = {}
        prefix = f"test_{self.metric.name}/"
        for column in self.columns:
            if column.startswith(prefix):
                parts = [part.strip().partition("=") for part in column.removeprefix(prefix).split(",")]
                values = tuple(value for _, _, raw in parts if (value := number(raw)) is not None)
                if len(values) == len(parts) and any(
                    number(cell.values.get(column)) is not None for cell in self.cells
                ):
                    found.setdefault(tuple(key for key, _, _ in parts), {})[values] = column
        return {keys: dict(sorted(columns.items())) for keys, columns in found.items()}

    def run_folder(self, cell: Cell) -> Path | None:
        """Where the run of a cell lies; None where there is none."""
        run = cell.values.get("run") or ""
        places = (self.folder / run, self.folder / "runs" / run) if run else ()
        return next((place for place in places if place.is_dir()), None)

    def summary(self, cell: Cell) -> dict[str, Any]:
        """The summary of a cell's run; empty where there is none."""
        place = self.run_folder(cell)
        try:
            found = json.loads((place / "summary.json").read_text(encoding="utf-8")) if place else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def curve(self, cell: Cell) -> list[tuple[int, float]]:
        """Step and metric of each validation of a cell's run."""
        place = self.run_folder(cell)
        if place is None or not (place / "metrics.csv").exists():
            return []
        points = []
        for row in table_rows(place / "metrics.csv"):
            step, value = number(row.get("step")), number(row.get(f"val/{self.metric.name}"))
            if step is not None and value is not None:
                points.append((int(step), value))
        return points


def _levels(found: dict[str, Any] | None) -> dict[str, float]:
    return {str(name): value for name, raw in (found or {}).items() if (value := number(raw)) is not None}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def table_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
