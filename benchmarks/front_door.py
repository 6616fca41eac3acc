"""Runs `python -m zoo.train` as a user does, a whole process from import to exit, and reads what it wrote."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KEPT = ("params", "steps", "tokens", "tokens_per_second", "wall_seconds", "peak_memory_bytes", "batch_hash", "backends")


def run(words: list[str], metric: str, quiet: bool = False) -> dict[str, Any]:
    """One run.

    Args:
        words: Settings, such as "arch=mamba".
        metric: What is kept of the test and of each validation: "acc", "bits_per_byte".
        quiet: Keeps the run's own output from the terminal.

    Returns:
        The command, its seconds from import to exit, `test` and its slices, `validation` as (step, value), and more of
        the summary.
    """
    command = ["python", "-m", "zoo.train", *words]
    with tempfile.TemporaryDirectory() as runs:
        begun = time.perf_counter()
        arguments = [sys.executable, *command[1:], f"runs_dir={runs}"]
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL if quiet else None)
        seconds = time.perf_counter() - begun
        (folder,) = Path(runs).iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            column = f"val/{metric}"
            validation = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    test = summary["metrics"]["test"]
    slices = {key: value for key, value in test.items() if key.startswith(f"{metric}/")}
    result = {"command": " ".join(command), "seconds": seconds, "metric": metric, "test": test[metric]}
    return result | {"slices": slices, "validation": validation} | {key: summary[key] for key in KEPT}
