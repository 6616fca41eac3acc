"""Loading published checkpoints: seconds against reading the bytes, and peak memory against their size.

    python benchmarks/pretrained_loading.py          # writes benchmarks/results/pretrained_loading.json

Each load is a process of its own, as a user has it; rounds in turn, files in the page cache for both sides. The
checkpoints have random weights, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zoo.eval.measure import machine_info

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"arch": "transformer", "d_model": 2048, "n_heads": 16, "n_kv_heads": 4, "d_ff": 5632, "per_layer": 45e6},
    "mamba": {"arch": "mamba", "d_model": 2048, "per_layer": 26.5e6},
    "rwkv4": {"arch": "rwkv4", "d_model": 2048, "per_layer": 54.5e6},
}
FORMS = {"llama": ["safetensors", "shards", "bin"], "mamba": ["safetensors"], "rwkv4": ["safetensors"]}

WRITE = """
import sys, torch, zoo, json
from pathlib import Path
folder, name, settings, form = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
with torch.device("meta"):
    model = zoo.create_model(name, vocab_size=32000, **settings)
model = model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.data.uniform_(-0.02, 0.02)
limit = (256 << 20) if form == "shards" else (1 << 40)
zoo.save_pretrained(model, folder, format="transformers", max_shard_bytes=limit)
if form == "bin":
    from safetensors.torch import load_file
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
"""

MEASURE = """
import sys, time, json
from pathlib import Path
import torch, zoo
from zoo.kernels.errors import ZooError
folder, what = Path(sys.argv[1]), sys.argv[2]
def status():
    lines = (line.split() for line in open("/proc/self/status"))
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "VmRSS:")}
zoo.create_model("transformer", vocab_size=8, d_model=8, n_heads=1)
before = status()["VmRSS"]
begun = time.perf_counter()
if what == "load":
    model = zoo.load_pretrained(folder)
else:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            buffer = bytearray(path.stat().st_size)
            with path.open("rb", buffering=0) as file:
                view, at = memoryview(buffer), 0
                while at < len(buffer):
                    at += file.readinto(view[at:])
seconds = time.perf_counter() - begun
print(json.dumps({"seconds": seconds, "peak_bytes": status()["VmHWM"] - before}))
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return done.stdout


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Both sides in turn; the first round only warms the page cache."""
    sizes = [path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    result: dict[str, Any] = {"checkpoint_bytes": sum(sizes), "files": len(sizes)}
    runs: dict[str, list[dict[str, float]]] = {"load": [], "read": []}
    for _ in range(rounds + 1):
        for what, values in runs.items():
            values.append(json.loads(python(MEASURE, str(folder), what)))
    for what, values in runs.items():
        seconds = [value["seconds"] for value in values[1:]]
        result[f"{what}_seconds"] = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    result["peak_bytes"] = max(value["peak_bytes"] for value in runs["load"][1:])
    result["peak_over_checkpoint"] = result["peak_bytes"] / result["checkpoint_bytes"]
    pairs = zip(runs["load"][1:], runs["read"][1:], strict=True)
    result["speed_over_reading"] = statistics.median(read["seconds"] / load["seconds"] for load, read in pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each checkpoint, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help='one checkpoint, such as "llama, shards"')
    parser.add_argument("--out", type=Path, default=RESULTS / "pretrained_loading.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, settings in SIZES.items():
        size = dict(settings)
        arch, per_layer = size.pop("arch"), size.pop("per_layer")
        size["n_layers"] = max(1, round((options.gigabytes * 2**28 - 65.5e6) / per_layer))
        for form in FORMS[name]:
            if options.only not in ("", f"{name}, {form}"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                python(WRITE, folder, arch, json.dumps(size), form)
                results[f"{name}, {form}"] = measure(Path(folder), options.rounds)
    command = " ".join(["python", "benchmarks/pretrained_loading.py", *sys.argv[1:]])
    told = {"machine": machine_info() | {"command": command}, "dtype": "float32", "checkpoints": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    table = Table(title="Loading against reading the bytes; peak memory over the checkpoint's size")
    for heading in ("checkpoint", "bytes", "load s", "read s", "speed", "peak"):
        table.add_column(heading)
    for name, row in results.items():
        load, read = (f"{row[f'{what}_seconds']['median']:.2f}" for what in ("load", "read"))
        speed, peak = f"{row['speed_over_reading']:.2f}", f"{row['peak_over_checkpoint']:.2f}"
        table.add_row(name, f"{row['checkpoint_bytes']:,}", load, read, speed, peak)
    Console().print(table)


if __name__ == "__main__":
    main()
