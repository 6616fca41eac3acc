"""What a user gets from the front door: each command as a whole process, its time from import to exit, its result.

Run it as `python benchmarks/learning.py`; it writes benchmarks/results/learning.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from front_door import run
from rich.console import Console
from rich.table import Table

from zoo.eval.measure import machine_info

HERE = Path(__file__).parent
ARCHITECTURES = ("mamba", "transformer")


def command(arch: str, data: str, minutes: float | None) -> list[str]:
    """All defaults, but for a time limit on the text."""
    words = [f"arch={arch}", f"data={data}"]
    return [*words, f"trainer.max_minutes={minutes:g}"] if minutes and data != "mqar" else words


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
            row = run(command(arch, data, args.minutes), metric)
            rows.append(row)
            table.add_row(
                row["command"],
                f"{metric} {row['test']:.4f}",
                f"{row['seconds']:.0f}",
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
