"""Logits, loss and every gradient against `transformers`, with copied random weights: an oracle nobody here wrote."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import zoo

from .parity import Kept, assert_parity, copy_weights, randomise

LLAMA_SIZES = {
    "plain": {"d_model": 32, "n_heads": 4, "d_ff": 48},
    "grouped queries, untied": {"d_model": 48, "n_heads": 6, "n_kv_heads": 2, "d_ff": 56, "tie_embeddings": False},
    "odd sizes": {"d_model": 30, "n_heads": 3, "n_kv_heads": 1, "d_ff": 37, "rope_base": 500.0, "n_layers": 3},
    "window": {"d_model": 32, "n_heads": 2, "d_ff": 40, "window": 9},
    "window, grouped queries": {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "window": 63},
}
MAMBA_SIZES = {
    "plain": {"d_model": 32},
    "odd sizes": {"d_model": 21, "d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "n_layers": 3},
    "untied": {"d_model": 24, "d_state": 8, "tie_embeddings": False},
}
MAMBA2_SIZES = {
    "plain": {"d_model": 32, "d_state": 16, "head_dim": 8},
    "odd sizes": {"d_model": 21, "d_state": 5, "d_conv": 3, "expand": 3, "head_dim": 7, "n_groups": 3, "n_layers": 3},
    "untied, step sizes limited": {"d_model": 24, "d_state": 8, "tie_embeddings": False}
    | {"dt_limit_min": 0.02, "dt_limit_max": 1.0},
}
RWKV4_SIZES = {
    "plain": {"d_model": 32},
    "odd sizes": {"d_model": 21, "d_ff": 50, "n_layers": 3},
}


def llama(ours: zoo.Model) -> tuple[nn.Module, dict[str, Any]]:
    """A Llama, or a Mistral where there is a window, and for each of its parameters the name of ours."""
    c = ours.config
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads or c.n_heads,
        "intermediate_size": c.d_ff,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "tie_word_embeddings": c.tie_embeddings,
        "rms_norm_eps": c.norm_eps,
        "attn_implementation": "sdpa",
    }
    if c.window is None:
        theirs = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        theirs = MistralForCausalLM(MistralConfig(**sizes, sliding_window=c.window))
    names = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    parts: dict[str, tuple[str, slice]] = {}
    if not c.tie_embeddings:
        names["lm_head.weight"] = "head.weight"
    head = c.d_model // c.n_heads
    kv = (c.n_kv_heads or c.n_heads) * head
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        names[f"{layer}.input_layernorm.weight"] = f"{block}.norms.0.weight"
        names[f"{layer}.post_attention_layernorm.weight"] = f"{block}.norms.1.weight"
        names[f"{layer}.self_attn.o_proj.weight"] = f"{block}.mixers.0.out_proj.weight"
        names[f"{layer}.mlp.down_proj.weight"] = f"{block}.mixers.1.down_proj.weight"
        qkv, up = f"{block}.mixers.0.qkv_proj.weight", f"{block}.mixers.1.up_proj.weight"
        parts[f"{layer}.self_attn.q_proj.weight"] = (qkv, slice(0, c.d_model))
        parts[f"{layer}.self_attn.k_proj.weight"] = (qkv, slice(c.d_model, c.d_model + kv))
        parts[f"{layer}.self_attn.v_proj.weight"] = (qkv, slice(c.d_model + kv, c.d_model + 2 * kv))
        parts[f"{layer}.mlp.gate_proj.weight"] = (up, slice(0, c.d_ff))
        parts[f"{layer}.mlp.up_proj.weight"] = (up, slice(c.d_ff, 2 * c.d_ff))
    return theirs, names | parts


def mamba(ours: zoo.Model) -> tuple[nn.Module, dict[str, str]]:
    c = ours.config
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            state_size=c.d_state,
            conv_kernel=c.d_conv,
            expand=c.expand,
            time_step_rank=c.dt_rank or -(-c.d_model // 16),
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            use_cache=False,
        )
    )
    names = {"backbone.embeddings.weight": "embedding.weight", "backbone.norm_f.weight": "norm.weight"}
    if not c.tie_embeddings:
        names["lm_head.weight"] = "head.weight"
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}.mixers.0", f"backbone.layers.{i}"
        names[f"{layer}.norm.weight"] = f"blocks.{i}.norms.0.weight"
        for part in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"):
            names[f"{layer}.mixer.{part}"] = f"{block}.{part}"
        names[f"{layer}.mixer.out_proj.weight"] = f"{block}.out_proj.weight"
        names[f"{layer}.mixer.conv1d.weight"] = f"{block}.conv.weight"
        names[f"{layer}.mixer.conv1d.bias"] = f"{block}.conv.bias"
    return theirs, names


def mamba2(ours: zoo.Model) -> tuple[nn.Module, dict[str, str]]:
    c = ours.config
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            state_size=c.d_state,
            conv_kernel=c.d_conv,
            expand=c.expand,
            num_heads=c.n_heads,
            head_dim=c.d_inner // c.n_heads,
            n_groups=c.n_groups,
            time_step_limit=(c.dt_limit_min, c.dt_limit_max or math.inf),
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            use_cache=False,
        )
    )
    names = {"backbone.embeddings.weight": "embedding.weight", "backbone.norm_f.weight": "norm.weight"}
    if not c.tie_embeddings:
        names["lm_head.weight"] = "head.weight"
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}.mixers.0", f"backbone.layers.{i}"
        names[f"{layer}.norm.weight"] = f"blocks.{i}.norms.0.weight"
        for part in ("in_proj.weight", "dt_bias", "A_log", "D", "out_proj.weight"):
            names[f"{layer}.mixer.{part}"] = f"{block}.{part}"
        names[f"{layer}.mixer.norm.weight"] = f"{block}.norm_weight"
        names[f"{layer}.mixer.conv1d.weight"] = f"{block}.conv.weight"
        names[f"{layer}.mixer.conv1d.bias"] = f"{block}.conv.bias"
    return theirs, names


def rwkv4(ours: zoo.Model) -> tuple[nn.Module, dict[str, Any]]:
    c = ours.config
    theirs = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=c.vocab_size,
            context_length=4096,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            intermediate_size=c.d_ff or 4 * c.d_model,
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            use_cache=False,
        )
    )
    theirs.train()  # in evaluation it rescales its weights in place
    names: dict[str, Any] = {"rwkv.embeddings.weight": "embedding.weight", "head.weight": "head.weight"}
    norms = {"rwkv.blocks.0.pre_ln": "embedding_norm", "rwkv.ln_out": "norm"}
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}.mixers", f"rwkv.blocks.{i}"
        norms |= {f"{layer}.ln1": f"blocks.{i}.norms.0", f"{layer}.ln2": f"blocks.{i}.norms.1"}
        for part in ("time_decay", "time_first"):
            names[f"{layer}.attention.{part}"] = f"{block}.0.{part}"
        for part in ("key", "value", "receptance", "output"):
            names[f"{layer}.attention.{part}.weight"] = f"{block}.0.{part}.weight"
        for part in ("key", "value", "receptance"):
            names[f"{layer}.feed_forward.{part}.weight"] = f"{block}.1.{part}.weight"
        for row, part in enumerate(("key", "value", "receptance")):
            names[f"{layer}.attention.time_mix_{part}"] = Kept(f"{block}.0.shift.mu", row)
        for row, part in enumerate(("key", "receptance")):
            names[f"{layer}.feed_forward.time_mix_{part}"] = Kept(f"{block}.1.shift.mu", row)
    return theirs, names | {f"{a}.{kind}": f"{b}.{kind}" for a, b in norms.items() for kind in ("weight", "bias")}


CASES = [("transformer", llama, size) for size in LLAMA_SIZES.items()]
CASES += [("mamba", mamba, size) for size in MAMBA_SIZES.items()]
CASES += [("mamba2", mamba2, size) for size in MAMBA2_SIZES.items()]
CASES += [("rwkv4", rwkv4, size) for size in RWKV4_SIZES.items()]


@pytest.mark.parametrize("time", [1, 63, 130])
@pytest.mark.parametrize(("name", "build", "size"), CASES, ids=[f"{n}, {s[0]}" for n, _, s in CASES])
def test_logits_loss_and_gradients(name, build, size, time) -> None:
    ours = zoo.create_model(name, vocab_size=53, **size[1])
    randomise(ours)
    theirs, sources = build(ours)
    copy_weights(ours, theirs, sources)
    tokens, targets = torch.randint(53, (2, time)), torch.randint(53, (2, time))
    # A lone token has nothing to attend to.
    assert_parity(ours, theirs, sources, ours(tokens).logits, theirs(tokens).logits, targets, lambda _: time == 1)
