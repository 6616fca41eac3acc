"""The figure of `zoo masks`: a row of panels per layer, in each what the heads of one kind see."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from zoo.sight import GLOBAL_KEY, GLOBAL_QUERY, NEAR, RANDOM, REPEATED, UNSEEN, Sight

COLOURS = {
    UNSEEN: ("#f4f4f4", "not seen"),
    NEAR: ("#0072b2", "near (window)"),
    GLOBAL_KEY: ("#e69f00", "global key"),
    GLOBAL_QUERY: ("#009e73", "global query"),
    RANDOM: ("#cc79a7", "random block"),
    REPEATED: ("#000000", "counted more than once"),
}
"""From the palette of Okabe and Ito, whose colours all kinds of colour vision tell apart."""

DPI = 120
PER_ROW = 4
"""Panels."""
SIDE, NARROWEST = 288, 470
LEFT, BETWEEN, RIGHT = 64, 44, 32
ABOVE, BELOW = 70, 52
TITLE_LINE, LEGEND_LINE, LEGEND_ENTRY = 24, 22, 170
CHARACTER = 11
"""Pixels. The side of a panel is about `SIDE`, so that each pair is a whole number of them."""


def draw(sights: Sequence[Sight], name: str, subject: str, documents: Sequence[int] | None, out: Path) -> None:
    """Writes the figure.

    Args:
        sights: Of each layer to draw.
        name: The architecture.
        subject: Its settings, for the title.
        documents: Lengths of the packed documents; None: one.
        out: The file; its suffix names the format.
    """
    length = sights[0].weights.shape[-1]
    side = max(1, SIDE // length) * length
    rows = _rows(sights)
    width = max(LEFT + RIGHT - BETWEEN + max(map(len, rows)) * (side + BETWEEN), NARROWEST)
    title = textwrap.wrap(f"{name}  {subject}".strip(), int((width - LEFT) / CHARACTER))
    shown = [kind for kind in COLOURS if any(bool((sight.kinds == kind).any()) for sight in sights)]
    lines = math.ceil(len(shown) / (width // LEGEND_ENTRY))
    columns = math.ceil(len(shown) / lines)
    top = 12 + len(title) * TITLE_LINE
    row_height = ABOVE + side + BELOW
    height = top + len(rows) * row_height + lines * LEGEND_LINE + 10

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for i, line in enumerate(title):
        y = 1 - (10 + i * TITLE_LINE) / height
        figure.text(16 / width, y, line, fontsize=10, fontweight="bold", va="top")
    for i, row in enumerate(rows):
        bottom = height - top - i * row_height - ABOVE - side
        for j, (sight, heads) in enumerate(row):
            left = LEFT + j * (side + BETWEEN)
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            _panel(axes, sight, heads, documents or [length])
            if j == 0:
                axes.set_ylabel("query", fontsize=8)
    full = all(sight.is_full() for sight in sights)
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", label="seen" if full and kind == NEAR else label)
        for kind, (colour, label) in COLOURS.items()
        if kind in shown
    ]
    figure.legend(handles=handles, loc="lower center", ncol=columns, fontsize=8, frameon=False, borderaxespad=0.2)
    if out.suffix == ".png":  # the version of the library would make each release's file another one
        figure.savefig(out, metadata={"Software": None}, pil_kwargs={"optimize": True})
    else:
        figure.savefig(out)


def _rows(sights: Sequence[Sight]) -> list[list[tuple[Sight, list[int]]]]:
    """The panels, with those of one layer in rows of their own unless no layer has several."""
    panels = [[(sight, heads) for heads in sight.distinct_heads()] for sight in sights]
    if max(map(len, panels)) == 1:
        panels = [[panel for layer in panels for panel in layer]]
    return [layer[i : i + PER_ROW] for layer in panels for i in range(0, len(layer), PER_ROW)]


def _panel(axes: Axes, sight: Sight, heads: list[int], documents: Sequence[int]) -> None:
    head, length = heads[0], sight.weights.shape[-1]
    colours = ListedColormap([COLOURS[kind][0] for kind in sorted(COLOURS)])
    edges = (-0.5, length - 0.5)
    axes.imshow(
        sight.kinds[head].numpy(), cmap=colours, vmin=UNSEEN, vmax=REPEATED, interpolation="nearest", aspect="auto"
    )
    if SIDE // length >= 4 and sight.block == 1:
        axes.hlines(np.arange(0.5, length - 1), *edges, colors="white", linewidth=0.4)
        axes.vlines(np.arange(0.5, length - 1), *edges, colors="white", linewidth=0.4)
    starts = [0, *itertools.accumulate(documents)]
    if sight.block > 1:
        blocks = [at - 0.5 for start, stop in itertools.pairwise(starts) for at in range(start, stop, sight.block)]
        axes.hlines(blocks, *edges, colors="#555555", linewidth=0.6)
        axes.vlines(blocks, *edges, colors="#555555", linewidth=0.6)
    between = [start - 0.5 for start in starts[1:-1]]
    axes.hlines(between, *edges, colors="black", linewidth=1.2, linestyles="dashed")
    axes.vlines(between, *edges, colors="black", linewidth=1.2, linestyles="dashed")
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if length / step <= 9)
    axes.set(xlim=edges, ylim=edges[::-1], xticks=range(0, length, step), yticks=range(0, length, step))
    axes.tick_params(labelsize=8, length=3)
    axes.set_xlabel("key", fontsize=8)
    axes.set_title(_caption(sight, heads), fontsize=8, loc="left", linespacing=1.3)


def _caption(sight: Sight, heads: list[int]) -> str:
    n_heads, length, _ = sight.weights.shape
    which = "all heads" if len(heads) == n_heads else f"head{'s' * (len(heads) > 1)} {_ranges(heads)}"
    back, ahead = sight.reach(heads[0])
    window = "no window" if sight.is_full() else f"window: {back} back"
    if sight.kept is None:
        window += "" if sight.is_full() else f", {ahead} ahead"
        kept, pairs = "no decoding state", "all pairs"
    else:
        kept, pairs = f"keeps {sight.kept} of {length} keys", "the causal pairs"
    return f"layer {sight.layer}, {which}\n{window}; {kept}\nsees {100 * sight.share(heads[0]):.3g}% of {pairs}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as '0-2, 5'."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)
