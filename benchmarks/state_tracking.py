"""Who can carry a state: parity and the word problem over A5, at lengths seen in training and beyond.

Every architecture gets the same batches, two blocks and the same time; a run stops when it solves every length.

    python benchmarks/state_tracking.py --minutes 5      # writes benchmarks/results/state_tracking.json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="of training per run")
    parser.add_argument("--arch", nargs="*", default=["rwkv7", "mamba", "transformer"])
    parser.add_argument("--task", nargs="*", default=["parity", "word"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "state_tracking.json")
    parser.add_argument("more", nargs="*", help="further settings of zoo.train, such as optim.lr=1e-3")
    args = parser.parse_args()
    rows: list[dict] = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for task in args.task:
        for arch in args.arch:
            words = [f"arch={arch}", f"data={task}", f"trainer.max_minutes={args.minutes:g}", "trainer.stop_at=0.999"]
            row = {"arch": arch, "task": task} | run([*words, *args.more], "acc", quiet=True)
            rows = [old for old in rows if old["command"] != row["command"]] + [row]
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps({"machine": machine_info(), "runs": rows}, indent=2) + "\n")
            print(f"{arch} on {task}: {row['test']:.3f} {row['slices']}", flush=True)
    table = Table("task", "architecture", "test accuracy", "by length", "steps", "seconds")
    for row in rows:
        slices = "  ".join(f"{name.rpartition('=')[2]}: {value:.3f}" for name, value in row["slices"].items())
        table.add_row(
            row["task"], row["arch"], f"{row['test']:.3f}", slices, f"{row['steps']:,}", f"{row['seconds']:.0f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
