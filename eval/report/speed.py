"""Sections on speed and memory against length, and on what decoding costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.eval.report import words
from zoo.eval.report.blocks import Block, Cell, Chart, Charts, Column, Points, Section, Table, Text, figure, spread
from zoo.eval.report.charts import Axis, Series, lines
from zoo.eval.report.results import Bench, Comparison, Measurement
from zoo.eval.report.spread import Spread
from zoo.train.config import BASELINE

_KINDS = {
    "train": ("Training", "A training step is forward, backward and the update of the weights."),
    "prefill": ("Prefill", "Prefill is reading a text into the state, without gradients."),
    "decode": ("Decoding", "Decoding is writing one token after a text that was read."),
}
_MARKS = {"out_of_memory": "x", "too_slow": "+", "failed": "1"}
_MARKS_SAID = {"out_of_memory": "× Out of memory", "too_slow": "+ Too slow to measure", "failed": "Y Failed"}
_MOST_NUMBERED = 6
"""Crossovers with a line in a chart; more would hide it."""
_BRACKETS = (
    '"Not narrowed down" marks a mere bracket: the order was measured at its two lengths alone, and changes somewhere '
    "between them."
)
_LENGTH = {"decode": "tokens read before"}


def speed(comparison: Comparison) -> Section | None:
    """Time and memory of training and of reading, where each overtakes another, and all figures."""
    return _section(comparison, "speed", "Speed and memory against length", ("train", "prefill"))


def decoding(comparison: Comparison) -> Section | None:
    """What one more token costs after a text."""
    return _section(comparison, "decoding", "What decoding costs", ("decode",))


def _section(comparison: Comparison, anchor: str, title: str, kinds: tuple[str, ...]) -> Section | None:
    bench = comparison.bench
    if bench is None or not any(bench.of(kind) for kind in kinds):
        return None
    blocks: list[Block] = []
    for kind in kinds:
        if bench.of(kind):
            first, rest = _crossovers(comparison, bench, kind)
            numbered = [(str(i), entry) for i, entry in enumerate(first, start=1)]
            blocks.append(Text(_KINDS[kind][1]))
            blocks.append(Charts(_charts(comparison, bench, kind, numbered)))
            if numbered:
                blocks.append(Points([f"({number}) {entry.get('text', '')}" for number, entry in numbered]))
            if not all(entry.get("measured") for entry in [*first, *rest]):
                blocks.append(Text(_BRACKETS))
            if rest:
                guessed = sum(not entry.get("measured") for entry in rest)
                caption = f"More crossovers: {len(rest) - guessed} measured, {guessed} mere brackets"
                texts = [[Cell(str(entry.get("text", "")))] for entry in rest]
                blocks.append(Table(caption, [Column("", number=False)], texts, folded=True))
            blocks.append(_table(comparison, bench, kind))
    return Section(anchor, title, blocks)


def _crossovers(comparison: Comparison, bench: Bench, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The few that are shown, and the rest: those of the baseline first, then by whether, what and where."""
    baselines = {who.label for who in comparison.contestants if who.arch == BASELINE}
    found = [entry for entry in bench.crossovers if entry.get("kind") == kind and entry.get("from_length")]

    def of_others(entry: dict[str, Any]) -> bool:
        return baselines.isdisjoint({entry.get("faster"), entry.get("slower")})

    def order(entry: dict[str, Any]) -> tuple[bool, bool, bool, float]:
        return of_others(entry), not entry.get("measured"), entry.get("quantity") != "time", entry["from_length"]

    found.sort(key=order)
    most = min(_MOST_NUMBERED, sum(not of_others(entry) for entry in found) or _MOST_NUMBERED)
    return found[:most], found[most:]


def _charts(
    comparison: Comparison, bench: Bench, kind: str, crossovers: list[tuple[str, dict[str, Any]]]
) -> list[Chart]:
    lengths = sorted({row.length for row in bench.of(kind)})
    across = Axis(_LENGTH.get(kind, "tokens in a sequence"), words.length, True, lengths)

    def once(key: str) -> Callable[[Measurement], Spread | None]:
        return lambda row: Spread.of([row.number(key)])

    quantities: list[tuple[str, str, Axis, Callable[[Measurement], Spread | None]]] = [
        ("time", "tokens per second", Axis("tokens per second", words.short, True), lambda row: row.speed),
        (
            "memory",
            "peak memory",
            Axis("peak memory beyond weights", words.size, True, base=2),
            once("peak_memory_bytes"),
        ),
    ]
    if kind == "decode":  # its memory beyond the state is next to nothing; the table has it
        seconds = Axis("time for one token", words.duration, True)
        state = Axis("bytes of state, one sequence", words.size, True, base=2)
        quantities = [
            ("time", "time for one token", seconds, lambda row: row.seconds),
            ("state", "state", state, once("state_bytes")),
        ]
    charts = []
    for quantity, name, up, pick in quantities:
        series = [_series(bench, kind, who.label, who.index, pick) for who in comparison.contestants]
        if not any(one.points for one in series):
            continue
        lines_at = [
            (number, entry["from_length"])
            for number, entry in crossovers
            if entry.get("quantity") == quantity and entry.get("measured")
        ]
        spread = "Median, and a bar from the fastest to the slowest repeat." if quantity == "time" else "Measured once."
        spread += " A repeat is itself the median of some tokens." if (kind, quantity) == ("decode", "time") else ""
        crossed = " Numbered lines: from there on one overtakes another, in words below." if lines_at else ""
        caption = f"{spread}{crossed}{_missing(comparison, bench, kind)}"
        title = f"{_KINDS[kind][0]}: {name}"
        svg = lines(
            f"{kind}-{quantity}",
            f"{title} against length, by architecture; the table below has the figures",
            across,
            up,
            series,
            missing_at=0.04 if quantity == "time" and kind != "decode" else 0.97,
            crossings=lines_at,
        )
        charts.append(Chart(title, caption, svg, [one.index for one in series if one.points or one.missing]))
    return charts


def _missing(comparison: Comparison, bench: Bench, kind: str) -> str:
    """Who could not be measured from which length on, and why."""
    said = ""
    for status, mark in _MARKS_SAID.items():
        begins: dict[int, list[str]] = {}
        for who in comparison.contestants:
            lengths = [row.length for row in bench.of(kind, who.label) if row.status == status]
            if lengths:
                begins.setdefault(min(lengths), []).append(who.label)
        parts = [f"{words.listing(labels)} from {length:,} on" for length, labels in sorted(begins.items())]
        said += f" {mark}: {'; '.join(parts)}." if parts else ""
    return said


def _series(bench: Bench, kind: str, label: str, index: int, pick: Callable[[Measurement], Spread | None]) -> Series:
    rows = bench.of(kind, label)
    there = [(float(row.length), value) for row in rows if row.ok and (value := pick(row)) and value.low > 0]
    return Series(index, there, [(float(row.length), _MARKS.get(row.status, "1")) for row in rows if not row.ok])


def _table(comparison: Comparison, bench: Bench, kind: str) -> Table:
    rows = bench.of(kind)
    optional: list[tuple[str, Column, words.Form]] = [
        ("peak_memory_bytes", Column("peak memory", "beyond weights"), words.size),
        ("state_bytes", Column("state", "bytes held, of one sequence"), words.size),
        ("flops", Column("FLOPs", "counted"), words.short),
        ("flops_share", Column("of matrix product", "share of what a large one reaches here"), words.percent),
        ("bytes_share", Column("of memory copy", "share of what a large one reaches here"), words.percent),
    ]
    optional = [entry for entry in optional if any(row.number(entry[0]) is not None for row in rows)]
    columns = [
        Column("architecture", number=False),
        Column(_LENGTH.get(kind, "tokens")),
        Column("batch"),
        Column("time", "median (range)"),
        Column("tokens/s", "median (range)"),
        *(column for _, column, _ in optional),
        Column("kernels", number=False),
    ]
    body = []
    for row in sorted(rows, key=lambda row: (comparison.index(row.label), row.length)):
        said = _MARKS_SAID.get(row.status, row.status)
        time = (
            Cell(f"{said[2:].lower()}{': ' if row.reason else ''}{row.reason}")
            if not row.ok
            else spread(row.seconds, words.duration)
        )
        numbers = [figure(row.number(key), form) for key, _, form in optional]
        backends = ", ".join(dict.fromkeys(map(str, (row.row.get("backends") or {}).values())))
        body.append(
            [
                Cell(row.label, look=comparison.index(row.label), heading=True),
                Cell(words.count(row.length), row.length),
                figure(row.number("batch"), words.count),
                time,
                spread(row.speed, words.digits),
                *numbers,
                Cell(backends),
            ]
        )
    return Table(f"All figures: {_KINDS[kind][0].lower()}", columns, body, folded=True)


def not_measured(comparison: Comparison) -> Section | None:
    """Says that speed is missing, where it is."""
    if comparison.bench is not None and comparison.bench.rows:
        return None
    text = "Speed and memory against length were not measured (bench=false, or the measurement did not finish)."
    return Section("speed", "Speed and memory against length", [Text(text)])
