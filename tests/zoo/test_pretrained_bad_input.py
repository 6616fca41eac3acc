"""Damaged, foreign and hostile checkpoints: one clear line each, nothing executed, nothing half-loaded."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError

from .published import VOCAB, randomised

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def folder(tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **SIZES)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **SIZES))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    return tmp_path


def assert_one_line(folder, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        zoo.load_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def edit(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def settings(folder, **changes) -> None:
    description = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(description))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda w: w.pop(NORM),
            ["does not fit its config.json (llama): missing ['model.norm.weight'], unexpected nothing"],
        ),
        (lambda w: w.update(more=torch.ones(1)), ["missing nothing, unexpected ['more']"]),
        (lambda w: w.update({NORM: torch.ones(3)}), ["model.norm.weight has shape (3,)", "wants (16,)"]),
        (lambda w: w.update({NORM: w[NORM].int()}), ["is of type torch.int32", "quantised"]),
        (lambda w: w.update({f"x{i}": torch.ones(1) for i in range(30)}), ["'x0'", "and 22 more"]),
        (lambda w: w.pop("lm_head.weight"), ["missing ['lm_head.weight']"]),
    ],
)
def test_tensors_are_accounted_for(folder, change, parts) -> None:
    edit(folder, change)
    assert_one_line(folder, *parts)


def test_inert_tensors_are_none_too_many(folder) -> None:
    edit(folder, lambda w: w.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    zoo.load_pretrained(folder)


def test_a_head_that_is_said_to_be_tied(folder) -> None:
    settings(folder, tie_word_embeddings=True)
    assert_one_line(folder, "lm_head.weight is not model.embed_tokens.weight, though its config.json (llama) ties them")


def header(folder, change) -> None:
    """Writes another header over the same data."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    told = json.loads(content[8 : 8 + size])
    change(told)
    text = json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        lambda f: (f / "model.safetensors").write_bytes(b""),
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        lambda f: (f / "model.safetensors").write_bytes(b"PK" + bytes(99)),
        lambda f: header(f, lambda h: h[NORM].update(data_offsets=[0, 1 << 40])),
        lambda f: header(f, lambda h: h[NORM].update(shape=[1 << 40])),
        lambda f: header(f, lambda h: h[NORM].update(dtype="F99")),
        lambda f: header(f, lambda h: h.pop(NORM)),
    ],
)
def test_damaged_safetensors(folder, damage) -> None:
    damage(folder)
    assert_one_line(folder, "model.safetensors cannot be read (")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (
            lambda f: sorted(f.glob("*-of-*"))[2].unlink(),
            ["lacks model-00003-of-", "which model.safetensors.index.json"],
        ),
        (lambda f: index(f, lambda m: m.update({NORM: "../../etc/passwd"})), ["no name of a file beside it"]),
        (lambda f: index(f, lambda m: m.update({NORM: 7})), ["index.json is damaged"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), ["index.json is damaged"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["index.json is damaged"]),
    ],
)
def test_shards(sharded, damage, parts) -> None:
    damage(sharded)
    assert_one_line(sharded, *parts)


def index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    told = json.loads(path.read_text())
    change(told["weight_map"])
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gemma9"}, ["has model_type 'gemma9': known: big_bird"]),
        ({"model_type": "lama"}, ["did you mean 'llama'"]),
        ({"model_type": ["llama"]}, ["has model_type ['llama']"]),
        ({"hidden_size": "wide"}, ["config.json"]),
        ({"hidden_size": None}, ["config.json"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"head_dim": 12}, ["heads of width 12"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "expected 'silu'"]),
        ({"attention_bias": True}, ["mlp_bias=False", "expected True"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["rotary positions of type 'spiral'"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": -1}},
            ["config.json describes no model (rope_scaling.factor"],
        ),
        ({"rope_parameters": 7}, ["config.json is damaged"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_hidden_layers": 3}, ["missing ['model.layers.2.input_layernorm.weight'", "and 1 more"]),
        ({"num_hidden_layers": 1}, ["unexpected ['model.layers.1.input_layernorm.weight'"]),
    ],
)
def test_settings(folder, changes, parts) -> None:
    settings(folder, **changes)
    assert_one_line(folder, *parts)


def test_folders_without(folder, tmp_path_factory) -> None:
    (folder / "model.safetensors").unlink()
    assert_one_line(folder, "holds no weights: expected model.safetensors or pytorch_model.bin")
    (folder / "config.json").write_text("{")
    assert_one_line(folder, "config.json is damaged")
    assert_one_line(tmp_path_factory.mktemp("empty"), "holds no model: expected config.json")
    assert_one_line("/nowhere/at/all", "no folder '/nowhere/at/all'")
    assert_one_line("./nowhere", "no folder 'nowhere'")


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mamba(tmp_path):
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    config.save_pretrained(tmp_path)
    model = randomised(MambaForCausalLM(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    zoo.load_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it(mamba, zipped) -> None:
    weights = torch.load(mamba / "pytorch_model.bin")
    weights["evil"] = Evil(mamba / "made")
    torch.save(weights, mamba / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_one_line(mamba, "pytorch_model.bin holds more than tensors", "nothing in it was run")
    assert not (mamba / "made").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "cannot be read"),
        (b"hello", "pytorch_model.bin"),
        (pickle.dumps({"a": 1}), "pytorch_model.bin"),
        (None, "cannot be read"),
    ],
)
def test_damaged_pickles(mamba, content, part) -> None:
    path = mamba / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    assert_one_line(mamba, part)


def test_a_pickle_of_something_else(mamba) -> None:
    torch.save({"weights": {"a": torch.ones(1)}}, mamba / "pytorch_model.bin")
    assert_one_line(mamba, "holds no plain dictionary of tensors")


def test_nothing_is_half_loaded(folder, monkeypatch) -> None:
    """An error in the last tensor leaves nothing behind, and a folder that cannot be written leaves the old model."""
    model = zoo.load_pretrained(folder)
    with pytest.raises(ConfigError, match=re.escape("format='onnx' is not known")):
        zoo.save_pretrained(model, folder, format="onnx")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        "zoo.pretrained.weights.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(CheckpointError, match=r"cannot be written \(disk full\)"):
        zoo.save_pretrained(model, folder, format="transformers")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hybrid", {}, "transformers has no hybrid like ours"),
        ("transformer", {"feed_forward": "gelu"}, "feed_forward='gelu' has no word"),
        ("transformer", {"rotary": False}, "rotary=False has no word"),
        ("transformer", {"bias": True, "window": 4}, "bias=true with window=4"),
        (
            "transformer",
            {"rope_scaling": {"type": "dynamic_yarn"}, "trained_length": 16},
            "rope_scaling={'type': 'dynamic_yarn'} has no word",
        ),
        (
            "transformer",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "form": "rotations"}, "trained_length": 16},
            "has no word in transformers",
        ),
        ("mamba", {"short_conv": False}, "short_conv=False has no word"),
        ("mamba2", {"norm": "layer"}, "norm='layer' has no word"),
        ("rwkv4", {"token_shift": False}, "token_shift=False has no word"),
    ],
)
def test_what_has_no_word_in_transformers(name, changes, message, tmp_path) -> None:
    model = zoo.create_model(name, vocab_size=7, d_model=16, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        zoo.save_pretrained(model, tmp_path / "never", format="transformers")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()
