"""Llama and what is shaped like it: Mistral (a sliding window), Qwen2 (biases of queries, keys and values).

Code Llama, TinyLlama, Yi and SmolLM2 call themselves llama.
"""

from __future__ import annotations

from typing import Any

from zoo.architectures.transformer import TransformerConfig
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.pretrained.convert import Link, Source, Table, link, norm_links
from zoo.pretrained.family import PLAIN_SHELL, Family, Published, insist
from zoo.pretrained.rope import read_rope, write_rope

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32}
"""Key/value heads where config.json is silent about them."""


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    kind = theirs("model_type")
    theirs.only("hidden_act", "silu")
    width, heads = theirs("hidden_size"), theirs("num_attention_heads")
    if (theirs("head_dim", None) or width // heads) * heads != width:
        raise CheckpointError(
            f"{theirs.where} has heads of width {theirs('head_dim')}, {heads} of which are not as wide as the model, "
            f"{width}: the zoo's attention knows no other width"
        )
    kv_heads = theirs("num_key_value_heads", KV_HEADS[kind]) or heads
    bias = theirs("attention_bias", False) if kind == "llama" else False
    if kind == "llama":
        theirs.only("mlp_bias", bias)
    return {
        "vocab_size": theirs("vocab_size"),
        "d_model": width,
        "n_layers": theirs("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": None if kv_heads == heads else kv_heads,
        "d_ff": theirs("intermediate_size"),
        "norm_eps": theirs("rms_norm_eps", 1e-6),
        "tie_embeddings": theirs("tie_word_embeddings", False),
        "bias": bias,
        "qkv_bias": True if kind == "qwen2" else None,
        "window": _window(theirs, kind),
        **read_rope(theirs),
    }


def _window(theirs: Published, kind: str) -> int | None:
    if kind == "mistral":
        return theirs("sliding_window", 4096)
    if kind == "llama" or not theirs("use_sliding_window", False):
        return None
    layers, first = theirs("num_hidden_layers"), theirs("max_window_layers", 28)
    if 0 < first < layers:
        raise CheckpointError(
            f"{theirs.where} has a window in the layers from max_window_layers={first} on only: the zoo's transformer "
            f"has it in all layers or in none"
        )
    return None if first >= layers else theirs("sliding_window", 4096)


def write(config: TransformerConfig) -> dict[str, Any]:
    """See `Family.write`."""
    qkv_bias = config.has_qkv_bias
    kind = "qwen2" if qkv_bias and not config.bias else "llama" if config.window is None else "mistral"
    insist(config, kind, **PLAIN_SHELL, rotary=True, feed_forward="swiglu", n_layers=config.n_layers)
    if config.bias and (kind == "mistral" or not qkv_bias):
        raise ConfigError(
            f"bias=true with window={config.window} and qkv_bias={config.qkv_bias} has no word in transformers: "
            f'save with format="zoo"'
        )
    theirs = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "intermediate_size": _hidden(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
    }
    if kind == "llama":
        return theirs | {"attention_bias": config.bias, "mlp_bias": config.bias}
    if kind == "mistral":
        return theirs | {"sliding_window": config.window}
    windowed = config.window is not None
    kinds = ["sliding_attention" if windowed else "full_attention"] * config.n_layers
    first = 0 if windowed else config.n_layers
    return theirs | {
        "use_sliding_window": windowed,
        "sliding_window": config.window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _hidden(config: TransformerConfig) -> int:
    return config.make_feed_forward(0).down_proj.in_features  # type: ignore[union-attr, return-value]


def table(config: TransformerConfig, theirs: Published) -> Table:
    """See `Family.table`."""
    kv = (config.n_kv_heads or config.n_heads) * (config.d_model // config.n_heads)
    rows = {"q": config.d_model, "k": kv, "v": kv}
    links = [link("embedding.weight", "model.embed_tokens.weight"), link("norm.weight", "model.norm.weight")]
    if not config.tie_embeddings:
        links.append(link("head.weight", "lm_head.weight"))
    for i in range(config.n_layers):
        ours, layer = f"blocks.{i}", f"model.layers.{i}"
        norms = {
            f"{ours}.norms.0": f"{layer}.input_layernorm",
            f"{ours}.norms.1": f"{layer}.post_attention_layernorm",
        }
        links += norm_links(norms, ["weight"])
        for kind in ("weight", "bias") if config.has_qkv_bias else ("weight",):
            parts = (Source(f"{layer}.self_attn.{part}_proj.{kind}", rows=count) for part, count in rows.items())
            links.append(Link(f"{ours}.mixers.0.qkv_proj.{kind}", tuple(parts)))
        kinds = ("weight", "bias") if config.bias else ("weight",)
        for kind in kinds:
            gate_up = tuple(Source(f"{layer}.mlp.{part}_proj.{kind}") for part in ("gate", "up"))
            links.append(Link(f"{ours}.mixers.1.up_proj.{kind}", gate_up))
        projections = {
            f"{ours}.mixers.0.out_proj": f"{layer}.self_attn.o_proj",
            f"{ours}.mixers.1.down_proj": f"{layer}.mlp.down_proj",
        }
        links += norm_links(projections, kinds)
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}
    return Table(links, copies, {})


FAMILY = Family(
    "llama",
    "transformer",
    read,
    table,
    write,
    model_types=("llama", "mistral", "qwen2"),
    inert=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
