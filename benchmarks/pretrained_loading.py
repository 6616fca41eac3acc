"""Loading published checkpoints of about 1 GiB: seconds against reading the bytes, and peak memory against their size.

    python benchmarks/pretrained_loading.py          # writes benchmarks/results/pretrained_loading.json

Loading and reading take turns, each time in a process of its own that has imported the zoo and no more, with the files
in the page cache for both. The weights are random; they lie in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import zoo
from zoo.eval.child import Child
from zoo.eval.measure import CPU, machine_info, spread
from zoo.memory import PeakMemory

RESULT = Path(__file__).parent / "results" / "pretrained_loading.json"
LLAMA = {"d_model": 2048, "n_layers": 4, "n_heads": 16, "n_kv_heads": 4, "d_ff": 5632}
CASES: dict[str, tuple[str, dict[str, int], str]] = {
    "llama, one file": ("transformer", LLAMA, "one"),
    "llama, shards": ("transformer", LLAMA, "shards"),
    "llama, pickle": ("transformer", LLAMA, "pickle"),
    "mamba, one file": ("mamba", {"d_model": 2048, "n_layers": 8}, "one"),
}
SHARD_BYTES = 256 << 20


def write(folder: Path, architecture: str, settings: dict[str, int], form: str) -> None:
    """Makes a checkpoint as it is published, in fp32."""
    model = zoo.create_model(architecture, vocab_size=32_000, tie_embeddings=False, **settings)
    limit = SHARD_BYTES if form == "shards" else 1 << 40
    zoo.save_pretrained(model, folder, format="transformers", max_shard_bytes=limit)
    if form == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


def weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def load(folder: Path) -> tuple[float, int]:
    """Seconds, and bytes of memory beyond those of the process before."""
    memory = PeakMemory(CPU)
    memory.reset()
    before, begun = memory.bytes(), time.perf_counter()
    model = zoo.load_pretrained(folder)
    seconds = time.perf_counter() - begun
    assert not any(parameter.is_meta for parameter in model.parameters())
    return seconds, memory.bytes() - before


def read(folder: Path) -> tuple[float, int]:
    """The same for the bytes of the files, which are read into memory and nothing else."""
    begun = time.perf_counter()
    for path in weight_files(folder):
        view, at = memoryview(bytearray(path.stat().st_size)), 0
        with path.open("rb", buffering=0) as file:
            while at < len(view):
                at += file.readinto(view[at:])
    return time.perf_counter() - begun, 0


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Both in turn; the first round only fills the page cache."""
    runs: dict[str, list[tuple[float, int]]] = {"load": [], "read": []}
    for _ in range(rounds + 1):
        for function in (load, read):
            with Child() as child:
                runs[function.__name__].append(child.call(function, folder))
    size = sum(path.stat().st_size for path in weight_files(folder))
    peak = max(memory for _, memory in runs["load"][1:])
    pairs = zip(runs["load"][1:], runs["read"][1:], strict=True)
    return {
        "checkpoint_bytes": size,
        "files": len(weight_files(folder)),
        **{f"{what}_seconds": spread([seconds for seconds, _ in values[1:]]) for what, values in runs.items()},
        "speed_over_reading": statistics.median(reading / loading for (loading, _), (reading, _) in pairs),
        "peak_bytes": peak,
        "peak_over_checkpoint": peak / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help='checkpoints that have this in their names, such as "llama"')
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results = {}
    for name, (architecture, settings, form) in CASES.items():
        if args.only in name:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder), architecture, settings, form)
                results[name] = measure(Path(folder), args.rounds)
    args.out.parent.mkdir(exist_ok=True)
    told = {"machine": machine_info(), "dtype": "float32", "checkpoints": results}
    args.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    table = Table("checkpoint", "GB", "load, seconds", "read, seconds", "speed over reading", "peak memory over size")
    for name, row in results.items():
        seconds = (f"{row[f'{what}_seconds']['median']:.2f}" for what in ("load", "read"))
        size = f"{row['checkpoint_bytes'] / 1e9:.2f}"
        table.add_row(name, size, *seconds, f"{row['speed_over_reading']:.2f}", f"{row['peak_over_checkpoint']:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
