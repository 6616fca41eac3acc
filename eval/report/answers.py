"""The headline: what people come to ask, answered in words, with figures, their spread and how sure they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from zoo.eval.bench.crossover import MARGIN
from zoo.eval.report import words
from zoo.eval.report.blocks import Answer
from zoo.eval.report.fairness import alike, same_figures
from zoo.eval.report.results import Bench, Comparison, Contestant
from zoo.eval.report.spread import Spread, luck

Entry = tuple[Contestant, Spread]
_MOST_LEVEL, _MOST_TOLD = 2, 4
_FAR = 1.5
"""From this factor on it is said how far the last is behind."""
_SLOWEST = "The slowest, {}, takes {} times as long."
_OVERLAP, _SAME = "their ranges overlap", "the figures shown are the same"


def answers(comparison: Comparison) -> list[Answer]:
    """Those questions that the comparison can answer."""
    found = [
        _best(comparison),
        _learns(comparison),
        _trains(comparison),
        _least_memory(comparison),
        _decodes(comparison),
        _smallest_state(comparison),
        _sure(comparison),
    ]
    return [answer for answer in found if answer is not None]


def lead(comparison: Comparison) -> str:
    """What was done, in one sentence."""
    info = comparison.info
    what = "architecture" if comparison.trained else "model"
    parts = [f"{words.many(len(comparison.contestants), what)} on {comparison.data}"]
    if comparison.trained:
        rates = max(map(len, comparison.rates.values()))
        parts.append(f"{words.many(len(comparison.seeds), 'seed')} and {words.many(rates, 'learning rate')} each")
    hours, device = info.get("hours"), (info.get("machine") or {}).get("device")
    parts += [words.duration(3600 * hours)] if hours else []
    return f"{', '.join(parts)}{f', on {device}' if device else ''}."


def steps(value: float) -> str:
    """Steps of training, which may not have been enough."""
    return words.count(value) if math.isfinite(value) else "not reached"


def nearest(lengths: Sequence[int], wanted: int | None) -> int | None:
    """Of these lengths the one next to that of the task; the shortest where that is not known."""
    if not lengths:
        return None
    return min(lengths, key=lambda length: (abs(math.log(length / wanted)) if wanted else length, length))


def _best(comparison: Comparison) -> Answer | None:
    metric, ranking = comparison.metric, comparison.ranking
    if not ranking:
        return Answer(
            "Which is best?", "Nobody finished", "", "No cell has a result on test data; the reasons stand below."
        )
    best = ranking[0][1]
    seeds = f"over {words.many(best.count, 'seed')}" if best.count > 1 else "of one seed"
    detail = (
        f"{metric.title.capitalize()} on test data, {'median and range' if best.count > 1 else 'the figure'} {seeds}."
    )
    question = "Which is most accurate?" if metric.name == "acc" else f"Which has the best {metric.title}?"
    return _answer(question, ranking, words.level, detail + _skill(comparison))


def _skill(comparison: Comparison) -> str:
    """What there is to say of the levels of no skill, where not every seed of the best is above them."""
    ranking = comparison.ranking
    said, missed = "", {}
    for name, level in comparison.levels.items():
        above = [(who.label, [value > level for value in comparison.tests(who.label)]) for who, _ in ranking]
        if not any(any(seeds) for _, seeds in above):
            missed[f"{name} ({level:.3f})"] = level
        elif not all(above[0][1]):
            counts = [f"{sum(seeds)} of {len(seeds)} of {label}" for label, seeds in above if any(seeds)]
            said += f" Seeds above {name} ({level:.3f}): {_listing(counts)}."
    if missed:
        highest = max(value.high for _, value in ranking)
        where = "below" if highest < min(missed.values()) else "not above"
        said += f" Even the best seed of all is {where} {words.listing(list(missed))}: nobody has learnt this task."
    return said


def _learns(comparison: Comparison) -> Answer | None:
    found = _entries(comparison, comparison.steps_to_90)
    if not any(math.isfinite(value.median) for _, value in found):
        return None
    found.sort(key=lambda entry: entry[1].median)
    detail = "Steps of training until validation first has 0.9 right, at the learning rate picked."
    never = [who.label for who, value in found if math.isinf(value.median)]
    if never:
        detail += f" Half of the seeds or more never came so far: {words.listing(never)}."
    return _answer("Which needs the fewest steps?", found, steps, detail)


def _trains(comparison: Comparison) -> Answer | None:
    question = "Which trains fastest at this length?"
    length = _length(comparison, "train")
    if comparison.bench is None or length is None:
        found = _entries(comparison, lambda label: comparison.spread(label, "tokens_per_second"))
        found.sort(key=lambda entry: entry[1].median, reverse=True)
        detail = "Tokens per second of the training runs themselves: their speed was not measured by itself."
        return _answer(question, found, words.digits, detail, "tokens/s", _SLOWEST) if found else None
    speeds = _measured(comparison, comparison.bench, "train", length)
    speeds.sort(key=lambda entry: entry[1].median, reverse=True)
    wanted = comparison.length
    near = "" if wanted in (None, length) else f" (of the lengths measured the nearest to the task's {wanted:,})"
    detail = f"Forward, backward and update at {length:,} tokens{near}, median and range of the repeats."
    return _answer(question, speeds, words.digits, detail, "tokens/s", _SLOWEST)


def _least_memory(comparison: Comparison) -> Answer | None:
    length = _length(comparison, "train")
    if comparison.bench is None or length is None:
        return None
    rows = [row for row in comparison.bench.of("train") if row.length == length and row.ok]
    held = {row.label: value for row in rows if (value := row.number("peak_memory_bytes")) is not None}
    found = [(who, _repeated(held[who.label])) for who in comparison.contestants if who.label in held]
    if not found:
        return None
    found.sort(key=lambda entry: entry[1].median)
    detail = f"Peak of one training step at {length:,} tokens beyond the weights, measured once."
    most, why = "{} needs the most, {} times as much.", f"memory repeats to within {words.percent(MARGIN)} only"
    return _answer("Which needs the least memory to train?", found, words.size, detail, last=most, overlap=why)


def _repeated(memory: float) -> Spread:
    """A measurement of memory and where others would lie: crossovers are told by the same margin."""
    return Spread(memory, memory * (1 - MARGIN / 2), memory * (1 + MARGIN / 2), 1)


def _decodes(comparison: Comparison) -> Answer | None:
    if comparison.bench is None:
        return None
    lengths = {row.length for row in comparison.bench.of("decode") if row.ok}
    if not lengths:
        return None
    found = _measured(comparison, comparison.bench, "decode", max(lengths))
    found.sort(key=lambda entry: entry[1].median, reverse=True)
    detail = (
        f"One token after {max(lengths):,} tokens read: median and range of repeats, each the median of some tokens."
    )
    return _answer("Which writes fastest after a long text?", found, words.digits, detail, "tokens/s", _SLOWEST)


def _smallest_state(comparison: Comparison) -> Answer | None:
    lengths = {length for who in comparison.contestants for length in who.state_bytes}
    if not lengths:
        return None

    def sizes(length: int) -> list[Entry]:
        found = _entries(comparison, lambda label: Spread.of([held[label].get(length)]))
        return sorted(found, key=lambda entry: entry[1].median)

    held = {who.label: who.state_bytes for who in comparison.contestants}
    longest, near = max(lengths), nearest(sorted(lengths), comparison.length)
    detail = (
        f"What one sequence leaves behind after {longest:,} tokens, and decoding carries along, as the architectures "
        f"declare it: not measured."
    )
    if near is not None and near != longest:
        who, value = sizes(near)[0]
        if who is not sizes(longest)[0][0]:
            detail += f" After {near:,} tokens the smallest is that of {who.label}, {words.size(value.median)}."
    most = "The largest, that of {}, is {} times as large."
    return _answer("Which has the smallest state?", sizes(longest), words.size, detail, last=most)


def _sure(comparison: Comparison) -> Answer | None:
    ranking = comparison.ranking
    question = "How sure are we?"
    lost = [cell for cell in comparison.cells if not cell.finished]
    gaps = f" {words.many(len(lost), 'cell')} of {len(comparison.cells)} gave no result (below)." if lost else ""
    if len(ranking) < 2:
        return None
    fewest = min(value.count for _, value in ranking)
    if fewest == 1:
        return Answer(
            question,
            "Not very",
            "one seed",
            "Somebody has a result of one seed only, so no spread is known there; a difference may be luck." + gaps,
        )
    groups = same_figures(comparison)
    again = {label for labels in groups for label in labels[1:]}
    same = f" {alike(groups)} Pairs count them once." if again else ""
    pairs = list(itertools.combinations([value for who, value in ranking if who.label not in again], 2))
    if not pairs:
        return Answer(question, "There is nothing to tell apart", "", same.strip() + gaps)
    apart = sum(not first.overlaps(second) for first, second in pairs)
    odds = min(luck(first, second) for first, second in pairs)
    some = f" Of {len(pairs)} pairs, some may be apart by luck." if len(pairs) > 1 else ""
    detail = (
        f"Apart means that every seed of one beats every seed of the other. If two were equally good, luck alone would "
        f"set them so apart in 2 of {odds} cases, with {fewest} seeds each.{some} Where ranges overlap, this "
        f"comparison does not tell who is better.{same}"
    )
    return Answer(question, f"{apart} of {words.many(len(pairs), 'pair')} apart", f"{fewest} seeds", detail + gaps)


def _answer(
    question: str,
    entries: Sequence[Entry],
    form: words.Form,
    detail: str,
    unit: str = "",
    last: str = "",
    overlap: str = _OVERLAP,
) -> Answer:
    """The first of some entries, and who cannot be told apart from it.

    Args:
        question: What is asked.
        entries: Who and what, the best first.
        form: How it is written.
        detail: What the figures are.
        unit: Of the figures.
        last: Says how far the last is behind, with places for its label and the factor; empty: that makes no sense.
        overlap: Why those are not told apart whose ranges overlap.
    """
    (first, value), others = entries[0], entries[1:]
    level: dict[str, list[Entry]] = {}
    for who, other in others:
        ranges = value.low < value.high or other.low < other.high
        if value.overlaps(other) and ranges:
            level.setdefault(overlap, []).append((who, other))
        elif form(other.median) == form(value.median):
            level.setdefault(_SAME, []).append((who, other))
    answer = first.label
    if level:
        names = [who.label for group in level.values() for who, _ in group]
        answer += f", level with {words.listing(names) if len(names) <= _MOST_LEVEL else f'{len(names)} others'}"
        for why, group in level.items():
            told = _listing([f"{who.label} {words.spread(other, form)}" for who, other in group])
            detail += f" Not told apart from it, as {why}: {told}."
    elif others:
        detail += f" Next: {others[0][0].label}, {words.spread(others[0][1], form)}."
    if last and len(others) > 1:
        detail += _behind(entries, last)
    return Answer(question, answer, f"{words.spread(value, form)} {unit}".strip(), detail, first.index)


def _behind(entries: Sequence[Entry], said: str) -> str:
    """How far the last is behind the first, where that is much."""
    first, last = entries[0][1].median, entries[-1][1].median
    factor = max(first, last) / min(first, last) if min(first, last) > 0 else 0.0
    return f" {said.format(entries[-1][0].label, words.digits(factor))}" if _FAR <= factor < math.inf else ""


def _listing(items: list[str]) -> str:
    """The first few."""
    more = [f"{len(items) - _MOST_TOLD} more"] if len(items) > _MOST_TOLD else []
    return words.listing(items[:_MOST_TOLD] + more)


def _entries(comparison: Comparison, pick: Callable[[str], Spread | None]) -> list[Entry]:
    return [(who, value) for who in comparison.contestants if (value := pick(who.label)) is not None]


def _measured(comparison: Comparison, bench: Bench, kind: str, length: int) -> list[Entry]:
    speeds = {row.label: row.speed for row in bench.of(kind) if row.length == length and row.ok}
    return _entries(comparison, speeds.get)


def _length(comparison: Comparison, kind: str) -> int | None:
    """Of the lengths measured the one next to that of the task."""
    bench = comparison.bench
    measured = {row.length for row in bench.of(kind) if row.ok and row.speed} if bench else set()
    return nearest(sorted(measured), comparison.length)
