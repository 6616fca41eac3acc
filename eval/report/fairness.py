"""What was compared, and how far it was the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo.eval.report import words
from zoo.eval.report.blocks import Cell, Column, Points, Section, Table, Text, figure, missing
from zoo.eval.report.results import Comparison, Contestant, number

_MATCHED = {"params": "parameters", "flops": "forward FLOPs per token", "state": "bytes of state"}
_CLOSE = 0.01


@dataclass(frozen=True)
class SameBatches:
    """What the hashes of one seed's batches say."""

    seed: str
    hash: str
    """Of the batches that all runs have had, or of each where they differ."""
    after: int | None
    """The number of those batches, where runs ended at different ones; None: all of them."""
    equal: bool | None
    """None: it cannot be told."""


def same_batches(comparison: Comparison) -> list[SameBatches]:
    """Holds the hashes of the training batches against each other, seed by seed."""
    found = []
    for seed in comparison.seeds:
        cells = [cell for cell in comparison.cells if cell.seed == seed and cell.finished]
        hashes = sorted({cell.values.get("batch_hash") or "" for cell in cells})
        if len(hashes) <= 1:
            whole = hashes[0] if hashes else ""
            if cells:
                found.append(SameBatches(seed, whole, None, True if whole else None))
            continue
        # Runs that stopped earlier have another hash; each wrote down those after 1, 2, 4, 8, ... batches.
        starts = [comparison.summary(cell).get("batch_hash_after") or {} for cell in cells]
        common = set.intersection(*(set(start) for start in starts))
        after = max((int(count) for count in common), default=None)
        ends = sorted({start[str(after)] for start in starts}) if after is not None else hashes
        equal = None if after is None else len(ends) == 1
        found.append(SameBatches(seed, ", ".join(ends), after, equal))
    return found


def same_figures(comparison: Comparison) -> list[list[str]]:
    """Groups of labels whose runs, rate by rate and seed by seed, gave the same figures to the last digit.

    Figures that are all 0 or 1 make no group: whoever solves a task gives them.
    """
    groups: dict[frozenset[tuple[Any, ...]], list[str]] = {}
    test, validation = f"test_{comparison.metric.name}", f"val_{comparison.metric.name}"
    for who in comparison.contestants:
        cells = [cell for cell in comparison.cells_of(who.label) if cell.finished]
        if any(cell.number(test) not in (None, 0.0, 1.0) for cell in cells):
            figures = [(cell.lr, cell.seed, *map(cell.number, (test, validation, "steps"))) for cell in cells]
            groups.setdefault(frozenset(figures), []).append(who.label)
    return [labels for labels in groups.values() if len(labels) > 1]


def alike(groups: list[list[str]]) -> str:
    """A sentence on groups of `same_figures`; empty where there is none."""
    told = "; ".join(words.listing(labels) for labels in groups)
    said = "Figures that are the same to the last digit in every run, as at this length they compute the same"
    return f"{said}: {told}." if told else ""


def section(comparison: Comparison) -> Section:
    """The section."""
    blocks: list[Any] = [Points(_points(comparison))]
    batches = same_batches(comparison)
    if any(one.equal is False for one in batches):
        seeds = words.listing([one.seed for one in batches if one.equal is False])
        blocks.insert(0, Text(f"Not fair: with seed {seeds} the runs were not given the same batches.", warning=True))
    blocks.append(_table(comparison))
    return Section("fair", "What was compared, and how it was kept fair", blocks)


def _points(comparison: Comparison) -> list[str]:
    info = comparison.info
    data = info.get("data", {})
    facts = ", ".join(f"{key} {value}" for key, value in (data.get("facts") or {}).items() if key != "seq_len")
    found = [
        f"Task: {comparison.data}{_lengths(comparison)}{f' ({facts})' if facts else ''}. "
        f"Judged by {comparison.metric.title}, {'higher' if comparison.metric.higher_is_better else 'lower'} is better."
    ]
    if comparison.levels:
        named = [f"{name} {value:.3f}" for name, value in comparison.levels.items()]
        found.append(
            f"Values that show no skill on the test data: {words.listing(named)}. A chart has them where they hold for "
            f"what it shows."
        )
    if said := alike(same_figures(comparison)):
        found.append(said)
    if not comparison.trained:
        return [*found, "Nothing was trained: finished models were evaluated. They may have seen other data before."]
    found.append(_batches_line(comparison))
    if len(comparison.lengths.get("train", [])) > 1:
        found.append(
            "A training batch has examples of one length, and the seed decides which comes when: so runs of as many "
            "steps, but with other seeds, read other numbers of tokens."
        )
    found.append(_budget_line(comparison))
    found.append(_rates_line(comparison))
    found += _length_of_training(comparison)
    found.append(
        f"{words.many(len(comparison.seeds), 'seed')}: {', '.join(comparison.seeds)}. A seed decides the first weights "
        f"and the order of the batches."
    )
    found.append(
        "Test data are apart from training and validation. Each run read them once, after training, with the weights "
        "of its best validation; nothing was chosen by them."
    )
    return found


def _lengths(comparison: Comparison) -> str:
    """Tokens per example, in training and in what it is judged by."""
    splits: dict[str, list[str]] = {}
    for split, lengths in comparison.lengths.items():
        name = "training" if split == "train" else split
        splits.setdefault(words.listing([words.count(length) for length in lengths]), []).append(name)
    if len(splits) > 1:
        return "".join(f", {tokens} tokens per {words.listing(names)} example" for tokens, names in splits.items())
    if splits:
        return f", {next(iter(splits))} tokens per example"
    return f", at most {comparison.length:,} tokens per example" if comparison.length else ""


def _rates_line(comparison: Comparison) -> str:
    rates = comparison.rates
    if len({tuple(grid) for grid in rates.values()}) == 1:
        same = [words.rate(lr) for lr in next(iter(rates.values()))]
        if len(same) == 1:
            return f"Each was trained at the learning rate {same[0]} alone. Another may suit some better."
        tried = f"the learning rates {words.listing(same)}"
    else:
        tried = "learning rates around the one that suits it (in the table)"
    said = (
        f"Each was trained at {tried}. That with the best median over seeds on validation data was picked, for each "
        f"architecture by itself."
    )
    edge = []
    for label, grid in rates.items():
        picked = {cell.lr for cell in comparison.chosen(label)}
        if len(grid) > 1 and picked & {grid[0], grid[-1]}:
            edge.append(f"{label} ({'smallest' if grid[0] in picked else 'largest'})")
    return said + (
        f" At the edge of its grid, so that another may suit it better: {words.listing(edge)}." if edge else ""
    )


def _length_of_training(comparison: Comparison) -> list[str]:
    """When runs ended, where the settings tell."""
    trainer = comparison.info.get("settings", {}).get("trainer")
    if not isinstance(trainer, dict):
        return []
    steps, minutes, enough = (number(trainer.get(key)) for key in ("max_steps", "max_minutes", "stop_at"))
    ends = [f"after {steps:,.0f} steps"] if steps else []
    ends += [f"after {minutes:g} minutes"] if minutes else []
    ends += [f"at a validation accuracy of {enough:g}"] if enough and comparison.metric.name == "acc" else []
    return (
        [f"A run ended {words.listing(ends, 'or')}, whichever came first."]
        if len(ends) > 1
        else [f"A run ended {end}." for end in ends]
    )


def _batches_line(comparison: Comparison) -> str:
    batches = same_batches(comparison)
    if not batches or any(one.equal is None for one in batches):
        return "Whether all had the same batches is not known: hashes are missing."
    if not all(one.equal for one in batches):
        return "The batches were not the same for all, as their hashes show."
    parts = [one.after for one in batches if one.after is not None]
    if parts:
        return (
            f"Same batches in the same order for all with the same seed, proven by a hash over the first "
            f"{words.many(min(parts), 'batch')} (runs ended at different steps)."
        )
    return "Same batches in the same order for all with the same seed, proven by a hash over all of them."


def _budget_line(comparison: Comparison) -> str:
    matches = [who.match for who in comparison.contestants if who.match]
    by = next((match.get("by") for match in matches), None)
    if by in (None, "none"):
        return "No budget was matched: each has the size that its settings give it."
    gaps = [abs(gap) for match in matches if (gap := number(match.get("mismatch"))) is not None]
    target = number(matches[0].get("target"))
    of = f" of {words.size(target) if by == 'state' else words.short(target)}" if target else ""
    left = f"; the largest mismatch left is {words.percent(max(gaps))}" if gaps else ""
    return (
        f"Same budget: {_MATCHED.get(str(by), str(by))}{of}, reached by choosing width (and depth where needed){left}."
    )


def _table(comparison: Comparison) -> Table:
    lengths = sorted({length for who in comparison.contestants for length in who.state_bytes})
    matched = any("mismatch" in who.match for who in comparison.contestants)
    notes = {
        who.label: "; ".join(
            note for note in who.notes if not note.startswith("learning rate")
        )  # a column of their own
        for who in comparison.contestants
    }
    columns = [
        Column("architecture", number=False),
        Column("parameters"),
        Column("FLOPs per token", "forward, counted at the task's length"),
        *(Column(f"state at {length:,}", "bytes after so many tokens, declared") for length in lengths),
        *([Column("mismatch", "of what was matched")] if matched else []),
        *([Column("learning rates", number=False)] if comparison.trained else []),
        *([Column("notes", number=False)] if any(notes.values()) else []),
    ]
    rows = [
        [
            Cell(who.label, look=who.index, heading=True),
            figure(who.params, words.count),
            figure(who.flops_per_token, words.short),
            *(figure(who.state_bytes.get(length), words.size) for length in lengths),
            *([_mismatch(who)] if matched else []),
            *([Cell(", ".join(map(words.rate, comparison.rates[who.label])))] if comparison.trained else []),
            *([Cell(notes[who.label])] if any(notes.values()) else []),
        ]
        for who in comparison.contestants
    ]
    return Table("Who took part", columns, rows)


def _mismatch(who: Contestant) -> Cell:
    gap = number(who.match.get("mismatch"))
    if gap is None:
        return missing()
    return Cell(words.percent(gap), abs(gap), note="" if abs(gap) <= _CLOSE else "more than 1 %")
