"""What a user gets from the front door: each command as a whole process, its time from import to exit, its result.

Run it as `python benchmarks/learning.py`; with `--only arch=longformer` it runs these commands again and keeps the
others. It writes benchmarks/results/learning.json.
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
PLAN = [f"arch={arch} data=mqar" for arch in ("mamba", "transformer", "longformer", "bigbird")]
PLAN += [f"arch={arch} data=pystdlib" for arch in ("mamba", "transformer", "longformer", "bigbird")]
PLAN += [f"arch={arch} data=listops objective=classify" for arch in ("longformer", "mamba", "transformer")]


def main() -> None:
    """Runs the commands one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="time limit of the runs on text and on listops")
    parser.add_argument("--only", default="", help="run the commands that have this in them")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning.json")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["runs"] if args.only and args.out.exists() else []
    for words in (words for words in PLAN if args.only in words):
        limit = [f"trainer.max_minutes={args.minutes:g}"] if args.minutes and "data=mqar" not in words else []
        row = run([*words.split(), *limit], "bits_per_byte" if "data=pystdlib" in words else "acc")
        row["git_commit"] = machine_info()["git_commit"]
        rows = [old for old in rows if words not in old["command"]] + [row]
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine_info(), "runs": rows}, indent=2) + "\n")
    table = Table("command", "test", "seconds, import to exit", "steps", "tokens/s", "peak MiB", "batch hash")
    for row in rows:
        table.add_row(
            row["command"],
            f"{row['metric']} {row['test']:.4f}",
            f"{row['seconds']:.0f}",
            f"{row['steps']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            row["batch_hash"][:8],
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
