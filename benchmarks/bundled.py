"""Trains the variants that come with the package, by the shared trainer, and writes their folders.

    python benchmarks/bundled.py arch=mamba data=mqar      # one, again if it is there; more settings may follow
    python benchmarks/bundled.py --all                     # each architecture's that is not there yet

A variant is at most 2 MB: weights that would be larger are rounded to bf16 in the file. All figures in its record are
those of the weights in the file, loaded again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

import torch

import zoo
from zoo.checkpoint import model_folder, read_description
from zoo.eval.evaluate import evaluate
from zoo.pretrained.hub import CARD, model_card
from zoo.pretrained.tokenizer import find_tokenizer
from zoo.pretrained.variants import BUNDLED, RECORD
from zoo.pretrained.weights import write_text
from zoo.train.config import train_config
from zoo.train.data import DataModule
from zoo.train.run import run

LIMIT = 2_000_000
"""Bytes of a file of weights."""
HEADER = 32_000
"""Bytes of it that are not weights, at most."""
LICENCE = "apache-2.0"
DATA = ("mqar", "pystdlib")
PROMPT = "def "

# fmt: off
KEPT = (
    "arch", "data", "objective", "seed", "params", "steps", "best_step", "tokens", "wall_seconds", "tokens_per_second",
    "device", "dtype", "backends", "batch_hash", "batch_hash_after", "data_facts", "versions", "git_commit", "command",
)
# fmt: on


def settings(arch: str, data: str) -> list[str]:
    """How a variant is trained, in words of `zoo.train`: the time limits only end what is far too slow."""
    if data == "mqar":
        return ["trainer.stop_at=0.995", "trainer.val_every=250", "trainer.max_minutes=12"]
    shape = [f"arch.n_layers={layers(arch)}", "data.batch_size=8"]
    return [*shape, "trainer.max_steps=1500", "trainer.val_every=250", "trainer.max_minutes=20"]


def layers(arch: str) -> int:
    """Four, or as many as fit the limit in bf16."""
    for n_layers in (4, 3, 2):
        with torch.device("meta"):
            model = zoo.create_model(arch, vocab_size=256, n_layers=n_layers)
        if _bytes(model, torch.bfloat16) <= LIMIT:
            return n_layers
    return 1


def _bytes(model: zoo.Model, dtype: torch.dtype) -> int:
    return HEADER + dtype.itemsize * sum(p.numel() for p in model.parameters())


def make(arch: str, data: str, more: list[str]) -> None:
    """Trains a variant, writes it, and evaluates what was written."""
    words = [f"arch={arch}", f"data={data}", *settings(arch, data), *more]
    with tempfile.TemporaryDirectory() as runs:
        config = train_config([*words, f"runs_dir={runs}"])
        summary = run(config, command=" ".join(["python -m zoo.train", *words]))
        model = zoo.load_pretrained(summary["folder"])
        tokenizer = read_description(model_folder(summary["folder"]))["tokenizer"]
    name = f"{arch}-{data}-nano"
    rounded = torch.bfloat16 if _bytes(model, torch.float32) > LIMIT else None
    zoo.save_pretrained(model, BUNDLED / name, tokenizer=tokenizer, stored_dtype=rounded)
    record = {key: summary[key] for key in KEPT} | measure(name, DataModule(config.data, config.seed))
    record |= {"licence": LICENCE, "stored_dtype": str(rounded or torch.float32).removeprefix("torch.")}
    record["config"] = summary["config"] | {"runs_dir": "runs"}
    write_text(BUNDLED / name / CARD, card(name, record))
    write_text(BUNDLED / name / RECORD, json.dumps(record, indent=2) + "\n")  # last: it is what makes a variant
    print(f"{name}: {record['metrics']['test']}", flush=True)


def measure(name: str, data: DataModule) -> dict[str, Any]:
    """The metrics of the weights in the file; those of the first batch alone are for a test that is fast."""
    model = zoo.load_pretrained(BUNDLED / name)
    return {
        "metrics": {split: evaluate(model, data, split=split) for split in ("validation", "test")},
        "first_test_batch": evaluate(model, data, split="test", batches=1),
        "context": next(iter(data.test_dataloader()))["inputs"].shape[1],
    }


def card(name: str, record: dict[str, Any]) -> str:
    """The model card; of a model of text, with what it writes: the first continuation that seed 0 draws."""
    text = model_card(name, record["arch"], record, LICENCE)
    codec = find_tokenizer(BUNDLED / name)
    if codec is None:
        return text
    tokens = torch.tensor([codec.encode(PROMPT)])
    made = zoo.generate(zoo.load_pretrained(BUNDLED / name), tokens, max_new_tokens=300, temperature=0.5, seed=0)
    lines = [line.rstrip() for line in codec.decode(made[0].tolist()).splitlines()]
    return "\n".join([text, "## What it writes", "", "```python", *lines, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all that are not there yet, each in a process of its own")
    parser.add_argument("words", nargs="*", help="arch=... data=..., then settings of zoo.train")
    args = parser.parse_args()
    given = {key: value for key, _, value in (word.partition("=") for word in args.words)}
    if args.all:
        for data in [given["data"]] if "data" in given else DATA:
            for arch in [given["arch"]] if "arch" in given else zoo.list_models():
                if not (BUNDLED / f"{arch}-{data}-nano" / RECORD).exists():
                    subprocess.run([sys.executable, __file__, f"arch={arch}", f"data={data}"], check=False)
        return
    if given.get("data") not in DATA or "arch" not in given:
        parser.error(f"expected arch=NAME data={' or data='.join(DATA)}, got {' '.join(args.words) or 'nothing'}")
    make(given["arch"], given["data"], [word for word in args.words if word.partition("=")[0] not in ("arch", "data")])


if __name__ == "__main__":
    main()
