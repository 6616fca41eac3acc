"""Published checkpoints, both ways: made by `transformers` at random, loaded here, written here, opened there."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import zoo

from .published import VOCAB, assert_equal_weights, assert_same_function, randomised, reopened

SMALL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
ATTENTION = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
ATTENTION |= {"intermediate_size": 48, "max_position_embeddings": 64}


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **settings}}


LLAMAS = {
    "plain": (LlamaForCausalLM, LlamaConfig(**ATTENTION)),
    "grouped queries, tied, odd sizes": (
        LlamaForCausalLM,
        LlamaConfig(
            **ATTENTION
            | {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 37},
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
        ),
    ),
    "biases": (LlamaForCausalLM, LlamaConfig(**ATTENTION, attention_bias=True, mlp_bias=True)),
    "linear": (LlamaForCausalLM, LlamaConfig(**ATTENTION, **rope("linear", factor=2.5))),
    "dynamic": (LlamaForCausalLM, LlamaConfig(**ATTENTION, **rope("dynamic", factor=2.0))),
    "yarn": (
        LlamaForCausalLM,
        LlamaConfig(**ATTENTION, **rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=20.0)),
    ),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(
            **ATTENTION,
            **rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            ),
        ),
    ),
    "longrope": (
        LlamaForCausalLM,
        LlamaConfig(
            **ATTENTION | {"max_position_embeddings": 256},
            # Generation stays below it: beyond, transformers keeps the keys that it rotated by the short factors.
            **rope(
                "longrope",
                factor=4.0,
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[2.0, 3.0, 4.0, 5.0],
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**ATTENTION | {"num_key_value_heads": 2}, sliding_window=9)),
    "mistral without a window": (MistralForCausalLM, MistralConfig(**ATTENTION, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**ATTENTION | {"num_key_value_heads": 2})),
    "qwen2, tied, a window": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **ATTENTION, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=0
        ),
    ),
}
STATE_SPACE = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MAMBAS = {
    "plain": (MambaForCausalLM, MambaConfig(**STATE_SPACE)),
    "odd sizes": (
        MambaForCausalLM,
        MambaConfig(**STATE_SPACE | {"hidden_size": 21, "state_size": 5}, conv_kernel=3, expand=3, time_step_rank=7),
    ),
    "untied": (MambaForCausalLM, MambaConfig(**STATE_SPACE, tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
}
MAMBA2S = {
    "plain": (Mamba2ForCausalLM, Mamba2Config(**STATE_SPACE, num_heads=8, head_dim=8, n_groups=1)),
    "odd sizes, tied": (
        Mamba2ForCausalLM,
        Mamba2Config(
            **STATE_SPACE | {"hidden_size": 21, "state_size": 5},
            conv_kernel=3,
            expand=3,
            num_heads=9,
            head_dim=7,
            n_groups=3,
            tie_word_embeddings=True,
        ),
    ),
    "step sizes limited": (
        Mamba2ForCausalLM,
        Mamba2Config(**STATE_SPACE, num_heads=4, head_dim=16, n_groups=2, time_step_limit=(0.0, 1.5)),
    ),
}
CAUSAL = {
    f"{family}, {name}": case
    for family, cases in {"llama": LLAMAS, "mamba": MAMBAS, "mamba2": MAMBA2S}.items()
    for name, case in cases.items()
}


def make(kind, config):
    return randomised(kind(config))


@pytest.mark.parametrize(("kind", "config"), CAUSAL.values(), ids=CAUSAL)
def test_there_and_back(kind, config, tmp_path) -> None:
    theirs = make(kind, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load_pretrained(tmp_path / "theirs")
    assert not ours.training
    assert_same_function(ours, theirs)

    zoo.save_pretrained(ours, tmp_path / "back", format="transformers")
    back = reopened(kind, tmp_path / "back")
    assert_equal_weights(back, theirs)
    assert_same_function(ours, back)

    again = zoo.load_pretrained(tmp_path / "back")
    assert again.config == ours.config
    assert_equal_weights(again, ours)
    zoo.save_pretrained(ours, tmp_path / "own")
    assert_equal_weights(zoo.load_pretrained(tmp_path / "own"), ours)


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_scaled_positions_as_older_files_have_them(name, key, tmp_path) -> None:
    theirs = make(*LLAMAS[name])
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = {key: rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same_function(zoo.load_pretrained(tmp_path), theirs, time=100, generate=False)  # longer than the original


MADE_HERE = {
    "transformer": {"d_ff": 40, "n_heads": 4, "n_kv_heads": 2},
    "transformer, untied, ntk": {
        "tie_embeddings": False,
        "rope_scaling": {"type": "ntk", "factor": 3.0},
        "trained_length": 64,
    },
    "mamba": {"dt_rank": 3},
    "mamba2": {"head_dim": 8, "n_groups": 2, "dt_limit_max": 0.7},
}
CLASSES = {"transformer": LlamaForCausalLM, "mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}


@pytest.mark.parametrize(("name", "settings"), MADE_HERE.items(), ids=MADE_HERE)
def test_made_here_opens_there(name, settings, tmp_path) -> None:
    architecture = name.partition(",")[0]
    ours = randomised(zoo.create_model(architecture, vocab_size=VOCAB, d_model=32, **settings))
    zoo.save_pretrained(ours, tmp_path, format="transformers")
    assert_same_function(ours, reopened(CLASSES[architecture], tmp_path))
    assert_equal_weights(zoo.load_pretrained(tmp_path), ours)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_and_pickles(safe, tmp_path) -> None:
    theirs = make(*LLAMAS["biases"])
    if safe:
        theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    else:
        theirs.config.save_pretrained(tmp_path)
        names = list(theirs.state_dict())
        places = {name: f"pytorch_model-0000{1 + i % 3}-of-00003.bin" for i, name in enumerate(names)}
        for file in set(places.values()):
            held = {name: tensor for name, tensor in theirs.state_dict().items() if places[name] == file}
            torch.save(held, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert len(list(tmp_path.glob("*-of-*"))) > 2
    ours = zoo.load_pretrained(tmp_path)
    assert_same_function(ours, theirs)

    zoo.save_pretrained(ours, tmp_path / "back", format="transformers", max_shard_bytes=10_000)
    assert len(list((tmp_path / "back").glob("*-of-*"))) > 2
    assert_equal_weights(reopened(LlamaForCausalLM, tmp_path / "back"), theirs)
    zoo.save_pretrained(ours, tmp_path / "back", format="transformers")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("zipped", [True, False])
def test_one_pickle(zipped, tmp_path) -> None:
    theirs = make(*MAMBAS["plain"])
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_function(zoo.load_pretrained(tmp_path), theirs)


ORIGINALS = {
    "mamba": (MAMBAS["odd sizes"], {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7}, 8),
    "mamba, defaults": (
        (MambaForCausalLM, MambaConfig(**STATE_SPACE | {"state_size": 16})),
        {},
        61,
    ),
    "mamba, untied": (MAMBAS["untied"], {"d_state": 8}, 61),
    "mamba2": (
        MAMBA2S["odd sizes, tied"],
        {"layer": "Mamba2", "d_state": 5, "d_conv": 3, "expand": 3, "headdim": 7, "ngroups": 3},
        16,
    ),
    "mamba2, defaults": (
        (
            Mamba2ForCausalLM,
            Mamba2Config(
                **STATE_SPACE | {"state_size": 128, "tie_word_embeddings": True}, num_heads=1, head_dim=64, n_groups=1
            ),
        ),
        {"layer": "Mamba2"},
        61,
    ),
    "mamba2, limited": (
        MAMBA2S["step sizes limited"],
        {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2, "dt_limit": [0.0, 1.5], "chunk_size": 64},
        61,
    ),
}


@pytest.mark.parametrize(("case", "ssm_cfg", "multiple"), ORIGINALS.values(), ids=ORIGINALS)
def test_original_layout(case, ssm_cfg, multiple, tmp_path) -> None:
    kind, config = case
    padded = math.ceil(VOCAB / multiple) * multiple
    config = type(config)(**config.to_dict() | {"vocab_size": padded, "layer_norm_epsilon": 1e-5})
    theirs = make(kind, config)
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert "lm_head.weight" in weights  # as the originals have it, tied or not
    torch.save(weights, tmp_path / "pytorch_model.bin")
    description = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": VOCAB,
        "ssm_cfg": ssm_cfg,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": config.tie_word_embeddings,
    }
    (tmp_path / "config.json").write_text(json.dumps(description))
    ours = zoo.load_pretrained(tmp_path)
    assert ours.config.vocab_size == padded
    assert_same_function(ours, theirs)
    zoo.save_pretrained(ours, tmp_path / "back", format="transformers")
    assert_equal_weights(reopened(kind, tmp_path / "back"), theirs)
