"""Which learning rates let an architecture learn recall: MQAR over a grid of rates, same batches, whole processes.

Recurrences leave the plateau of recall only in a narrow window of rates (arXiv 2508.19029), so a comparison at one rate
ranks luck. A run stops when its validation accuracy passes .995.

    python benchmarks/learning_rates.py                  # writes benchmarks/results/learning_rates.json
    python benchmarks/learning_rates.py --arch rwkv7     # measures these rows again, keeps the others
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
ARCHITECTURES = ["transformer", "mamba", "mamba2", "rwkv4", "rwkv7", "hybrid"]
RATES = [1e-3, 2e-3, 5e-3]


def train(arch: str, rate: float, more: list[str]) -> dict:
    """One run, and the first validation that passes .9."""
    row = run([f"arch={arch}", f"optim.lr={rate:g}", "trainer.stop_at=0.995", *more], "acc", quiet=True)
    steps_to_90 = next((step for step, accuracy in row["validation"] if accuracy >= 0.9), None)
    return {"arch": arch, "lr": rate, "steps_to_90": steps_to_90} | row


def show(rows: list[dict]) -> None:
    rates = sorted({row["lr"] for row in rows})
    table = Table("architecture", *(f"lr {rate:g}" for rate in rates), title="MQAR: test accuracy (steps to .9)")
    for arch in dict.fromkeys(row["arch"] for row in rows):
        cells = {row["lr"]: row for row in rows if row["arch"] == arch}
        table.add_row(arch, *(_cell(cells[rate]) if rate in cells else "" for rate in rates))
    Console(width=120).print(table)


def _cell(row: dict) -> str:
    return f"{row['test']:.3f} ({'never' if row['steps_to_90'] is None else row['steps_to_90']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--lr", nargs="*", type=float, default=RATES)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "learning_rates.json")
    parser.add_argument("more", nargs="*", help="further settings of zoo.train, such as trainer.max_steps=2000")
    args = parser.parse_args()
    rows: list[dict] = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for rate in args.lr:
        for arch in args.arch:
            row = train(arch, rate, args.more)
            rows = [old for old in rows if (old["arch"], old["lr"]) != (arch, rate)] + [row]
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps({"machine": machine_info(), "runs": rows}, indent=2) + "\n")
            print(f"{arch} lr {rate:g}: {_cell(row)} in {row['seconds']:.0f} s", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
