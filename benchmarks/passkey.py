"""Trained at 128 tokens, asked at up to 32 times as many: landmark attention that reads few blocks, and a Transformer.

Both have the same sizes and see the same examples of `data=passkey`, through the front door, with several seeds, until
they answer .995 of the validation examples, or for 1,200 steps. A fact
stands somewhere in filler, and the last token asks for it. Landmark attention is trained on all blocks and tested with
the best few of them alone; the Transformer reads everything.

    python benchmarks/passkey.py                  # trains what is not in runs/passkey yet, then reads
    python benchmarks/passkey.py --seeds 1        # one seed only

It writes benchmarks/results/passkey.{json,png}.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from zoo.eval.measure import machine_info

HERE = Path(__file__).parent
TRAINED = 128
LENGTHS = [TRAINED << i for i in range(6)]  # 128 to 4,096
SIZE = ["arch.d_model=64", "arch.n_layers=2"]
TRAINING = ["data=passkey", f"data.seq_len={TRAINED}", f"data.test_lengths={json.dumps(LENGTHS).replace(' ', '')}"]
TRAINING += ["trainer.max_steps=1200", "trainer.val_every=100", "trainer.stop_at=0.995", "optim.lr=2e-3"]
MODELS = {
    "landmark": ["arch=landmark", "arch.block_size=16", "arch.local_layers=1", "arch.top_k=4"],
    "transformer": ["arch=transformer"],
}


def train(runs: Path, name: str, words: list[str]) -> dict:
    """The summary of one run through the front door; it is trained unless it is there."""
    summary = runs / name / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "zoo.train", *words, f"runs_dir={runs}", f"name={name}", "resume=true"]
        subprocess.run(command, check=True)
    return json.loads(summary.read_text())


def read(runs: Path, seeds: int, examples: int) -> list[dict]:
    """Per model, seed and length the share of right answers."""
    rows = []
    for arch, words in MODELS.items():
        for seed in range(seeds):
            told = [*words, *SIZE, *TRAINING, f"data.test_examples={examples}", f"seed={seed}"]
            summary = train(runs, f"{arch}-{seed}", told)
            kept = {key: summary[key] for key in ("params", "steps", "tokens", "train_seconds", "batch_hash_after")}
            for length in LENGTHS:
                exact = summary["metrics"]["test"][f"exact/seq_len={length}"]
                rows.append(
                    {"model": arch, "seed": seed, "length": length, "exact": exact, "examples": examples} | kept
                )
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Right answers by length, a line per seed."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for arch, colour in zip(MODELS, plt.colormaps["tab10"].colors, strict=False):
        for seed in sorted({row["seed"] for row in rows}):
            own = [row for row in rows if row["model"] == arch and row["seed"] == seed]
            label = arch if seed == 0 else None
            axes.plot([r["length"] for r in own], [r["exact"] for r in own], marker="o", color=colour, label=label)
    axes.axvline(TRAINED, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"tokens (trained at {TRAINED})")
    axes.set_ylabel("right answers")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/passkey"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64, help="per length")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "passkey")
    args = parser.parse_args()
    rows = read(args.runs, args.seeds, args.examples)
    for seed in range(args.seeds):  # to the end of the shorter run, as runs end when they have learnt
        prefixes = [row["batch_hash_after"] for row in rows if row["seed"] == seed]
        shared = set.intersection(*(set(prefix) for prefix in prefixes))
        same = all(prefix[step] == prefixes[0][step] for prefix in prefixes for step in shared)
        assert same, "the models saw other examples than each other"
    args.out.parent.mkdir(exist_ok=True)
    result = {"machine": machine_info(), "models": MODELS, "training": SIZE + TRAINING, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, args.out.with_suffix(".png"))
    for arch in MODELS:
        for length in LENGTHS:
            own = [row["exact"] for row in rows if row["model"] == arch and row["length"] == length]
            print(f"{arch} at {length:,}: {math.fsum(own) / len(own):.3f} ({min(own):.3f} to {max(own):.3f})")


if __name__ == "__main__":
    main()
