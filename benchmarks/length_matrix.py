"""Trained at 256 tokens, read at up to 8,192: a Transformer under each scaling of its positions, Mamba, RWKV-4.

All are trained equally on Python's own sources, through the front door; then the Transformer goes on for 200 steps at
2,048 tokens under each scaling. Perplexity by position is that of the first 8,192 bytes of files that no run has seen,
one document each. "dynamic" depends on the length that is read, so each length is read by itself.

    python benchmarks/length_matrix.py                  # trains what is not in runs/length-matrix yet, then reads
    python benchmarks/length_matrix.py --only-read      # reads what is there

It writes benchmarks/results/length_matrix.{json,csv,png}.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import zoo
from zoo.eval.measure import machine_info
from zoo.train.data.pystdlib import stdlib_corpus

HERE = Path(__file__).parent
TRAINED, LONGEST, TUNED = 256, 8192, 2048
FACTOR = TUNED // TRAINED
LENGTHS = [TRAINED << i for i in range(6)]  # 256 to 8,192
SIZE = ["arch.d_model=128", "arch.n_layers=4"]
TRAINING = ["data=pystdlib", f"data.seq_len={TRAINED}", "data.batch_size=16", "trainer.max_steps=2500"]
TUNING = ["data=pystdlib", f"data.seq_len={TUNED}", "data.batch_size=2", "trainer.max_steps=200", "optim.lr=3e-4"]
TUNING += ["trainer.val_every=200", "data.validation_examples=32", "trainer.eval_batches=16"]
SCALINGS = {
    "none": {},
    "linear (PI)": {"type": "linear", "factor": FACTOR},
    "NTK-aware": {"type": "ntk", "factor": FACTOR},
    "dynamic NTK": {"type": "dynamic", "factor": 1, "original_length": TRAINED},
    "YaRN": {"type": "yarn", "factor": FACTOR, "original_length": TRAINED},
}


def train(runs: Path, name: str, words: list[str]) -> None:
    """One run through the front door, unless it is there."""
    if (runs / name / "model" / "config.json").exists():
        return
    command = [sys.executable, "-m", "zoo.train", *words, f"runs_dir={runs}", f"name={name}", "resume=true"]
    subprocess.run(command, check=True)


def train_all(runs: Path) -> None:
    """The three models, and the Transformer once more under each scaling."""
    for arch in ("transformer", "mamba", "rwkv4"):
        train(runs, arch, [f"arch={arch}", *SIZE, *TRAINING])
    for label, scaling in SCALINGS.items():
        told = "{" + ",".join(f"{key}:{value}" for key, value in scaling.items()) + "}"
        words = [f"init={runs / 'transformer'}", f"arch.rope_scaling={told}"]
        train(runs, tuned_name(label), [*words, *TUNING])


def tuned_name(label: str) -> str:
    return "tuned-" + label.split()[0].strip("()").lower()


def documents(count: int) -> torch.Tensor:
    """The beginnings of test files that are long enough, (count, LONGEST + 1)."""
    corpus = stdlib_corpus(Path(sysconfig.get_path("stdlib")))
    long = [document for document in corpus.documents("test") if len(document) > LONGEST]
    assert len(long) >= count, f"only {len(long)} test files have more than {LONGEST} bytes"
    return torch.tensor([list(document[: LONGEST + 1]) for document in long[:count]])


@torch.no_grad()
def losses(model: zoo.Model, tokens: torch.Tensor, whole: bool) -> torch.Tensor:
    """Nats of each token, (B, T); `whole`: read at once, as a scaling that depends on the length wants it."""
    return -zoo.score(model, tokens, chunk=tokens.shape[1] if whole else 1024)


def buckets(length: int) -> list[tuple[int, int]]:
    """Positions [begin, end): up to the trained length, then doubling."""
    edges = [0, *(edge for edge in LENGTHS if edge <= length)]
    return list(itertools.pairwise(edges))


def read(label: str, tuned: bool, model: zoo.Model, tokens: torch.Tensor) -> list[dict]:
    """Rows of the matrix for one model: per length read, the perplexity in each bucket of positions."""
    rows = []
    depends_on_length = label == "dynamic NTK"
    longest = None if depends_on_length else losses(model, tokens, whole=False)
    for length in LENGTHS:
        nats = losses(model, tokens[:, : length + 1], whole=True) if longest is None else longest[:, :length]
        for begin, end in buckets(length):
            of_documents = nats[:, begin:end].mean(1)
            rows.append(
                {
                    "model": label,
                    "fine_tuned": tuned,
                    "length": length,
                    "begin": begin,
                    "end": end,
                    "perplexity": math.exp(of_documents.mean()),
                    "standard_error_nats": float(of_documents.std() / len(of_documents) ** 0.5),
                }
            )
    return rows


def read_all(runs: Path, count: int) -> list[dict]:
    """All rows."""
    tokens, rows = documents(count), []
    for label, scaling in SCALINGS.items():
        model = zoo.load_pretrained(runs / "transformer")
        if scaling:
            settings = {key: value for key, value in scaling.items() if key != "type"}
            zoo.set_rope_scaling(model, scaling["type"], **settings)
        rows += read(label, False, model, tokens)
        rows += read(label, True, zoo.load_pretrained(runs / tuned_name(label)), tokens)
    for arch in ("mamba", "rwkv4"):
        rows += read(arch, False, zoo.load_pretrained(runs / arch), tokens)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Perplexity by position at the longest length, without and with fine-tuning."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colours = dict(zip([*SCALINGS, "mamba", "rwkv4"], plt.colormaps["tab10"].colors, strict=False))
    for panel, tuned in zip(panels, (False, True), strict=True):
        for label, colour in colours.items():
            own = [r for r in rows if r["model"] == label and r["length"] == LONGEST]
            own = [r for r in own if r["fine_tuned"] == (tuned and label in SCALINGS)]
            style = "--" if label not in SCALINGS else "-"
            panel.plot(
                [r["end"] for r in own], [r["perplexity"] for r in own], style, marker="o", color=colour, label=label
            )
        panel.axvline(TRAINED, color="0.6", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(LENGTHS, [f"{edge:,}" for edge in LENGTHS])
        panel.set_xlabel("position (end of the bucket, bytes)")
        panel.set_title("fine-tuned for 200 steps at 2,048" if tuned else "as trained at 256")
    panels[0].set_ylabel("perplexity per byte")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/length-matrix"))
    parser.add_argument("--only-read", action="store_true", help="train nothing")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "length_matrix")
    args = parser.parse_args()
    if not args.only_read:
        train_all(args.runs)
    rows = read_all(args.runs, args.documents)
    summaries = {path.parent.name: json.loads(path.read_text()) for path in sorted(args.runs.glob("*/summary.json"))}
    kept = ("params", "steps", "tokens", "wall_seconds", "batch_hash", "seed")
    runs = {name: {key: summary[key] for key in kept} for name, summary in summaries.items()}
    args.out.parent.mkdir(exist_ok=True)
    result = {"machine": machine_info(), "documents": args.documents, "runs": runs, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    with args.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
