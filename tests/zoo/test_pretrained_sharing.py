"""What is uploaded, what is written, and that a model which is saved again has lost nothing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.layers.attention import BERT
from zoo.pretrained.hub import model_card

BUNDLED = "mamba-mqar-nano"
TOKENIZER_FILES = ["vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.model", "generation_config.json"]


@pytest.fixture
def uploaded(monkeypatch):
    """The contents of the files that would go to the hub, by name."""
    files: dict[str, bytes] = {}

    def take(folder, *_: object) -> str:
        files.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return "address"

    monkeypatch.setattr("zoo.pretrained.hub._upload", take)
    return files


@pytest.fixture
def pickled(tmp_path):
    """A folder as published, with a pickle of parameters."""
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=7, d_model=8), tmp_path, format="transformers")
    safe = tmp_path / "model.safetensors"
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in load_file(safe).items()}
    torch.save(parameters, tmp_path / "pytorch_model.bin")
    safe.unlink()
    return tmp_path


def test_a_pickle_of_parameters(pickled) -> None:
    model = zoo.load_pretrained(pickled)
    assert all(parameter.is_leaf for parameter in model.parameters())
    expected = torch.load(pickled / "pytorch_model.bin")["backbone.norm_f.weight"]
    assert torch.equal(model.norm.weight, expected)


def test_a_pickle_with_numbers_for_names(pickled) -> None:
    torch.save({1: torch.ones(1)}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds tensors whose names are no text"):
        zoo.load_pretrained(pickled)


def test_all_that_loading_needs_is_uploaded(pickled, uploaded) -> None:
    for name in [*TOKENIZER_FILES, "notes.txt", "optimizer.pt"]:
        (pickled / name).write_text("{}")
    zoo.push_to_hub(pickled, "me/mamba")
    assert uploaded.keys() == {"config.json", "pytorch_model.bin", "README.md", *TOKENIZER_FILES}


def test_shards_are_uploaded_with_their_index(uploaded, tmp_path) -> None:
    model = zoo.create_model("mamba", vocab_size=7, d_model=8)
    zoo.save_pretrained(model, tmp_path, format="transformers", max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*-of-*"))) > 1
    zoo.push_to_hub(tmp_path, "me/mamba")
    assert uploaded.keys() == {path.name for path in tmp_path.iterdir()} | {"README.md"}


def test_a_folder_without_weights_is_not_uploaded(pickled, uploaded) -> None:
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        zoo.push_to_hub(pickled, "me/mamba")
    assert not uploaded


def test_names_are_uploaded_and_files_are_not(uploaded, tmp_path) -> None:
    assert zoo.push_to_hub(BUNDLED, "me/mamba") == "address"
    assert uploaded.keys() == {"config.json", "model.safetensors", "README.md"}
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match="a file of weights alone"):
        zoo.push_to_hub(tmp_path / "a.pth", "me/mamba")


@pytest.mark.parametrize("repo_id", [5, None, "", "mamba", "me/", "/mamba", "a/b/c", "a/b\n", "../b", "x" * 5000])
def test_ids_that_are_none(repo_id, uploaded) -> None:
    with pytest.raises(ConfigError, match='expected "owner/repository"') as caught:
        zoo.push_to_hub(zoo.create_model("mamba", vocab_size=7, d_model=8), repo_id)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)
    assert not uploaded


@pytest.mark.parametrize("format", ["zoo", "transformers"])
@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_weights_get_the_mode_of_the_other_files(format, tmp_path) -> None:
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=7, d_model=8), tmp_path, format=format)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_tokenizer_is_kept(tmp_path, uploaded) -> None:
    model = zoo.load_pretrained("mamba-pystdlib-nano")
    zoo.save_pretrained(model, tmp_path / "ours")
    assert zoo.load_tokenizer(tmp_path / "ours").encode("ab") == [97, 98]
    zoo.push_to_hub(model, "me/mamba")
    assert json.loads(uploaded["config.json"])["tokenizer"] == {"kind": "bytes"}
    words = Tokenizer(models.WordLevel({"def": 0, "x": 1}, unk_token="x")).to_str()
    zoo.save_pretrained(
        model, tmp_path / "other", format="transformers", tokenizer={"kind": "tokenizers", "json": words}
    )
    for format in ("zoo", "transformers"):
        zoo.save_pretrained(zoo.load_pretrained(tmp_path / "other"), tmp_path / format, format=format)
        assert zoo.load_tokenizer(tmp_path / format).encode("def") == [0]
    assert zoo.create_model("mamba", vocab_size=7, d_model=8).tokenizer is None


def test_a_tokenizer_that_is_no_text(tmp_path) -> None:
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=7, d_model=8), tmp_path, format="transformers")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        zoo.load_pretrained(tmp_path)


def test_the_card_of_a_longformer_says_what_it_needs(uploaded, tmp_path) -> None:
    settings = {**BERT, "max_positions": 32, "n_heads": 2}
    model = zoo.create_model("longformer", vocab_size=7, d_model=8, **settings)
    zoo.push_to_hub(model, "me/long", format="transformers")
    assert b"the first 1 of each sequence must be marked in `global_attention_mask`" in uploaded["README.md"]
    uploaded.clear()
    model = zoo.create_model("longformer", vocab_size=7, d_model=8, **settings, n_global=0)
    zoo.save_pretrained(model, tmp_path, format="transformers")
    zoo.push_to_hub(tmp_path, "me/long")
    assert b"global_attention_mask" not in uploaded["README.md"]


def test_the_figures_of_a_card() -> None:
    metrics = {
        "train": {"loss": 0.5, "lr": 0.25, "grad_norm": 2.0},
        "test": {"acc": 0.75, "acc/pairs=4": 0.75, "exact": 0.5, "exact/pairs=4": 0.375, "exact/pairs=8": 0.625},
    }
    card = model_card("me/thing", "mamba", {"metrics": metrics}, None)
    rows = [line for line in card.splitlines() if line.startswith(("| train", "| test"))]
    assert rows == [
        "| train | loss | 0.5 |",
        "| test | acc | 0.75 |",
        "| test | exact | 0.5 |",
        "| test | exact/pairs=4 | 0.375 |",
        "| test | exact/pairs=8 | 0.625 |",
    ]
