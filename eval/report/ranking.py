"""The section with the result table: one row for each contestant, what did not finish, and every cell."""

from __future__ import annotations

import math

from zoo.eval.report import words
from zoo.eval.report.answers import steps
from zoo.eval.report.blocks import Block, Cell, Column, Section, Table, figure, missing, spread
from zoo.eval.report.results import Cell as Run
from zoo.eval.report.results import Comparison


def result(comparison: Comparison) -> Section:
    """One row for each contestant, then what did not finish, then every cell."""
    blocks: list[Block] = [_ranked(comparison)]
    lost = [cell for cell in comparison.cells if not cell.finished]
    if lost:
        blocks.append(_lost(comparison, lost))
    if comparison.cells:
        blocks.append(_every_cell(comparison))
    return Section("result", "Result", blocks)


def _ranked(comparison: Comparison) -> Table:
    metric = comparison.metric
    to_90 = [value for who in comparison.contestants if (value := comparison.steps_to_90(who.label))]
    with_steps = any(math.isfinite(value.low) for value in to_90)
    longest = max((length for who in comparison.contestants for length in who.state_bytes), default=None)
    columns = [
        Column("architecture", number=False),
        Column(f"test {metric.title}", "median (range over seeds)"),
        *([Column("solved", f"seeds with {comparison.solved_at:g} right or more")] if metric.name == "acc" else []),
        *([Column("steps to 0.9", "first validation with 0.9 right")] if with_steps else []),
        *([Column("rate", "of learning, picked")] if comparison.trained else []),
        *([Column("tokens/s", "of the training runs")] if comparison.trained else []),
        *([Column(f"state at {longest:,}", "bytes, declared")] if longest else []),
        Column("cells", "finished of planned"),
    ]
    ranked = [who for who, _ in comparison.ranking]
    rows = []
    for who in [*ranked, *(who for who in comparison.contestants if who not in ranked)]:
        cells, chosen, test = (
            comparison.cells_of(who.label),
            comparison.chosen(who.label),
            comparison.test(who.label),
        )
        finished = [cell for cell in cells if cell.finished]
        row = [Cell(who.label, look=who.index, heading=True)]
        row.append(spread(test, words.level, best=ranked[:1] == [who]) if test else Cell("no result", note=_why(cells)))
        if metric.name == "acc":
            tests = comparison.tests(who.label)
            solved, asked = sum(score >= comparison.solved_at for score in tests), sum(cell.chosen for cell in cells)
            row.append(Cell(f"{solved} of {asked}", solved / asked) if tests else missing())
        if with_steps:
            row.append(spread(comparison.steps_to_90(who.label), steps))
        if comparison.trained:
            row.append(figure(chosen[0].lr if chosen else None, words.rate))
            row.append(spread(comparison.spread(who.label, "tokens_per_second"), words.digits))
        if longest:
            row.append(figure(who.state_bytes.get(longest), words.size))
        row.append(Cell(f"{len(finished)} of {len(cells)}", len(finished) / len(cells)) if cells else missing())
        rows.append(row)
    caption = f"Sorted by test {metric.title}"
    if comparison.levels:
        caption += f"; no skill: {words.listing([f'{name} {value:.3f}' for name, value in comparison.levels.items()])}"
    return Table(caption, columns, rows)


def _why(cells: list[Run]) -> str:
    reasons = dict.fromkeys(cell.reason or cell.status.replace("_", " ") for cell in cells if not cell.finished)
    return "; ".join(reasons) or "no cell was chosen"


def _lost(comparison: Comparison, cells: list[Run]) -> Table:
    """What gave no result and why, cells of one contestant with one reason in one row."""
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for cell in cells:
        alike.setdefault((cell.label, cell.status, cell.reason), []).append(cell)
    columns = [
        Column("architecture", number=False),
        Column("what happened", number=False),
        Column("cells"),
        Column("learning rates", number=False),
        Column("seeds", number=False),
    ]
    rows = [
        [
            Cell(label, look=comparison.index(label), heading=True),
            Cell(status.replace("_", " "), note=reason),
            figure(len(group), words.count),
            Cell(", ".join(dict.fromkeys(words.rate(cell.lr) for cell in group if cell.lr is not None))),
            Cell(", ".join(dict.fromkeys(cell.seed for cell in group))),
        ]
        for (label, status, reason), group in alike.items()
    ]
    return Table("Cells without a result", columns, rows)


def _every_cell(comparison: Comparison) -> Table:
    cells = comparison.cells
    figures: list[tuple[str, Column, words.Form]] = [
        (f"test_{comparison.metric.name}", Column("test"), words.level),
        (f"val_{comparison.metric.name}", Column("validation"), words.level),
        ("steps", Column("steps"), words.count),
        ("best_step", Column("best step"), words.count),
        ("tokens", Column("tokens"), words.short),
        ("wall_seconds", Column("seconds"), words.digits),
        ("tokens_per_second", Column("tokens/s"), words.digits),
        ("peak_memory_bytes", Column("peak memory"), words.size),
    ]
    figures = [entry for entry in figures if any(cell.number(entry[0]) is not None for cell in cells)]
    columns = [
        Column("architecture", number=False),
        Column("learning rate"),
        Column("seed"),
        Column("status", number=False),
        *(column for _, column, _ in figures),
        Column("reason", number=False),
    ]
    rows = []
    for cell in cells:
        numbers = [figure(cell.number(key), form) for key, _, form in figures]
        rate = (
            missing() if cell.lr is None else Cell(words.rate(cell.lr) + (" (picked)" if cell.chosen else ""), cell.lr)
        )
        row = [
            Cell(cell.label, look=comparison.index(cell.label), heading=True),
            rate,
            Cell(cell.seed, cell.number("seed")),
        ]
        rows.append([*row, Cell(cell.status.replace("_", " ")), *numbers, Cell(cell.reason)])
    return Table("Every cell", columns, rows, folded=True)
