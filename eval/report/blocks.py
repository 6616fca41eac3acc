"""What a report is made of, whatever it is written as: sections of texts, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from zoo.eval.report import words
from zoo.eval.report.spread import Spread


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    warning: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    items: list[str]
    kind: str = "points"


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None
    """What it is sorted by; None: by its text."""
    look: int | None = None
    """The index of the contestant it names; None: it names none."""
    heading: bool = False
    best: bool = False
    note: str = ""
    """Less than the text, such as its spread."""


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    title: str
    note: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows under heads."""

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    folded: bool = False
    """Shown when asked for, because it is long."""
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """A picture with what must be known to read it."""

    title: str
    caption: str
    svg: Markup
    looks: Sequence[int] = ()
    """The contestants in it, for its legend."""


@dataclass(frozen=True)
class Charts:
    """Pictures beside each other."""

    charts: list[Chart]
    kind: str = "charts"


Block = Text | Points | Table | Charts


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A question that people come with, and what the comparison says."""

    question: str
    answer: str
    figure: str
    detail: str
    look: int | None = None
    """The index of the contestant it names first."""


def spread(value: Spread | None, form: words.Form, best: bool = False) -> Cell:
    """A cell with a median and, as its note, the range."""
    if value is None:
        return missing()
    return Cell(form(value.median), value.median, best=best, note=words.span(value, form))


def figure(value: float | None, form: words.Form) -> Cell:
    """A cell with a figure that has no spread."""
    return missing() if value is None else Cell(form(value), value)


def missing(reason: str = "") -> Cell:
    """A cell without a figure."""
    return Cell(reason or words.NONE)
