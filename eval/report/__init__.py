"""The report of a comparison: `report.html`, one file that needs no network, and the same facts as `report.md`."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from zoo.eval.report import accuracy, fairness, origin, ranking, speed
from zoo.eval.report.answers import answers, lead
from zoo.eval.report.blocks import Section
from zoo.eval.report.canvas import PALETTE, Look, swatch
from zoo.eval.report.reading import read
from zoo.eval.report.results import Comparison
from zoo.kernels.errors import DataError
from zoo.train.folder import replace_text

HTML, MARKDOWN = "report.html", "report.md"
_TEMPLATES = Path(__file__).parent / "templates"
_SECTIONS = (
    ranking.result,
    fairness.section,
    accuracy.slices,
    accuracy.learning,
    accuracy.size,
    speed.speed,
    speed.decoding,
    speed.not_measured,
    origin.origin,
)


def write(folder: str | Path) -> Path:
    """Writes `report.html` and `report.md` into the folder of a comparison, whatever of it has finished.

    Args:
        folder: As `zoo.compare` writes it: `comparison.json`, `results.csv`, `bench.json` if there is one, `runs/`.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: It is no such folder, a file in it is damaged, or the report cannot be written.
    """
    folder = Path(folder)
    comparison = read(folder)
    sections = [section for make in _SECTIONS if (section := make(comparison)) is not None]
    try:
        for name in (MARKDOWN, HTML):
            replace_text(folder / name, _render(name, comparison, sections))
    except OSError as error:
        raise DataError(f"{folder / name} cannot be written ({error.strerror})") from error
    return folder / HTML


def _render(name: str, comparison: Comparison, sections: list[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown
    what = "architectures" if comparison.trained else "models"
    return environment.get_template(name).render(
        comparison=comparison,
        title=f"{len(comparison.contestants)} {what} head to head on {comparison.data}",
        lead=lead(comparison),
        answers=answers(comparison),
        sections=sections,
        labels=[who.label for who in comparison.contestants],
        swatches=[swatch(Look(who.index)) for who in comparison.contestants],
        palette=PALETTE,
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((_TEMPLATES / "script.js").read_text(encoding="utf-8")),
    )


def markdown(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#~" else letter for letter in " ".join(str(text).split()))
