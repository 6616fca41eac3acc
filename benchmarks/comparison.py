"""Every registered architecture head to head, on recall and on text, three learning rates and two seeds each.

    python benchmarks/comparison.py mqar          # `python -m zoo.compare`: trains what comparisons/mqar-params lacks
    python benchmarks/comparison.py pystdlib      # 300 steps of 8,192 bytes for each run

It copies the tables, the figures of speed and the report to benchmarks/results/comparison-<data>/, and draws two of the
report's charts, as the report shows them, into chart.png there (needs playwright and Chromium).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
FILES = ("report.html", "report.md", "results.csv", "bench.json", "comparison.json")
SPEED = "Training: tokens per second"
CHARTS = {"mqar": ("Learning curves", SPEED), "pystdlib": ("against bytes of state after 65,536 tokens", SPEED)}
"""In the headings of those that are drawn."""
WORDS = {"mqar": [], "pystdlib": ["data=pystdlib", "trainer.max_steps=300", "trainer.val_every=50"]}
WIDTH, SCALE = 1080, 1.5
KEEP = """titles => {
    const wanted = [...document.querySelectorAll("figure")]
        .filter(one => titles.some(title => one.querySelector("h3").textContent.includes(title)));
    const grid = document.createElement("div");
    grid.className = "charts";
    grid.append(...wanted);
    document.body.replaceChildren(document.body.querySelector("svg"), grid);
    grid.style.margin = "0";
    document.body.style.padding = "16px";
    return wanted.length;
}"""
"""Leaves nothing of the page but those."""


def draw(report: Path, charts: tuple[str, ...], out: Path) -> None:
    """A picture of some charts."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 300}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(report.resolve().as_uri())
        found = page.evaluate(KEEP, list(charts))
        if found != len(charts):
            raise SystemExit(f"{report} has {found} of the charts {', '.join(charts)}")
        page.screenshot(path=out, full_page=True)
        browser.close()


def main() -> None:
    """Compares, copies, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=CHARTS)
    data = parser.parse_args().data
    subprocess.run([sys.executable, "-m", "zoo.compare", *WORDS[data]], check=True)
    folder, out = Path("comparisons") / f"{data}-params", HERE / "results" / f"comparison-{data}"
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(folder / name, out / name)
    draw(out / "report.html", CHARTS[data], out / "chart.png")


if __name__ == "__main__":
    main()
