"""How charts look: one colour, marker and dash for each contestant everywhere, and ink that follows the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#f0e442")
"""Of Okabe and Ito, whose colours all kinds of colour vision tell apart; grey stands for their black, which is the
ink, and yellow, which is faint on white, comes last. The page sets them anew for dark and light (`--series-0`...)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4)), (0, (9, 2)))
INK, FAINT, GRID, PAPER = "#1b1b1a", "#6e6e6d", "#dcdcdb", "#fefefd"
"""Told apart from each other and from the palette, so that each can be replaced by a variable of the page."""
_VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", GRID: "var(--grid)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(PALETTE)
}
WIDTH, HEIGHT = 4.7, 3.2
"""Inches, of 72 units of the picture: about a phone's width."""
LEFT, RIGHT, ABOVE, BELOW = 0.8, 0.1, 0.2, 0.48
"""Inches around what is drawn."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zoo",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "mathtext.default": "regular",
}


@dataclass(frozen=True)
class Look:
    """How a contestant is drawn."""

    index: int

    @property
    def colour(self) -> str:
        """One of the palette; the ninth contestant begins anew, with hollow markers and other dashes."""
        return PALETTE[self.index % len(PALETTE)]

    @property
    def hollow(self) -> bool:
        """Whether its marker is only an outline."""
        return self.index // len(PALETTE) % 2 == 1

    @property
    def marker(self) -> str:
        """Its marker; a second round through the palette moves on by one."""
        return MARKERS[(self.index + self.index // len(PALETTE)) % len(MARKERS)]

    @property
    def dash(self) -> Any:
        """Its dashes, in matplotlib's words."""
        return DASHES[self.index % len(DASHES)]

    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {"color": self.colour, "linestyle": self.dash, **self.points()}

    def points(self) -> dict[str, Any]:
        """Those of the marker alone."""
        face = PAPER if self.hollow else self.colour
        return {
            "marker": self.marker,
            "markerfacecolor": face,
            "markeredgecolor": self.colour,
            "gid": f"series-{self.index}-",
        }


@contextmanager
def canvas(width: float = WIDTH, height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """An empty chart in the style of the report."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        # The same margins for all, so that charts beside each other line up; a layout engine would draw each twice.
        inner = (1 - (LEFT + RIGHT) / width, 1 - (ABOVE + BELOW) / height)
        yield figure, figure.add_axes((LEFT / width, BELOW / height, *inner))


def svg(figure: Figure, name: str, description: str) -> Markup:
    """The chart as an element of a page.

    Args:
        figure: The chart.
        name: Unlike that of any other chart of the page: the ids in it begin so.
        description: For those who do not see it.
    """
    file = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'font-family: [^;"]*; ?| transform="rotate\(-0 [^"]*"|<!--.*?-->', "", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r'id="series-(\d+)-[^"]*"', r'class="series series-\1"', text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view
    head = f'<svg {view[0]} role="img" aria-label="{escape(description)}">'
    return Markup(head + text[text.index(">") + 1 :].strip())  # matplotlib has escaped the texts in it


def swatch(look: Look) -> Markup:
    """What a legend shows: the line of a contestant, with its marker, as a symbol of the page."""
    style = MarkerStyle(look.marker)
    outline = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons(closed_only=False)[0])
    points = " ".join(f"{14 + 8 * x:.2f},{7 - 8 * y:.2f}" for x, y in outline)
    dashes = "" if look.dash == "-" else " ".join(f"{1.6 * part:g}" for part in look.dash[1])
    colour = _VARIABLES[look.colour]
    face = _VARIABLES[PAPER] if look.hollow else colour
    return Markup(
        f'<symbol id="key-{look.index}" viewBox="0 0 28 14"><path d="M0 7H28" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dashes}"/><polygon points="{points}" fill="{face}" stroke="{colour}" '
        f'stroke-width="1.4"/></symbol>'
    )
