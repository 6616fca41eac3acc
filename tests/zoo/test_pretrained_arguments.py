"""Arguments that make no sense, and files of absurd sizes: one line each, before anything is built or written."""

from __future__ import annotations

import json
import re
import runpy
import sys

import pytest
import torch

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError, ZooError

NAME = "transformer-mqar-nano"


@pytest.fixture
def folder(tmp_path):
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=7, d_model=8), tmp_path / "ours")
    zoo.save_pretrained(zoo.load_pretrained(tmp_path / "ours"), tmp_path / "theirs", format="transformers")
    return tmp_path


def assert_refused(kind: type[ZooError], message: str, call, *args, **kwargs) -> None:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [None, 5, b"mamba", ["mamba"], "", "x" * 5000, "~nobody-of-that-name/model"])
def test_names_that_are_none(name) -> None:
    for call in (zoo.load_pretrained, zoo.load_tokenizer):
        assert_refused(ConfigError, "names no model and no folder", call, name)


def test_names_that_no_file_can_have() -> None:
    for name in ("x" * 300, "x\0y", "\udc80/" + "y" * 300, "no\nsuch"):
        with pytest.raises(CheckpointError, match="no folder"):
            zoo.load_pretrained(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is no type of weights: expected one of float16, bfloat16, float32, float64"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no type of weights"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64 is no type of weights"),
        ({"dtype": 5}, "dtype=5 is no type of weights"),
        ({"device": "nosuch"}, "device='nosuch' cannot be used here: pass device=cpu"),
        ({"device": "cuda:77"}, "device='cuda:77' cannot be used here"),
        ({"device": []}, "device='[]' cannot be used here"),
        ({"rope_scaling": 5}, "rope_scaling=5 names no type"),
        ({"rope_scaling": {}}, "rope_scaling={} names no type"),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling={'factor': 8} names no type"),
        ({"rope_scaling": {"type": "yarn", 5: 8}}, "names no type: expected its name, or settings"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "rope_type"),
        ({"cache": 5}, "cache=5 names no type"),
        ({"cache": {"rope_type": "window"}}, "cache={'rope_type': 'window'} names no type"),
    ],
)
def test_settings_of_loading(settings, message) -> None:
    assert_refused(ConfigError, message, zoo.load_pretrained, NAME, **settings)


def test_types_by_name_and_the_other_word_for_a_scaling() -> None:
    for name in ("bfloat16", "torch.bfloat16"):
        assert zoo.load_pretrained(NAME, dtype=name).norm.weight.dtype == torch.bfloat16
    model = zoo.load_pretrained(NAME, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert model.config.rope_scaling == {"type": "linear", "factor": 2.0}


def test_places_and_things_that_cannot_be_saved(tmp_path) -> None:
    model = zoo.create_model("mamba", vocab_size=7, d_model=8)
    (tmp_path / "file").write_text("kept")
    for format in ("zoo", "transformers"):
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            assert_refused(CheckpointError, "cannot be written", zoo.save_pretrained, model, place, format=format)
    assert (tmp_path / "file").read_text() == "kept"
    for place in ("", None, 5):
        assert_refused(ConfigError, "names no model and no folder", zoo.save_pretrained, model, place)
    assert_refused(ConfigError, "a Linear cannot be saved", zoo.save_pretrained, torch.nn.Linear(1, 1), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def describe(place, **changes) -> None:
    told = json.loads((place / "config.json").read_text())
    told.get("config", told).update(changes)
    (place / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("ours", {"n_layers": 10**6}, "has n_layers=1000000, which the 22 tensors in"),
        ("theirs", {"num_hidden_layers": 10**6}, "has num_hidden_layers=1000000, which the"),
        ("ours", {"vocab_size": 10**18}, "has vocab_size=1000000000000000000, which the"),
        ("theirs", {"vocab_size": 10**18}, "has vocab_size=1000000000000000000, which the"),
        ("ours", {"d_state": 10**18}, "describes no model that can be built ("),
        ("theirs", {"state_size": 10**18}, "describes no model that can be built ("),
    ],
)
def test_sizes_that_the_file_cannot_fill(which, changes, message, folder) -> None:
    describe(folder / which, **changes)
    assert_refused(CheckpointError, message, zoo.load_pretrained, folder / which)


def test_json_of_absurd_depth_and_length(folder) -> None:
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (folder / "ours" / "config.json").write_text(text)
        for call in (zoo.load_pretrained, zoo.load_tokenizer):
            assert_refused(CheckpointError, "config.json is damaged", call, folder / "ours")


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("mamba", "'mamba-mqar-nano' or 'mamba-pystdlib-nano' or 'mamba2-mqar-nano'"),
        ("Mamba-MQAR-nano", "'mamba-mqar-nano'"),
        ("mamba-mqar-nono", "'mamba-mqar-nano'"),
        ("smollm2-135", "'smollm2-135m'"),
    ],
)
def test_near_names(name, guess) -> None:
    assert_refused(CheckpointError, f"did you mean {guess}", zoo.load_pretrained, name)


def test_files_that_are_no_models(folder) -> None:
    path = folder / "ours" / "config.json"
    assert_refused(CheckpointError, "config.json is no file of weights: give the folder", zoo.load_pretrained, path)
    for name in ("a.pth", "b.pth"):
        (folder / name).write_bytes(b"")
    assert_refused(CheckpointError, "holds a.pth and b.pth: give the path of one", zoo.load_pretrained, folder)


def test_a_prompt_that_is_no_text(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "model=mamba-pystdlib-nano", "prompt=a\udcff"])
    main = runpy.run_module("zoo.generate", alter_sys=True)["main"]
    assert_refused(ConfigError, "prompt= is no UTF-8 at character 1", main)
