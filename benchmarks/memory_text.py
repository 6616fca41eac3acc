"""What memory is worth on running text: perplexity by position for four ways to remember, three seeds each.

All are trained by `zoo compare` on the same segments of Python's own sources in order, their states carried along, with
equal parameters and equal tokens. A layer of each attention spans 512 tokens: the Transformer's window; the 256 of a
segment and 256 of memory of Transformer-XL; the Compressive Transformer has 256 older ones in 64 vectors beside them.
The perplexity is that of windows of 4,096 bytes, each inside one file that no run has seen.

    python benchmarks/memory_text.py                # trains what is not in comparisons/memory-text yet, then reads

It writes benchmarks/results/memory_text.{json,png}.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

import zoo
from zoo.eval.measure import machine_info
from zoo.eval.text import by_position, windows
from zoo.train.config import train_config
from zoo.train.data import create_source

HERE = Path(__file__).parent
NAME, READ, COUNT = "memory-text", 4096, 32
SIZE = ["d_model=128", "n_layers=4"]
FORMS = {
    "transformer": ["window=512"],
    "transformer_xl": ["segment=256", "memory=256"],
    "compressive": ["segment=256", "memory=256", "compressed_memory=64", "rate=4"],
    "mamba": [],
}


def command(folder: Path, steps: int, seeds: int) -> list[str]:
    """The comparison."""
    sizes = [f"arch.{arch}.{word}" for arch, words in FORMS.items() for word in words]
    sizes += [f"arch.transformer.{word}" for word in SIZE]
    words = [f"arch={','.join(FORMS)}", "data=pystdlib", "data.seq_len=256", "trainer.segment_length=256", *sizes]
    words += [
        f"seeds={seeds}",
        "lrs=[0.002]",
        f"trainer.max_steps={steps}",
        f"trainer.val_every={steps}",
        "bench=false",
    ]
    return [sys.executable, "-m", "zoo.compare", *words, f"folder={folder}", f"name={NAME}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("comparisons"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    trained = command(args.folder, args.steps, args.seeds)
    subprocess.run(trained, check=True)
    with (args.folder / NAME / "results.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    source = create_source(train_config(["data=pystdlib", "data.seq_len=256"]).data)
    tokens = windows(source, "test", READ, COUNT)
    rows = []
    for cell in cells:
        read = by_position(zoo.load_pretrained(args.folder / NAME / cell["run"]), tokens, chunk=1024)
        kept = ("label", "seed", "params", "tokens", "test_bits_per_byte", "batch_hash", "wall_seconds")
        rows.append({key: cell[key] for key in kept} | {"read": read})
        print(json.dumps(rows[-1]), flush=True)
    shown = " ".join(word for word in trained[1:] if not word.startswith("folder="))
    out = HERE / "results" / "memory_text.json"
    out.write_text(
        json.dumps({"machine": machine_info(), "training": f"python {shown}", "rows": rows}, indent=2) + "\n"
    )
    draw(rows, out.with_suffix(".png"))


def draw(rows: list[dict], path: Path) -> None:
    """Median and range over the seeds, by bucket of positions."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    buckets = [key.partition("=")[2] for key in rows[0]["read"] if key.startswith("perplexity/")]
    for label, marker in zip(FORMS, "os^D", strict=True):
        values = [
            [row["read"][f"perplexity/position={bucket}"] for row in rows if row["label"] == label]
            for bucket in buckets
        ]
        axes.plot(buckets, [statistics.median(v) for v in values], marker=marker, label=label)
        axes.fill_between(range(len(buckets)), [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    axes.set(xlabel="position in the window, bytes", ylabel="perplexity per byte", title="Four ways to remember a text")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
