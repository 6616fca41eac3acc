"""The three kinds of charts of a report: lines with their spread, labelled points, and maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

from zoo.eval.report.canvas import ABOVE, BELOW, FAINT, INK, LEFT, PAPER, RIGHT, Look, canvas, svg
from zoo.eval.report.spread import Spread
from zoo.eval.report.words import Form

Levels = Mapping[str, float | Mapping[float, float]]
"""Values that show no skill, by name: the same everywhere, or by x."""
MOST_TICKS = 7
CELL_WIDTH, CELL_HEIGHT = 0.42, 0.36
"""Inches, of a map."""
_SIDES = (("left", 0.0, 7), ("right", 1.0, -7), ("center", 0.5, 0))
"""Of a point, where its label may stand: alignment, share of its width to the left, points to the right."""
_CLOSE = 1.35
"""Ticks nearer than this on a logarithmic axis have no room for their labels."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and how."""

    title: str
    form: Form
    log: bool = False
    ticks: Sequence[float] | None = None
    limits: tuple[float | None, float | None] | None = None
    base: int = 10


@dataclass(frozen=True)
class Series:
    """One contestant's line."""

    index: int
    """Of the contestant."""
    points: list[tuple[float, Spread]]
    missing: list[tuple[float, str]] = field(default_factory=list)
    """Where nothing could be measured, and the mark that says why."""
    ringed: float | None = None
    """The x of a point with a ring."""


def lines(
    name: str,
    description: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    band: bool = False,
    missing_at: float = 0.97,
    levels: Levels | None = None,
    crossings: Sequence[tuple[str, float]] = (),
) -> Markup:
    """A line for each contestant.

    Args:
        name: Of the chart, see `svg`.
        description: For those who do not see it.
        x: The axis of the points' first value.
        y: That of their spread.
        series: The lines.
        band: The spread as a band, for lines of many points; otherwise as bars.
        missing_at: The height at which it is shown that nothing could be measured, as a share of the chart's.
        levels: Lines of no contestant, by name.
        crossings: Vertical lines, each with its number.
    """
    with canvas() as (figure, axes):
        _scale(axes, x, y)
        for one in series:
            _line(axes, one, band)
        _missing(axes, series, missing_at)
        _levels(axes, levels or {})
        for number, place in crossings:
            axes.axvline(place, color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
            axes.annotate(
                number, (place, 1), (0, 2), axes.get_xaxis_transform(), "offset points", ha="center", size=8, color=INK
            )
        return svg(figure, name, description)


def points(
    name: str,
    description: str,
    x: Axis,
    y: Axis,
    places: Sequence[tuple[int, str, float, Spread]],
    levels: Levels | None = None,
) -> Markup:
    """A point for each contestant: its index, its label, where it stands, and the spread of its height."""
    with canvas() as (figure, axes):
        _scale(axes, x, y)
        for index, _, across, up in places:
            _line(axes, Series(index, [(across, up)]), False)
        _levels(axes, levels or {})
        axes.margins(0.12)
        _name(axes, [(label, across, up.median) for _, label, across, up in places])
        return svg(figure, name, description)


def heat(
    name: str,
    description: str,
    x_title: str,
    y_title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Mapping[tuple[int, int], tuple[float, str]],
) -> Markup:
    """A map of shares from 0 to 1.

    Args:
        name: Of the chart, see `svg`.
        description: For those who do not see it.
        x_title: What the columns are.
        y_title: What the rows are.
        columns: Their names.
        rows: Theirs, from the top.
        values: By row and column: the share, and the line below it.
    """
    width = max(2.2, LEFT + RIGHT + CELL_WIDTH * len(columns))
    with canvas(width, ABOVE + BELOW + CELL_HEIGHT * len(rows)) as (figure, axes):
        grid = np.full((len(rows), len(columns)), np.nan)
        for place, (value, _) in values.items():
            grid[place] = value
        axes.grid(visible=False)
        axes.pcolormesh(np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
        for (row, column), (value, below) in values.items():
            ink = "#ffffff" if value < 0.55 else "#000001"  # matplotlib writes no colour where it is black
            lift = 0.12 if below else 0.0
            axes.text(column + 0.5, row + 0.5 - lift, _share(value), ha="center", va="center", size=8, color=ink)
            if below:
                axes.text(column + 0.5, row + 0.78, below, ha="center", va="center", size=5.5, color=ink)
        axes.set(xticks=np.arange(len(columns)) + 0.5, yticks=np.arange(len(rows)) + 0.5)
        axes.set_xticklabels(columns)
        axes.set_yticklabels(rows)
        axes.set(xlabel=x_title, ylabel=y_title)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        return svg(figure, name, description)


def thinned(ticks: Sequence[float]) -> list[float]:
    """The ticks of a logarithmic axis that have room for a label."""
    kept: list[float] = []
    for tick in sorted(set(ticks)):
        if not kept or tick / kept[-1] >= _CLOSE:
            kept.append(tick)
    return kept[:: math.ceil(len(kept) / MOST_TICKS)] if kept else kept


def _share(value: float) -> str:
    text = f"{value:.2f}"
    return text.lstrip("0") if value < 1 and text != "1.00" else "1"


class _LogTicks(Locator):
    """Round numbers on a logarithmic axis: as many as have room, also where it spans less than a decade."""

    _STEPS: ClassVar = {
        10: ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)),
        2: ((1,), (1, 1.5)),
    }
    _FEWEST = 4

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self) -> list[float]:
        """The ticks of the axis that this is the locator of."""
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """The ticks between two numbers."""
        powers = range(math.floor(math.log(vmin, self.base)), math.ceil(math.log(vmax, self.base)) + 1)
        ticks: list[float] = []
        for steps in self._STEPS[self.base]:
            places = (step * float(self.base) ** power for power in powers for step in steps)
            ticks = [place for place in places if vmin <= place <= vmax]
            if len(ticks) >= self._FEWEST:
                break
        return ticks[:: math.ceil(len(ticks) / MOST_TICKS)] if ticks else ticks


def _levels(axes: Axes, levels: Levels) -> None:
    style: dict[str, Any] = {"color": FAINT, "linewidth": 0.9, "linestyle": (0, (2, 2)), "zorder": 1}
    for label, level in levels.items():
        if isinstance(level, Mapping):
            places = sorted(level)
            axes.plot(places, [level[place] for place in places], **style)
            end, across = (places[-1], level[places[-1]]), axes.transData
        else:
            axes.axhline(level, **style)
            end, across = (1, level), axes.get_yaxis_transform()
        axes.annotate(label, end, (0, 2), across, "offset points", ha="right", size=7.5, color=FAINT)


def _scale(axes: Axes, x: Axis, y: Axis) -> None:
    for axis, setting, which in ((axes.xaxis, x, "x"), (axes.yaxis, y, "y")):
        if setting.log:
            getattr(axes, f"set_{which}scale")("log")
            axis.set_minor_locator(NullLocator())
        if setting.ticks is not None:
            axis.set_major_locator(FixedLocator(thinned(setting.ticks) if setting.log else list(setting.ticks)))
        elif setting.log:
            axis.set_major_locator(_LogTicks(setting.base))
        else:
            axis.set_major_locator(MaxNLocator(MOST_TICKS - 1, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _, form=setting.form: form(value)))
        if setting.limits is not None:
            getattr(axes, f"set_{which}lim")(*setting.limits)
    axes.set(xlabel=x.title, ylabel=y.title)


def _line(axes: Axes, one: Series, band: bool) -> None:
    if not one.points:
        return
    look = Look(one.index)
    across = [place for place, _ in one.points]
    middle = [value.median for _, value in one.points]
    low, high = [value.low for _, value in one.points], [value.high for _, value in one.points]
    gid = f"series-{one.index}-"
    if band:
        axes.fill_between(across, low, high, color=look.colour, alpha=0.16, linewidth=0, gid=gid, zorder=2)
    else:
        axes.vlines(across, low, high, color=look.colour, linewidth=1.2, gid=gid, zorder=2)
    every = max(1, math.ceil(len(across) / MOST_TICKS)) if band else 1
    # A marker on some of many points, begun at another one for each contestant, so that they do not hide each other.
    axes.plot(across, middle, **look.line(), markevery=(one.index % every, every), zorder=3)
    for place, value in one.points:
        if place == one.ringed:
            axes.plot(
                [place],
                [value.median],
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=look.colour,
                gid=gid,
                zorder=4,
            )


def _missing(axes: Axes, series: Sequence[Series], height: float) -> None:
    """Marks at the edge of the chart, above each other where several contestants share a place."""
    taken: dict[float, int] = {}
    inwards = -0.07 if height > 0.5 else 0.07
    for one in series:
        for place, mark in one.missing:
            step = taken[place] = taken.get(place, -1) + 1
            look = Look(one.index)
            axes.plot(
                [place],
                [height + inwards * step],
                marker=mark,
                markersize=6.5,
                markeredgewidth=2,
                color=look.colour,
                linestyle="none",
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                gid=f"series-{one.index}-",
            )


def _name(axes: Axes, names: Sequence[tuple[str, float, float]]) -> None:
    """Writes each label beside its point, where it hides no other label and no point."""
    axes.autoscale_view()
    pixels = axes.figure.dpi / 72  # per point
    frame = axes.get_window_extent()
    spots = [axes.transData.transform((x, y)) for _, x, y in names]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for (label, across, up), (x, y) in zip(names, spots, strict=True):
        note = axes.annotate(label, (across, up), (0, 0), textcoords="offset points", va="center", size=8)
        box = note.get_window_extent()
        cheapest = math.inf
        for (align, side, dx), dy in itertools.product(_SIDES, (0, 10, -10, 20, -20, 30)):
            if dx == dy == 0:
                continue
            left, bottom = x + dx * pixels - side * box.width, y + dy * pixels - box.height / 2
            right, top = left + box.width, bottom + box.height
            hidden = sum(
                max(0.0, min(right, e) - max(left, w)) * max(0.0, min(top, n) - max(bottom, s)) for w, s, e, n in taken
            )
            out = max(0.0, frame.x0 - left, frame.y0 - bottom, right - frame.x1, top - frame.y1)
            cost = hidden + 100 * out + abs(dy) + 0.1 * abs(dx)
            if cost < cheapest:
                cheapest, best = cost, (left, bottom, right, top)
                note.set(position=(dx, dy), ha=align)
        taken.append(best)
