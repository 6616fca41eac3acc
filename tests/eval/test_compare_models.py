"""Comparisons of models that are trained already, here of those that come with the zoo."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from zoo.eval.bench import BenchSettings
from zoo.eval.compare import command, models
from zoo.eval.compare.command import compare
from zoo.eval.compare.config import read_words
from zoo.eval.history import History
from zoo.kernels.errors import ConfigError, DataError

ONE, OTHER = "transformer-mqar-nano", "longformer-mqar-nano"
DATA = ["data=mqar", "data.seq_len=64", "data.num_pairs=4", "data.num_examples=8", "data.test_examples=8"]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    monkeypatch.setattr(command.report, "write", lambda folder: folder / "report.html")


@pytest.fixture
def benched(monkeypatch) -> list[BenchSettings]:
    """The settings of each time that speed was measured."""
    asked: list[BenchSettings] = []

    def bench(makers, settings, say):
        asked.append(settings)
        return {"rows": [{"label": label, "length": n} for label, _ in makers for n in settings.lengths]}

    monkeypatch.setattr(command, "bench", bench)
    return asked


def run(folder: Path, *words: str) -> tuple[list[dict[str, str]], str]:
    """The rows of results.csv, and what was printed."""
    console = Console(record=True, quiet=False, file=(folder / "printed").open("w", encoding="utf-8"))
    with console.file:
        compare(*read_words([*DATA, *words, f"folder={folder}", "name=x"]), console)
    with (folder / "x" / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), (folder / "printed").read_text(encoding="utf-8")


def scores(row: dict[str, str]) -> set[str]:
    return {key for key, value in row.items() if key.startswith(("val_", "test_")) and value}


def test_scores_are_of_these_test_data_alone(tmp_path):
    """These were trained, and tested, at 32 tokens."""
    (row,), _ = run(tmp_path, f"models=[{ONE}]", "bench=false")
    assert row["status"] == "finished"
    assert scores(row) == {"test_acc", "test_acc/seq_len=64", "test_acc/num_pairs=4"}
    assert row["steps"], "how the training went is told"


def test_a_model_that_fails_has_a_reason_and_no_score(tmp_path, monkeypatch):
    real = models.evaluate

    def evaluate(model, *args, **settings):
        if model.architecture == "longformer":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, *args, **settings)

    monkeypatch.setattr(models, "evaluate", evaluate)
    (one, other), printed = run(tmp_path, f"models=[{ONE},{OTHER}]", "bench=false")
    assert (one["status"], other["status"]) == ("finished", "out_of_memory")
    assert other["reason"] == "CUDA out of memory"
    assert scores(one)
    assert not scores(other)
    cells = next(line.split("│")[1:-1] for line in printed.splitlines() if line.startswith(f"│ {OTHER}"))
    label, median, spread, solved, *_, speed, failed = (cell.strip() for cell in cells)
    assert (label, median, spread, solved, speed, failed) == (OTHER, "", "", "0 of 1", "", "1:")


def test_nor_one_that_does_not_know_the_tokens(tmp_path):
    (row,), _ = run(tmp_path, f"models=[{ONE}]", "bench=false", "data.vocab_size=128")
    assert (row["status"], scores(row)) == ("failed", set())
    assert "knows 64 token ids and data=mqar needs 128" in row["reason"]


@pytest.mark.parametrize(
    "word",
    [
        *("seeds=2", "match=flops", "budget=77", "lrs=[1e-3]", "jobs=2", "threads=1", "launcher=basic", "trainer=cpu"),
        *("trainer.max_steps=3", "optim.weight_decay=0", "arch.mamba.d_state=8", "launcher.n_jobs=1"),
    ],
)
def test_words_that_decide_nothing_are_refused(word):
    with pytest.raises(ConfigError, match=rf"{re.escape(repr(word))} decides nothing beside models=.*leave it out"):
        read_words([f"models=[{ONE}]", *DATA, word])


def test_words_that_are_taken_decide_something(tmp_path, monkeypatch, benched):
    gpu, real_load, seen = torch.device("cuda"), models.load_pretrained, {}

    def load(place, device=None):
        seen["device"] = device
        return real_load(place)

    def evaluate(model, data, *, objective, batches):
        seen.update(objective=type(objective).__name__, batches=batches, length=data.source.config.seq_len)
        return {"acc": 0.5}

    monkeypatch.setattr(models, "pick_device", {"gpu": gpu}.__getitem__)
    monkeypatch.setattr(models, "machine_info", str)
    monkeypatch.setattr(models, "load_pretrained", load)
    monkeypatch.setattr(models, "evaluate", evaluate)
    run(tmp_path, f"models=[{ONE}]", "trainer.accelerator=gpu", "trainer.eval_batches=3", "objective=masked")
    assert seen == {"device": gpu, "objective": "Masked", "batches": 3, "length": 64}
    assert [settings.device for settings in benched] == ["cuda"], "measured where it is evaluated"
    told = json.loads((tmp_path / "x" / "comparison.json").read_text())
    assert told["settings"]["trainer"] == {"accelerator": "gpu", "eval_batches": 3}
    assert told["settings"]["objective"] == "masked"


def test_other_lengths_are_measured_anew(tmp_path, monkeypatch, benched):
    monkeypatch.setattr(models, "evaluate", lambda *_, **__: {"acc": 0.5})
    words = [f"models=[{ONE}]", "trainer.accelerator=cpu"]
    for lengths in ("[16]", "[16]", "[32,16]"):
        _, printed = run(tmp_path, *words, f"lengths={lengths}")
    assert [settings.lengths for settings in benched] == [[16], [16, 32]]
    assert "anew: bench.json has lengths [16], and asked for are [16, 32]" in printed


def test_models_of_other_training_batches_are_refused_with_the_reason(tmp_path):
    strange = "transformer-pystdlib-nano"
    with pytest.raises(DataError, match="they were trained with data 'mqar' and 'pystdlib': compare") as caught:
        run(tmp_path, f"models=[{ONE},{strange}]")
    assert f"{ONE} and {strange}, both of seed 0" in str(caught.value)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"config": {"data": {"name": "mqar", "batch_size": 16}}}, "they were trained with data.batch_size 8 and 16"),
        ({"data_facts": {"python": "3.12"}}, "they were trained with python '3.11' and '3.12'"),
        ({"config": {"data": {"name": "mqar", "batch_size": 8, "num_workers": 2}}}, "their records do not say why"),
    ],
)
def test_the_setting_that_made_batches_different_is_named(changed, told):
    record = {"config": {"data": {"name": "mqar", "batch_size": 8}}, "data_facts": {"python": "3.11"}}
    assert models._why(record, record | changed).startswith(told)


def test_runs_of_one_test_set_are_compared_however_its_training_data_were_read():
    config = read_words(["models=[a,b]"])[0]
    pasts = {
        name: History("mqar", {"seq_len": 32, **settings}, "causal", None, {})
        for name, settings in {"a": {"batch_size": 8}, "b": {"batch_size": 16, "num_workers": 1}}.items()
    }
    assert models._data(config, pasts)[:2] == ("mqar", {"seq_len": 32, "batch_size": 8})
    pasts["b"].settings["seq_len"] = 64
    with pytest.raises(ConfigError, match=r"a and b were trained on different data \(data.seq_len: 32 and 64\)"):
        models._data(config, pasts)
