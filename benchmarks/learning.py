"""What a user gets from the front door: each command as a whole process, its time from import to exit, its result.

Run it as `python benchmarks/learning.py`; it writes benchmarks/results/learning.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zoo.eval.measure import machine_info

HERE = Path(__file__).parent
ARCHITECTURES = ("mamba", "transformer")


def command(arch: str, data: str, minutes: float | None) -> list[str]:
    """All defaults, but for a time limit on the text."""
    words = ["-m", "zoo.train", f"arch={arch}", f"data={data}"]
    return [*words, f"trainer.max_minutes={minutes:g}"] if minutes and data != "mqar" else words


def curve(path: Path, column: str) -> list[tuple[int, float]]:
    """(step, value) of each validation."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def main() -> None:
    """Runs the commands one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="time limit of the runs on text")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning.json")
    args = parser.parse_args()
    rows, table = [], Table("command", "test", "seconds, import to exit", "steps", "tokens/s", "peak MiB", "batch hash")
    for data in ("mqar", "pystdlib"):
        metric = "acc" if data == "mqar" else "bits_per_byte"
        for arch in ARCHITECTURES:
            words = command(arch, data, args.minutes)
            with tempfile.TemporaryDirectory() as runs:
                begun = time.perf_counter()
                subprocess.run([sys.executable, *words, f"runs_dir={runs}"], check=True)
                seconds = time.perf_counter() - begun
                (folder,) = Path(runs).iterdir()
                summary = json.loads((folder / "summary.json").read_text())
                validation = curve(folder / "metrics.csv", f"val/{metric}")
            kept = ("params", "steps", "tokens", "tokens_per_second", "peak_memory_bytes", "batch_hash", "backends")
            row = {"command": " ".join(["python", *words]), "seconds": seconds, "metric": metric}
            row |= {"test": summary["metrics"]["test"][metric], "validation": validation}
            row |= {key: summary[key] for key in kept}
            rows.append(row)
            table.add_row(
                row["command"],
                f"{metric} {row['test']:.4f}",
                f"{seconds:.0f}",
                f"{row['steps']:,}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                row["batch_hash"][:8],
            )
            args.out.parent.mkdir(exist_ok=True)
            result = {"machine": machine_info(), "runs": rows}
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
