"""Sections on what was learnt: slices, learning, and accuracy against size."""

from __future__ import annotations

from zoo.eval.report import words
from zoo.eval.report.answers import nearest
from zoo.eval.report.blocks import Block, Cell, Chart, Charts, Column, Section, Table, Text, spread
from zoo.eval.report.charts import Axis, Series, heat, lines, points
from zoo.eval.report.results import Comparison
from zoo.eval.report.spread import Spread

_MANY_TIMES = 8
"""From this ratio on, an axis is logarithmic."""
_SAME = 1.1
"""Sizes no further apart than this say nothing against accuracy."""


def slices(comparison: Comparison) -> Section | None:
    """How the metric depends on what the test data are split by."""
    single = {keys[0]: columns for keys, columns in comparison.slices.items() if len(keys) == 1 and len(columns) > 1}
    charts: list[Chart] = []
    tables: list[Table] = []
    for key, columns in single.items():
        places = {value: column for (value,), column in columns.items()}
        series = []
        for who in comparison.contestants:
            found = [
                (place, value) for place, column in places.items() if (value := comparison.spread(who.label, column))
            ]
            series.append(Series(who.index, found))
        log = min(places) > 0 and max(places) / min(places) >= _MANY_TIMES
        title = f"{comparison.metric.title.capitalize()} by {_plain(key)}"
        levels = _levels_by(comparison, key, list(places))
        said = f" Dotted: what shows no skill at each length ({words.listing(list(levels))})." if levels else ""
        caption = f"Test data, at the learning rate picked. {_range_note(comparison)}{said}"
        across = Axis(_plain(key), words.length if min(places) >= 1 else "{:g}".format, log, sorted(places))
        svg = lines(
            f"slice-{len(charts)}",
            f"{title}, by architecture; the table below has the figures",
            across,
            _metric_axis(comparison),
            series,
            levels=levels,
        )
        charts.append(Chart(title, caption, svg, _shown(series)))
        tables.append(_slice_table(comparison, key, places))
    blocks: list[Block] = [Charts(charts), *tables] if charts else []
    blocks += _maps(comparison)
    return Section("slices", f"{comparison.metric.title.capitalize()} by slice", blocks) if blocks else None


def _levels_by(comparison: Comparison, key: str, places: list[float]) -> dict[str, dict[float, float]]:
    """What shows no skill at each place, by name: known of lengths alone, and only where it is known of each."""
    known = comparison.levels_by_length if key == "seq_len" else {}
    if not all(place in known for place in places):
        return {}
    names = dict.fromkeys(name for place in places for name in known[int(place)])
    return {name: {place: known[int(place)][name] for place in places if name in known[int(place)]} for name in names}


def _slice_table(comparison: Comparison, key: str, places: dict[float, str]) -> Table:
    columns = [Column("architecture", number=False), *(Column(f"{_plain(key)} {value:,g}") for value in places)]
    rows = [
        [
            Cell(who.label, look=who.index, heading=True),
            *(spread(comparison.spread(who.label, column), words.level) for column in places.values()),
        ]
        for who in comparison.contestants
        if comparison.chosen(who.label)
    ]
    return Table(f"Test {comparison.metric.title} by {_plain(key)}", columns, rows, folded=len(places) > MOST_COLUMNS)


MOST_COLUMNS = 6
"""Of a table of slices that is shown unfolded."""


def _maps(comparison: Comparison) -> list[Block]:
    """A map for each contestant where the test data are split by two things at once, as needles by depth and length."""
    blocks: list[Block] = []
    for number, (keys, columns) in enumerate(comparison.slices.items()):
        if len(keys) != 2 or comparison.metric.name != "acc":
            continue
        first, second = (sorted({values[i] for values in columns}) for i in (0, 1))
        charts = []
        for who in comparison.contestants:
            values = {
                (first.index(a), second.index(b)): (found.median, _lowest(found))
                for (a, b), column in columns.items()
                if (found := comparison.spread(who.label, column))
            }
            if not values:
                continue
            svg = heat(
                f"map-{number}-{who.index}",
                f"{who.label}: accuracy by {_plain(keys[0])} and {_plain(keys[1])}",
                _plain(keys[1]),
                _plain(keys[0]),
                [f"{value:,g}" for value in second],
                [f"{value:,g}" for value in first],
                values,
            )
            charts.append(Chart(who.label, "", svg, [who.index]))
        many = any(len(comparison.chosen(who.label)) > 1 for who in comparison.contestants)
        below = "; below it, small, that of the worst seed" if many else "; one seed"
        title = f"Map: accuracy by {_plain(keys[0])} (down) and {_plain(keys[1])} (across), median over seeds{below}."
        blocks += [Text(title), Charts(charts)]
    return blocks


def _lowest(found: Spread) -> str:
    return f"{found.low:.2f}".lstrip("0") if found.count > 1 and found.low < 1 else ""


def learning(comparison: Comparison) -> Section | None:
    """How the metric grew, and how it depends on the learning rate."""
    charts = [chart for chart in (_curves(comparison), _rates(comparison)) if chart is not None]
    return Section("learning", "Learning", [Charts(charts)]) if charts else None


def _curves(comparison: Comparison) -> Chart | None:
    series, stopped = [], False
    for who in comparison.contestants:
        curves = [dict(curve) for cell in comparison.chosen(who.label) if (curve := comparison.curve(cell))]
        found = []
        for step in sorted({step for curve in curves for step in curve}):
            # A run that ended earlier, as it may at the accuracy wanted, counts with its last value: left out, the
            # median of those that go on would seem to fall.
            values = [curve[max(known)] for curve in curves if (known := [at for at in curve if at <= step])]
            if len(values) == len(curves) and (value := Spread.of(values)):
                found.append((float(step), value))
        stopped |= len({max(curve) for curve in curves}) > 1
        series.append(Series(who.index, found))
    if not any(len(one.points) > 1 for one in series):
        return None
    caption = f"Validation, at the learning rate picked. {_range_note(comparison, 'a band')}"
    if stopped:
        caption += " A run that ended early counts with its last value."
    svg = lines(
        "curves",
        "Learning curves by architecture",
        Axis("training steps", words.short),
        _metric_axis(comparison),
        series,
        band=True,
        levels=comparison.levels_of_validation,
    )
    return Chart("Learning curves", caption, svg, _shown(series))


def _rates(comparison: Comparison) -> Chart | None:
    column = f"val_{comparison.metric.name}"
    series = []
    for who in comparison.contestants:
        runs = [cell for cell in comparison.cells_of(who.label) if cell.finished and cell.lr is not None]
        rates = sorted({cell.lr for cell in runs if cell.lr is not None})
        found = [(lr, Spread.of(cell.number(column) for cell in runs if cell.lr == lr)) for lr in rates]
        picked = next((cell.lr for cell in runs if cell.chosen), None)
        series.append(Series(who.index, [(lr, value) for lr, value in found if value], ringed=picked))
    places = sorted({lr for one in series for lr, _ in one.points})
    if len(places) < 2:
        return None
    caption = f"Validation; a ring marks the learning rate picked. {_range_note(comparison)}"
    svg = lines(
        "rates",
        "Sensitivity to the learning rate, by architecture",
        Axis("learning rate", words.rate, True, places),
        _metric_axis(comparison),
        series,
        levels=comparison.levels_of_validation,
    )
    return Chart("Sensitivity to the learning rate", caption, svg, _shown(series))


def size(comparison: Comparison) -> Section | None:
    """The metric against what it costs."""
    lengths = sorted({length for who in comparison.contestants for length in who.state_bytes})
    at = nearest(lengths, comparison.length)
    picks: list[tuple[str, str, dict[str, float | None], words.Form, int]] = [
        (
            f"state-{length}",
            f"bytes of state after {length:,} tokens",
            {who.label: who.state_bytes.get(length) for who in comparison.contestants},
            words.size,
            2,
        )
        for length in sorted({at, lengths[-1]} if at is not None else ())
    ]
    params = {who.label: who.params for who in comparison.contestants}
    flops = {who.label: who.flops_per_token for who in comparison.contestants}
    picks += [
        ("params", "parameters", params, words.short, 10),
        ("flops", "forward FLOPs per token", flops, words.short, 10),
    ]
    charts, alike = [], []
    for name, title, costs_of, form, base in picks:
        places = [
            (who.index, who.label, cost, found) for who, found in comparison.ranking if (cost := costs_of[who.label])
        ]
        costs = [cost for _, _, cost, _ in places]
        if len(places) < 2:
            continue
        if max(costs) / min(costs) < _SAME:
            alike.append(title)
            continue
        svg = points(
            f"size-{name}",
            f"{comparison.metric.title} against {title}",
            Axis(title, form, True, base=base),
            _metric_axis(comparison),
            places,
            comparison.levels,
        )
        heading = f"{comparison.metric.title.capitalize()} against {title}"
        declared = " Bytes as the architecture declares them, not measured." if name.startswith("state") else ""
        charts.append(Chart(heading, f"Test data. {_range_note(comparison)}{declared}", svg, ()))
    blocks: list[Block] = [Charts(charts)] if charts else []
    if alike:
        blocks.append(Text(f"Not drawn, because it is the same for all: {words.listing(alike)}."))
    return Section("size", f"{comparison.metric.title.capitalize()} against size", blocks) if charts else None


def _metric_axis(comparison: Comparison) -> Axis:
    metric = comparison.metric
    if metric.name == "acc":
        return Axis("accuracy", "{:g}".format, ticks=(0, 0.2, 0.4, 0.6, 0.8, 1), limits=(-0.02, 1.03))
    return Axis(metric.title, "{:.3g}".format)


def _range_note(comparison: Comparison, mark: str = "a bar") -> str:
    most = max((len(comparison.chosen(who.label)) for who in comparison.contestants), default=0)
    if most < 2:
        return "One seed, so no spread is known."
    return f"Median over seeds, and {mark} from the smallest to the largest."


def _shown(series: list[Series]) -> list[int]:
    return [one.index for one in series if one.points or one.missing]


def _plain(key: str) -> str:
    return {"seq_len": "tokens", "num_pairs": "pairs to remember", "n_needles": "needles"}.get(
        key, key.replace("_", " ")
    )
