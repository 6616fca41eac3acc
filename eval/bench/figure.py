"""The picture of `zoo bench`: time per token and memory against length, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
"""From the palette of Okabe and Ito, whose colours all kinds of colour vision tell apart."""
MARKERS, LINES = ("o", "s", "^", "D"), ("-", "--", ":", "-.")
TITLES = {"train": "training step", "prefill": "prefill", "decode": "decoding"}
MIB = 2**20


def draw(rows: Sequence[dict[str, Any]], crossovers: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes the figure: a column for each kind of call, time above memory; the suffix of `out` names the format."""
    labels, kinds = list(dict.fromkeys(row["label"] for row in rows)), list(dict.fromkeys(row["kind"] for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds) + 2.2, 7), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    for column, kind in enumerate(kinds):
        for axes, quantity in zip(grid[:, column], ("time", "memory"), strict=True):
            for i, label in enumerate(labels):
                own = [row for row in rows if (row["label"], row["kind"]) == (label, kind)]
                _series(axes, own, quantity, i)
            for crossover in crossovers:
                if (crossover["kind"], crossover["quantity"]) == (kind, quantity) and crossover["measured"]:
                    axes.axvline(crossover["from_length"], color="#999999", linewidth=0.6, linestyle=":")
            _frame(axes, sorted({row["length"] for row in rows}))
        grid[0, column].set_title(TITLES[kind], fontsize=11)
        grid[1, column].set_xlabel("tokens read before" if kind == "decode" else "tokens of a sequence", fontsize=9)
    grid[0, 0].set_ylabel("microseconds per token", fontsize=9)
    grid[1, 0].set_ylabel("MiB beyond weights", fontsize=9)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=9, frameon=False)
    note = "x: the next length ran out of memory or time.  Dotted: where one overtakes another, measured."
    figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(out)


def _series(axes: Axes, rows: Sequence[dict[str, Any]], quantity: str, number: int) -> None:
    """One model: the median and, of times, the spread."""
    colour = COLOURS[number % len(COLOURS)]
    done = [row for row in rows if row["status"] == "ok"]
    lengths = [row["length"] for row in done]
    if quantity == "time":
        unit = [1e6 / (row["tokens_per_second"] * row["seconds"]["median"]) for row in done]  # of one call's seconds
        low, values, high = (
            [u * row["seconds"][key] for u, row in zip(unit, done, strict=True)] for key in ("min", "median", "max")
        )
        axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        values = [max(row["peak_memory_bytes"], 1) / MIB for row in done]
    style = LINES[number // len(COLOURS) % len(LINES)] + MARKERS[number % len(MARKERS)]
    label = rows[0]["label"] if rows else None
    axes.plot(lengths, values, style, color=colour, label=label, linewidth=1.4, markersize=4)
    if done and len(done) < len(rows):
        axes.plot(lengths[-1:], values[-1:], "x", color=colour, markersize=10, markeredgewidth=2)


def _frame(axes: Axes, lengths: Sequence[int]) -> None:
    if not any(len(line.get_path()) for line in axes.lines):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing could be measured", transform=axes.transAxes, ha="center", fontsize=9)
        return
    axes.set(xscale="log", yscale="log", xticks=lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
