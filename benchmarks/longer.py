"""Trained at one length, asked at up to 32 or 64 times as many tokens.

    python benchmarks/longer.py passkey           # trains what is not in runs/passkey yet, then reads
    python benchmarks/longer.py induction --seeds 1

passkey: a fact stands somewhere in filler, and the last token asks for it. Landmark attention is trained on all blocks
and tested with the best few of them alone, beside a Transformer that reads everything; until .995 of the validation
examples are right, or for 1,200 steps.
induction: what followed the first of two triggers. Mamba beside a Transformer, in two stages: until what is asked at
the trained length is right, and then on, as it need not be right beyond that yet.

The models of a study have the same sizes and see the same examples, through the front door, with several seeds. It
writes benchmarks/results/<study>.{json,png}.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt

from zoo.eval.measure import machine_info

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Study:
    """What is trained, and where it is asked."""

    trained: int
    """Tokens."""
    lengths: list[int]
    models: dict[str, list[str]]
    stages: list[list[str]]
    """Of the training: each begins with the weights of the one before."""
    seeds: int

    def words(self, data: str, stage: int) -> list[str]:
        """What the runs of a stage have in common; only the last is asked at all lengths."""
        lengths = self.lengths if stage == len(self.stages) - 1 else [self.trained]
        asked = f"data.test_lengths={json.dumps(lengths).replace(' ', '')}"
        size = ["arch.d_model=64", "arch.n_layers=2"]
        return [f"data={data}", f"data.seq_len={self.trained}", asked, *size, "optim.lr=2e-3", *self.stages[stage]]


STUDIES = {
    "passkey": Study(
        trained=128,
        lengths=[128 << i for i in range(6)],  # to 4,096
        models={
            "landmark": ["arch=landmark", "arch.block_size=16", "arch.local_layers=1", "arch.top_k=4"],
            "transformer": ["arch=transformer"],
        },
        stages=[["trainer.max_steps=1200", "trainer.val_every=100", "trainer.stop_at=0.995"]],
        seeds=3,
    ),
    "induction": Study(
        trained=256,
        lengths=[256 << i for i in range(7)],  # to 16,384
        models={"mamba": ["arch=mamba"], "transformer": ["arch=transformer"]},
        stages=[
            # The plateau is left sooner in larger batches.
            ["data.batch_size=32", "trainer.max_steps=5000", "trainer.val_every=250", "trainer.stop_at=0.999"],
            # What is right at 256 tokens is forgotten beyond 1,024 still; small batches and no decay, as in the paper,
            # teach to keep it. Validation, at 256, cannot choose among the steps, so the last one is taken.
            [
                "data.batch_size=8",
                "trainer.max_steps=3000",
                "trainer.val_every=3000",
                "optim.schedule=constant",
                "optim.weight_decay=0",
            ],
        ],
        seeds=2,
    ),
}


def train(runs: Path, name: str, words: list[str]) -> dict:
    """The summary of one run through the front door; it is trained unless it is there."""
    summary = runs / name / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "zoo.train", *words, f"runs_dir={runs}", f"name={name}", "resume=true"]
        subprocess.run(command, check=True)
    return json.loads(summary.read_text())


def read(data: str, study: Study, runs: Path, seeds: int, examples: int) -> list[dict]:
    """Per model, seed and length the share of right answers."""
    rows = []
    for seed in range(seeds):
        for arch, words in study.models.items():
            summaries, before = [], []
            for stage in range(len(study.stages)):
                told = [*words, *study.words(data, stage), f"data.test_examples={examples}", f"seed={seed}", *before]
                name = f"{arch}-{seed}-{stage}"
                summaries.append(train(runs, name, told))
                before = [f"init={runs / name}"]
            kept = {key: sum(summary[key] for summary in summaries) for key in ("steps", "tokens", "train_seconds")}
            kept |= {key: summaries[-1][key] for key in ("params", "batch_hash_after")}
            for length in study.lengths:
                exact = summaries[-1]["metrics"]["test"][f"exact/seq_len={length}"]
                rows.append(
                    {"model": arch, "seed": seed, "length": length, "exact": exact, "examples": examples} | kept
                )
    return rows


def draw(study: Study, rows: list[dict], path: Path) -> None:
    """Right answers by length, a line per seed."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for arch, colour in zip(study.models, plt.colormaps["tab10"].colors, strict=False):
        for seed in sorted({row["seed"] for row in rows}):
            own = [row for row in rows if row["model"] == arch and row["seed"] == seed]
            label = arch if seed == 0 else None
            axes.plot([r["length"] for r in own], [r["exact"] for r in own], marker="o", color=colour, label=label)
    axes.axvline(study.trained, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(study.lengths, [f"{length:,}" for length in study.lengths])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"tokens (trained at {study.trained})")
    axes.set_ylabel("right answers")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--runs", type=Path, help="folder of the runs; runs/<study>")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--models", nargs="+", help="some of the study's")
    parser.add_argument("--examples", type=int, default=64, help="per length")
    args = parser.parse_args()
    study = STUDIES[args.study]
    if args.models:
        study = replace(study, models={name: study.models[name] for name in args.models})
    seeds = args.seeds or study.seeds
    rows = read(args.study, study, args.runs or Path("runs") / args.study, seeds, args.examples)
    for seed in range(seeds):  # to the end of the shorter run, as runs may end when they have learnt
        prefixes = [row["batch_hash_after"] for row in rows if row["seed"] == seed]
        shared = set.intersection(*(set(prefix) for prefix in prefixes))
        same = all(prefix[step] == prefixes[0][step] for prefix in prefixes for step in shared)
        assert same, "the models saw other examples than each other"
    out = HERE / "results" / args.study
    out.parent.mkdir(exist_ok=True)
    training = [study.words(args.study, stage) for stage in range(len(study.stages))]
    result = {"machine": machine_info(), "models": study.models, "training": training, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(study, rows, out.with_suffix(".png"))
    for arch in study.models:
        for length in study.lengths:
            own = [row["exact"] for row in rows if row["model"] == arch and row["length"] == length]
            print(f"{arch} at {length:,}: {math.fsum(own) / len(own):.3f} ({min(own):.3f} to {max(own):.3f})")


if __name__ == "__main__":
    main()
