"""The variants that come with the package: complete, small, and as good as their records say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import zoo
from zoo.eval.evaluate import evaluate
from zoo.pretrained.variants import BUNDLED, RECORD, variants
from zoo.train.config import train_config
from zoo.train.data import DataModule, get_data
from zoo.train.run import run

NAMES = [name for name, row in variants().items() if row.hub_id is None]
FILES = {"README.md", "config.json", "model.safetensors", RECORD}
LARGEST = 2_000_000
FACTS = {"arch", "data", "seed", "command", "steps", "tokens", "batch_hash", "wall_seconds", "versions", "git_commit"}
FACTS |= {"metrics", "device", "params", "context", "licence", "data_facts", "config"}


def record(name: str) -> dict:
    return json.loads((BUNDLED / name / RECORD).read_text(encoding="utf-8"))


def test_two_of_each_architecture_and_first_in_the_list() -> None:
    trained = {(told["arch"], told["data"]): name for name, told in ((name, record(name)) for name in NAMES)}
    assert {data for _, data in trained} == {"mqar", "pystdlib"}
    assert all((arch, data) in trained for arch, _ in trained for data in ("mqar", "pystdlib"))
    assert all(name == f"{arch}-{data}-nano" for (arch, data), name in trained.items())
    assert zoo.list_models(pretrained=True)[: len(NAMES)] == NAMES
    assert {path.name for path in BUNDLED.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_small_and_complete(name) -> None:
    assert {path.name for path in (BUNDLED / name).iterdir()} == FILES
    assert (BUNDLED / name / "model.safetensors").stat().st_size <= LARGEST
    told = record(name)
    assert not FACTS - told.keys()
    assert all(told["metrics"][split] for split in ("validation", "test"))
    assert told["command"].startswith(f"python -m zoo.train arch={told['arch']} data={told['data']} ")
    assert len(told["batch_hash"]) == 64
    assert f'zoo.load_pretrained("{name}")' in (BUNDLED / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_as_good_as_its_record(name) -> None:
    told = record(name)
    model = zoo.load_pretrained(name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == told["params"] == variants()[name].parameters
    settings = dict(told["config"]["data"])
    data = DataModule(get_data(settings.pop("name")).config(**settings), told["seed"])
    found, expected = evaluate(model, data, split="test", batches=1), told["first_test_batch"]
    # Another Python has another standard library.
    if data.source.facts() == told["data_facts"]:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["acc"] == pytest.approx(expected["acc"], abs=3e-3)
    if told["data"] == "pystdlib":
        assert found["bits_per_byte"] < 2.5
    else:
        assert min(found["acc"], told["metrics"]["test"]["acc"]) > 0.98


def test_writes_on_the_command_line() -> None:
    command = [sys.executable, "-m", "zoo.generate", "model=mamba-pystdlib-nano", "prompt=def ", "temperature=0.5"]
    done = subprocess.run([*command, "max_new_tokens=200"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("def ")
    assert "self" in done.stdout
    assert "\n    " in done.stdout


def test_training_goes_on_from_one(tmp_path) -> None:
    words = ["init=mamba-mqar-nano", "trainer=debug", "optim.lr=1e-6", f"runs_dir={tmp_path}"]
    summary = run(train_config(words))
    assert summary["arch"] == "mamba"
    assert summary["metrics"]["test"]["acc"] > 0.98
