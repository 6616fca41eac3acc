"""`zoo eval`: the numbers are those of the trainer's own pass, however the examples are cut into chunks."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import zoo
from zoo.console import run_cli
from zoo.eval import command
from zoo.eval.evaluate import evaluate
from zoo.eval.history import history
from zoo.eval.matrix import Row
from zoo.eval.suites import SUITES, data_config
from zoo.eval.text import FIRST_BUCKET, by_position, hidden_number, windows
from zoo.kernels.errors import ConfigError, DataError
from zoo.train.config import train_config
from zoo.train.data import DataConfig, DataModule, ListOpsConfig, MQARConfig, list_data
from zoo.train.objectives import make_objective
from zoo.train.run import run

SMALL = ["arch.d_model=16", "arch.n_layers=1", "trainer=debug", "trainer.accelerator=cpu", "trainer.eval_batches=null"]
MQAR = ["data=mqar", "data.num_examples=64", "data.validation_examples=16", "data.test_examples=48"]
TEXT = ["data.seq_len=96", "data.num_examples=16", "data.validation_examples=8", "data.test_examples=8"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def train(runs: Path, name: str, *words: str) -> dict:
    return run(train_config([*SMALL, *words, f"runs_dir={runs}", f"name={name}"]), console=Console(quiet=True))


@pytest.fixture(scope="session")
def recall(runs: Path) -> dict:
    return train(runs, "recall", "arch=mamba", *MQAR)


@pytest.fixture(scope="session")
def reader(runs: Path) -> dict:
    return train(runs, "reader", "arch=mamba", "data=pystdlib", *TEXT)


def data_of(summary: dict) -> DataModule:
    data = dict(summary["config"]["data"])
    name = data.pop("name")
    return DataModule(
        train_config([f"data={name}", *(f"data.{k}={v}" for k, v in data.items() if v is not None)]).data, 0
    )


@pytest.mark.parametrize(("kind", "chunk"), [("recall", 4096), ("recall", 7), ("recall", 1), ("reader", 7)])
def test_metrics_are_the_trainers(kind: str, chunk: int, request: pytest.FixtureRequest) -> None:
    summary = request.getfixturevalue(kind)
    metrics = evaluate(zoo.load_pretrained(summary["folder"]), data_of(summary), chunk=chunk)
    assert metrics == pytest.approx(summary["metrics"]["test"], rel=1e-5)
    assert metrics["loss"] > 0.1


def test_classification_is_the_trainers(runs: Path) -> None:
    words = ["data=listops", "data.num_examples=32", "data.validation_examples=16", "data.test_examples=16"]
    summary = train(runs, "lists", "arch=longformer", "objective=classify", *words)
    data = data_of(summary)
    model = zoo.load_pretrained(summary["folder"])
    metrics = evaluate(model, data, objective=make_objective("classify", data.source.vocab_size))
    assert metrics == pytest.approx(summary["metrics"]["test"], rel=1e-5)
    with pytest.raises(ConfigError, match="objective=masked or objective=classify"):
        evaluate(model, data)


def test_a_model_keeps_its_mode_and_too_small_a_vocabulary_is_told(recall: dict) -> None:
    model = zoo.load_pretrained(recall["folder"]).train()
    evaluate(model, data_of(recall), batches=1)
    assert model.training
    with pytest.raises(ConfigError, match="knows 3 token ids and data=mqar needs"):
        evaluate(zoo.create_model("mamba", vocab_size=3), data_of(recall))


def test_history_tells_what_a_model_was_trained_on(recall: dict, tmp_path: Path) -> None:
    past = history(recall["folder"])
    assert past is not None
    assert (past.data, past.objective, past.settings["num_examples"]) == ("mqar", "causal", 64)
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=3), tmp_path / "alone")
    assert history(str(tmp_path / "alone")) is None


def tell(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["zoo eval", *words])
    return run_cli(command.main)


def test_command_writes_what_it_prints(recall: dict, monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "results.json"
    assert tell(monkeypatch, f"model={recall['folder']}", f"out={out}") == 0
    assert "chance" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert result["metrics"] == pytest.approx(recall["metrics"]["test"], rel=1e-5)


def test_suite_runs_what_fits_and_says_what_does_not(recall: dict, reader: dict, monkeypatch, capsys) -> None:
    assert tell(monkeypatch, f"model={recall['folder']}", "suite=longrange") == 0
    told = capsys.readouterr().out
    assert "multi-query associative recall\n" in told
    assert "seq_len=256" in told
    assert "it was trained on data=mqar, not on these data: associative recall" in " ".join(told.split())
    assert "not trained on text" in told
    assert tell(monkeypatch, f"model={reader['folder']}", "suite=longrange") == 0
    told = capsys.readouterr().out
    assert "position=64-127" in told
    assert "depth=0.5" in told


def test_suites_name_data_that_exist() -> None:
    entries = [entry for suite in SUITES.values() for entry in suite]
    for entry in entries:
        base = {"path": "a.txt"} if entry.data == "text" else {}
        assert data_config(entry.data, base, entry.words(base))
    trained_for = {entry.data for entry in entries if entry.kind == "labels"}
    assert trained_for == set(list_data()) - {"pystdlib", "text"}


def test_longrange_asks_for_more_than_the_training() -> None:
    longer = {entry.data: entry.longer for entry in SUITES["longrange"] if callable(entry.longer)}

    def asked(config: DataConfig) -> dict[str, str]:
        name = "mqar" if isinstance(config, MQARConfig) else "listops"
        return dict(word.removeprefix("data.").split("=") for word in longer[name](config))

    assert asked(MQARConfig())["test_lengths"] == "[32,64,128,256]"
    assert asked(MQARConfig(seq_len=64, num_pairs=8))["test_lengths"] == "[64,128,256,512]"
    assert asked(MQARConfig(preset="based_recall")) == {}, "its own test is longer than its training"
    lists = asked(ListOpsConfig(preset="tiny"))
    assert (lists["min_length"], lists["max_length"], lists["max_depth"]) == ("33", "64", "6")


def test_several_models_make_a_table_of_lengths(recall: dict, reader: dict, monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "matrix.csv"
    models = f"models=[{recall['folder']},{reader['folder']}]"
    words = ["data=mqar", "data.test_lengths=[32,64]", "data.test_examples=16", "data.num_examples=64"]
    assert tell(monkeypatch, models, *words, f"out={out}") == 0
    assert "accuracy by length" in capsys.readouterr().out
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [(line["model"], line["tested_at"]) for line in lines] == [
        (run["folder"], length) for run in (recall, reader) for length in ("32", "64")
    ]
    module = DataModule(data_config("mqar", {}, tuple(words[1:])), 0)
    metrics = evaluate(zoo.load_pretrained(recall["folder"]), module)
    assert [float(line["acc"]) for line in lines[:2]] == [metrics["acc/seq_len=32"], metrics["acc/seq_len=64"]]
    assert tell(monkeypatch, models, "data=nonsense") == 2
    assert tell(monkeypatch, models, f"model={recall['folder']}") == 2
    assert tell(monkeypatch, models, "suite=longrange") == 2


def test_a_length_counts_with_all_shorter_ones() -> None:
    assert Row("a", 64, {64: 1.0, 256: 0.95, 128: 0.9, 512: 0.2, 1024: 1.0}).effective == 256
    assert Row("a", None, {64: 0.89, 128: 1.0}).effective is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data=nonsense"], "no dataset 'nonsense'"),
        (["suite=short"], "suite='short' is not valid: expected longrange or text"),
        (["data=mqar", "suite=longrange"], "one of the two"),
        (["suite=longrange", "data.seq_len=3"], "sets one dataset"),
        (["data.seq_length=3"], "did you mean"),
        (["out=/nowhere/at/all.json"], "no such folder"),
        (["out=results.csv"], "a .csv is for models="),
        (["batches=0"], "at least 1"),
    ],
)
def test_bad_words_are_one_line(words: list[str], line: str, recall: dict, monkeypatch, capsys) -> None:
    assert tell(monkeypatch, f"model={recall['folder']}", *words) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


def test_perplexity_by_position_is_that_of_each_bucket(reader: dict) -> None:
    model, source = zoo.load_pretrained(reader["folder"]), data_of(reader).source
    rows = windows(source, "test", 300, 5)
    assert rows.shape == (5, 301)
    results = by_position(model, rows, chunk=64)
    nats = -zoo.score(model, rows)
    begin, end = 2 * FIRST_BUCKET, 4 * FIRST_BUCKET
    assert results["perplexity/position=128-255"] == pytest.approx(nats[:, begin:end].mean().exp().item(), rel=1e-5)
    assert results["low/position=128-255"] < results["perplexity/position=128-255"] < results["high/position=128-255"]
    assert results["gain"] == pytest.approx((nats[:, 64:87].mean() - nats[:, -23:].mean()).item(), abs=1e-5)
    with pytest.raises(DataError, match="no document"):
        windows(source, "test", 10**8, 5)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_number_stands_where_it_should(depth: float) -> None:
    prompt = hidden_number(2000, depth, 12345)
    assert len(prompt) == 2000
    assert prompt.count("12345") == 2
    assert prompt.index("12345") / 2000 == pytest.approx(0.07 + 0.86 * depth, abs=0.05)


def test_by_position_wants_a_model_of_next_tokens() -> None:
    with pytest.raises(ConfigError, match="causal=false"):
        by_position(zoo.create_model("mamba", vocab_size=256, causal=False), torch.zeros(1, 80, dtype=torch.long))
