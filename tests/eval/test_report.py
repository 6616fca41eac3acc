"""The report of a comparison: what it says, what it withholds, and that a browser shows it without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zoo.eval.report import fairness, write
from zoo.eval.report.answers import answers
from zoo.eval.report.canvas import DASHES, MARKERS, PALETTE, Look
from zoo.eval.report.reading import read
from zoo.eval.report.spread import Spread, luck
from zoo.eval.report.words import digits, duration, listing, rate, short, size, span
from zoo.kernels.errors import DataError

from .comparisons import make

TRIO = ("transformer", "mamba", "rwkv4")
NASTY = "<script>alert('x')</script> & | *loss* is \"nan\""
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Page(HTMLParser):
    """The elements of a page, those that are left open, and all that it would fetch."""

    VOID = frozenset({"meta", "link", "br", "input", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def said(folder: Path) -> dict[str, str]:
    """The answers by their question, as one text each."""
    return {one.question: f"{one.answer}: {one.figure}. {one.detail}" for one in answers(read(folder))}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "full"
    failed = [("rwkv4", 1e-2, "failed", NASTY), ("mamba2", None, "out_of_memory", "killed: probably out of memory")]
    make(folder, names=("transformer", "mamba", "mamba2", "rwkv4"), failed=failed, needle_map=True)
    write(folder)
    return folder


def test_page_is_well_formed_and_self_contained(full: Path) -> None:
    text = (full / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert all(str(link).startswith("#") or link == "data:," for link in links)
    assert {link[1:] for link in links if str(link).startswith("#")} <= set(ids)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_everything_is_escaped(full: Path) -> None:
    text = (full / "report.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; | *loss*" in text
    lines = [line for line in (full / "report.md").read_text().splitlines() if "alert" in line]
    assert len(lines) >= 3
    assert all(r"\<script\>alert('x')\</script\> & \| \*loss\*" in line for line in lines)


def test_markdown_has_whole_tables(full: Path) -> None:
    lines = (full / "report.md").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if re.fullmatch(r"\|(-+:?\|)+", line)]
    assert len(heads) > 10
    for i in heads:
        width = lines[i].count("|")
        rows = [lines[i - 1], *lines[i + 1 : lines.index("", i) if "" in lines[i:] else None]]
        assert len(rows) > 1
        assert all(len(re.findall(r"(?<!\\)\|", row)) == width for row in rows)


def test_lost_cells_are_rows_with_their_reason(full: Path) -> None:
    rows = [line for line in (full / "report.md").read_text().splitlines() if line.startswith("| mamba2")]
    assert "no result (killed: probably out of memory)" in rows[0]
    assert "0 of 9" in rows[0]
    assert rows[1] == "| mamba2 | out of memory (killed: probably out of memory) | 9 | 1e-3, 3e-3, 1e-2 | 0, 1, 2 | "
    assert sum("| 3e-3 |" in row for row in rows[2:]) == 3  # among all cells
    assert "12 cells of 36 gave no result" in said(full)["How sure are we?"]


def test_answers(full: Path) -> None:
    told = said(full)
    assert told["Which is most accurate?"].startswith("transformer")
    assert "over 3 seeds" in told["Which is most accurate?"]
    assert told["Which has the smallest state?"].startswith("mamba: 58.6 KiB")
    assert (
        "at 512 tokens (of the lengths measured the nearest to the task's 256)"
        in told["Which trains fastest at this length?"]
    )
    assert "after 32,768 tokens" in told["Which writes fastest after a long text?"]
    assert "2 of 20 cases" in told["How sure are we?"]


def test_overlap_is_called_a_tie(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO, bench=False, runs=False)
    table = (folder / "results.csv").read_text().splitlines()
    column = table[0].split(",").index("test_acc")
    values = {"transformer": (0.90, 0.95, 0.99), "mamba": (0.91, 0.96, 0.985), "rwkv4": (0.5, 0.6, 0.7)}
    for i, line in enumerate(table[1:], start=1):
        cells = line.split(",")
        cells[column] = str(values[cells[0]][int(cells[3])])
        table[i] = ",".join(cells)
    (folder / "results.csv").write_text("\n".join(table))
    told = said(folder)
    assert told["Which is most accurate?"].startswith("mamba, level with transformer: 0.960 (0.910 to 0.985)")
    assert (
        "Not told apart from it, as their ranges overlap: transformer 0.950 (0.900 to 0.990)"
        in told["Which is most accurate?"]
    )
    assert told["How sure are we?"].startswith("2 of 3 pairs apart")


def test_one_seed_claims_no_spread(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO, seeds=(7,), bench=False)
    assert "Not very: one seed" in said(folder)["How sure are we?"]
    text = write(folder).read_text()
    assert "One seed, so no spread is known." in text
    assert "Median over seeds" not in text


def test_below_the_plateau_nobody_has_learnt(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO, bench=False, runs=False)
    edit(folder, data={"name": "mqar", "levels": {"chance": 0.1, "plateau": 0.9999}})
    told = said(folder)["Which is most accurate?"]
    assert "Even the best seed of all is below plateau (1.000): nobody has learnt this task." in told
    assert "chance" not in told


def test_bits_per_byte_are_better_when_small(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO, metric="bits_per_byte", slices=False)
    comparison = read(folder)
    assert [who.label for who, _ in comparison.ranking] == ["transformer", "mamba", "rwkv4"]
    told = said(folder)
    assert told["Which has the best bits per byte?"].startswith("transformer")
    assert "Which needs the fewest steps?" not in told
    text = write(folder).read_text()
    assert 'id="slices"' not in text
    assert "solved" not in text


@pytest.mark.parametrize("left", ["nothing", "rows", "kinds"])
def test_missing_or_partial_bench(tmp_path: Path, left: str) -> None:
    folder = make(tmp_path / "c", names=TRIO, bench=left != "nothing", slices=False, runs=False)
    if left != "nothing":
        bench = json.loads((folder / "bench.json").read_text())
        rows = [row for row in bench["rows"] if row["kind"] == "train"] if left == "kinds" else []
        (folder / "bench.json").write_text(json.dumps({"rows": rows}))
    text, told = write(folder).read_text(), said(folder)
    if left == "kinds":
        assert 'id="speed"' in text
        assert 'id="decoding"' not in text
    else:
        assert "were not measured" in text
        assert "of the training runs themselves" in told["Which trains fastest at this length?"]


def test_what_cannot_be_measured_is_said(full: Path) -> None:
    text = (full / "report.html").read_text()
    assert "× Out of memory: transformer from 16,384 on." in text
    assert "+ Too slow to measure: rwkv4 from 32,768 on." in text
    assert "(1) from T = 1,536 on, mamba trains faster than transformer on this machine" in text


def test_same_batches(full: Path) -> None:
    assert [(one.seed, one.after, one.equal) for one in fairness.same_batches(read(full))] == [
        ("0", None, True),
        ("1", None, True),
        ("2", None, True),
    ]
    assert "proven by a hash over all of them" in (full / "report.md").read_text()


def test_batches_of_runs_that_ended_early(tmp_path: Path) -> None:
    """Their whole hashes differ; the books after 1, 2, 4, ... batches tell."""
    folder = make(tmp_path / "c", names=TRIO, seeds=(0,), lrs=(1e-3,), bench=False, other_batches="mamba")
    (same,) = fairness.same_batches(read(folder))
    assert (same.after, same.equal) == (1024, True)
    summary = folder / "runs" / "mamba-lr0.001-s0" / "summary.json"
    hashes = json.loads(summary.read_text())
    del hashes["batch_hash_after"]["1024"]
    summary.write_text(json.dumps(hashes))
    assert fairness.same_batches(read(folder))[0].after == 512
    hashes["batch_hash_after"]["512"] = "another"
    summary.write_text(json.dumps(hashes))
    assert fairness.same_batches(read(folder))[0].equal is False
    assert "Not fair: with seed 0" in write(folder).read_text()


def test_a_rate_at_the_edge_of_its_grid_is_named(full: Path, tmp_path: Path) -> None:
    assert "At the edge" not in (full / "report.md").read_text()
    folder = make(tmp_path / "c", names=TRIO[:2], bench=False, runs=False, slices=False)
    table = (folder / "results.csv").read_text().replace(",finished,,1,", ",finished,,0,")
    (folder / "results.csv").write_text(
        table.replace("mamba,mamba,0.01,0,finished,,0,", "mamba,mamba,0.01,0,finished,,1,")
    )
    write(folder)
    text = (folder / "report.md").read_text()
    assert "so that another may suit it better: mamba (largest)." in text
    assert "A run ended after 2,000 steps or at a validation accuracy of 0.99, whichever came first." in text


def test_a_failed_seed_has_not_solved_the_task(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO[:1], bench=False, runs=False, slices=False, lrs=(1e-3,))
    table = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(table.replace("0.001,2,finished,", "0.001,2,failed,"))
    write(folder)
    assert "| 2 of 3 | 1,100" in (folder / "report.md").read_text()


def test_guessed_crossovers_are_told_but_not_drawn(full: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO[:2], runs=False, slices=False)
    drawn = write(folder).read_text().count(">1</text>")
    bench = json.loads((folder / "bench.json").read_text())
    for entry in bench["crossovers"]:
        entry["measured"] = False
    (folder / "bench.json").write_text(json.dumps(bench))
    text = write(folder).read_text()
    assert text.count(">1</text>") == drawn - 2  # one of training, one of decoding
    assert "(1) from T = 1,536 on" in text


def test_models_of_the_users_own(tmp_path: Path) -> None:
    """Nothing was trained for it: no learning rate, perhaps no seed, and a row per model."""
    folder = make(tmp_path / "c", names=TRIO, seeds=(0,), lrs=(1e-3,), runs=False, match="none")
    table = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(table.replace(",0.001,0,finished,,1,", ",,,finished,,true,"))
    edit(folder, seeds=[], lrs=[])
    text = write(folder).read_text()
    assert "3 models head to head on mqar" in text
    assert "Nothing was trained" in text
    assert 'id="learning"' not in text
    assert "Not very: one seed" in said(folder)["How sure are we?"]


def test_no_folder_of_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no comparison\.json"):
        write(tmp_path)
    folder = make(tmp_path / "c", names=TRIO, bench=False, runs=False)
    (folder / "results.csv").unlink()
    with pytest.raises(DataError, match=r"holds no results\.csv"):
        write(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"metric": {"name": "acc", "higher_is_better": true}, "architectures": [3]}']
)
def test_damaged_comparison(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "c", names=TRIO, bench=False, runs=False)
    (folder / "comparison.json").write_text(text)
    with pytest.raises(DataError) as caught:
        write(folder)
    assert "\n" not in str(caught.value)


def test_strange_rows_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", names=TRIO, bench=False, runs=False)
    edit(folder, architectures=[{"label": "mamba"}])
    with pytest.raises(DataError, match=r"rows of rwkv4, transformer"):
        write(folder)


def test_nobody_finished(tmp_path: Path) -> None:
    failed = [(name, None, "failed", "no luck") for name in TRIO]
    folder = make(tmp_path / "c", names=TRIO, failed=failed, bench=False)
    assert "Nobody finished" in write(folder).read_text()


def test_spread() -> None:
    found = Spread.of([3.0, None, 1.0, 2.0])
    assert found == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([None]) is None
    assert Spread(2.0, 1.0, 4.0, 3).inverse(8.0) == Spread(4.0, 2.0, 8.0, 3)
    assert found.overlaps(Spread(3.0, 3.0, 4.0, 2))
    assert not found.overlaps(Spread(4.0, 3.1, 4.0, 2))
    assert luck(found, found) == 20


def test_words() -> None:
    assert [digits(value) for value in (0, 0.01234, 1.5, 15_221, 2238.9, math.inf)] == [
        "0",
        "0.0123",
        "1.50",
        "15,200",
        "2,240",
        "inf",
    ]
    assert [size(value) for value in (512, 1536, 2**20, 60_000)] == ["512 B", "1.5 KiB", "1 MiB", "58.6 KiB"]
    assert [short(value) for value in (999, 1000, 240_100, 4_096_000)] == ["999", "1k", "240k", "4.1M"]
    assert [duration(value) for value in (2.0, 0.0015, 3e-6)] == ["2 s", "1.5 ms", "3 µs"]
    assert [rate(value) for value in (0.003, 1e-2, 5.5e-4)] == ["3e-3", "1e-2", "5.5e-4"]
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert span(Spread(1.0, 1.0, 1.0, 3), digits) == span(Spread(1.0, 1.0, 1.0, 1), digits) == ""


def test_looks_differ() -> None:
    """Two contestants never share colour and marker, nor, among the first eight, a colour or a marker."""
    looks = [Look(i) for i in range(2 * len(PALETTE))]
    assert len({(look.colour, look.marker, look.hollow) for look in looks}) == len(looks)
    assert len({look.colour for look in looks[:8]}) == len({look.marker for look in looks[:8]}) == 8
    assert len(MARKERS) == len(PALETTE)
    assert math.gcd(len(DASHES), len(PALETTE)) == 1  # so that a colour comes back with other dashes


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        # launch() makes a fresh profile, and removes it
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, full: Path) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on(
        "request", lambda request: page.trouble.append(request.url) if not request.url.startswith("file:") else None
    )
    page.goto((full / "report.html").as_uri())
    yield page
    context.close()
    assert page.trouble == []


def test_sorting_in_a_browser(page: Any) -> None:
    table = page.locator("#result table").first

    def names() -> list[str]:
        return [text.strip() for text in table.locator("tbody th").all_inner_texts()]

    def head(text: str) -> Any:
        return table.locator("thead th").filter(has_text=text)

    head("state at").get_by_role("button").click()
    assert head("state at").get_attribute("aria-sort") == "descending"
    assert names() == ["transformer", "rwkv4", "mamba2", "mamba"]  # 128 MiB before 117 KiB
    head("state at").get_by_role("button").press("Enter")
    assert head("state at").get_attribute("aria-sort") == "ascending"
    assert names() == ["mamba", "mamba2", "rwkv4", "transformer"]
    head("test accuracy").get_by_role("button").click()
    assert names() == ["transformer", "mamba", "rwkv4", "mamba2"]
    head("test accuracy").get_by_role("button").press("Space")
    assert names() == ["rwkv4", "mamba", "transformer", "mamba2"]  # what has no result stays last
    head("architecture").get_by_role("button").click()
    assert names() == ["mamba", "mamba2", "rwkv4", "transformer"]
    assert head("state at").get_attribute("aria-sort") is None


def test_legend_fades_the_others(page: Any) -> None:
    figure = page.locator("#learning figure").first
    figure.locator("[data-series='1']").hover()
    assert figure.locator(".series-0").first.evaluate("mark => getComputedStyle(mark).opacity") != "1"
    assert figure.locator(".series-1").first.evaluate("mark => getComputedStyle(mark).opacity") == "1"


def test_follows_the_reader(page: Any) -> None:
    """Dark and light, and no scrolling sideways on a phone."""
    ink = "() => getComputedStyle(document.querySelector('figure svg text')).fill"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ink)
    assert light != dark
    assert page.evaluate("() => getComputedStyle(document.body).color") == dark
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") == 380
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_reads_without_scripts(browser: Any, full: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((full / "report.html").as_uri())
    assert page.locator("button").count() == 0
    assert "test accuracy" in page.locator("#result table").first.inner_text()
    context.close()
