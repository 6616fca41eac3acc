"""Mamba: the layout of transformers, and the original one, which differs in its settings and one name."""

from __future__ import annotations

import math
from typing import Any

from zoo.architectures.mamba import MambaConfig
from zoo.kernels.errors import CheckpointError, did_you_mean
from zoo.pretrained.convert import TAPS, Link, Table, link, norm_links
from zoo.pretrained.family import PLAIN_SHELL, Family, Published, insist

RENAMES = ((r"^backbone\.embedding\.", "backbone.embeddings."),)


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    return read_state_space(theirs) | {
        "tie_embeddings": theirs("tie_word_embeddings", True),
        "d_state": theirs("state_size", 16),
        "dt_rank": rank(theirs("time_step_rank", "auto")),
    }


def rank(value: Any) -> Any:
    """The rank of the step size's projection, None where it follows from the width."""
    return None if value == "auto" else value


def read_state_space(theirs: Published) -> dict[str, Any]:
    """What both generations call alike."""
    for key, only in {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu"}.items():
        theirs.only(key, only)
    return {
        "vocab_size": theirs("vocab_size"),
        "d_model": theirs("hidden_size"),
        "n_layers": theirs("num_hidden_layers"),
        "norm_eps": theirs("layer_norm_epsilon", 1e-5),
        "expand": theirs("expand", 2),
        "d_conv": theirs("conv_kernel", 4),
        "dt_min": theirs("time_step_min", 1e-3),
        "dt_max": theirs("time_step_max", 1e-1),
        "dt_floor": theirs("time_step_floor", 1e-4),
    }


def write(config: MambaConfig) -> dict[str, Any]:
    """See `Family.write`."""
    insist(config, "mamba", **PLAIN_SHELL, short_conv=True)
    return write_state_space(config) | {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "state_size": config.d_state,
        "intermediate_size": config.expand * config.d_model,
        "time_step_rank": config.dt_rank or math.ceil(config.d_model / 16),
    }


def write_state_space(config: Any) -> dict[str, Any]:
    """What both generations call alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "layer_norm_epsilon": config.norm_eps,
        "expand": config.expand,
        "conv_kernel": config.d_conv,
        "time_step_min": config.dt_min,
        "time_step_max": config.dt_max,
        "time_step_floor": config.dt_floor,
        "tie_word_embeddings": config.tie_embeddings,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
    }


def read_original(theirs: Published, known: dict[str, str]) -> dict[str, Any]:
    """Our settings from those of the original layout.

    Args:
        theirs: Theirs.
        known: The keys of `ssm_cfg` that become settings of ours.

    Raises:
        CheckpointError: What we cannot express.
    """
    for key in ("attn_layer_idx", "attn_cfg", "d_intermediate"):
        if theirs(key, None):
            raise CheckpointError(f"{theirs.where} has {key}={theirs(key)!r}, a hybrid, which the zoo cannot load")
    multiple, vocab = theirs("pad_vocab_size_multiple", 8), theirs("vocab_size")
    settings = {
        "vocab_size": -(-vocab // multiple) * multiple,
        "d_model": theirs("d_model"),
        "n_layers": theirs("n_layer"),
        "tie_embeddings": theirs("tie_embeddings", True),
        "norm": "rms" if theirs("rms_norm", True) else "layer",
    }
    ignored = ("layer", "use_fast_path", "chunk_size", "dt_init", "dt_scale", "A_init_range", "use_mem_eff_path")
    for key, value in theirs("ssm_cfg").items():
        if key in known:
            settings[known[key]] = value
        elif key not in ignored and value != _ORIGINAL_DEFAULTS.get(key, value is None):
            raise CheckpointError(
                f"{theirs.where} has ssm_cfg.{key}={value!r}, which the zoo does not know: {did_you_mean(key, known)}"
            )
    return settings


ORIGINAL_KEYS = {key: key for key in ("d_state", "d_conv", "expand", "dt_min", "dt_max")} | {
    "dt_init_floor": "dt_floor"
}
"""The keys of `ssm_cfg` in both generations."""

_ORIGINAL_DEFAULTS = {
    "bias": False,
    "conv_bias": True,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "activation": "swish",
}


def read_mamba_original(theirs: Published) -> dict[str, Any]:
    """Settings of Mamba in the original layout."""
    settings = read_original(theirs, ORIGINAL_KEYS | {"dt_rank": "dt_rank"})
    return settings | {"dt_rank": rank(settings.get("dt_rank", "auto"))}


def table(config: MambaConfig, theirs: Published) -> Table:
    """See `Family.table`."""
    links = shell(config)
    for i in range(config.n_layers):
        ours, mixer = f"blocks.{i}.mixers.0", f"backbone.layers.{i}.mixer"
        parts = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight")
        links += [link(f"{ours}.{part}", f"{mixer}.{part}") for part in parts]
        links += convolution(ours, mixer)
    return Table(links, tied(config), {})


def shell(config: Any) -> list[Link]:
    """Embedding, head and norms of both generations."""
    links = [link("embedding.weight", "backbone.embeddings.weight")]
    if not config.tie_embeddings:
        links.append(link("head.weight", "lm_head.weight"))
    norms = {"norm": "backbone.norm_f"}
    norms |= {f"blocks.{i}.norms.0": f"backbone.layers.{i}.norm" for i in range(config.n_layers)}
    return links + norm_links(norms, ["weight"] if config.norm == "rms" else ["weight", "bias"])


def tied(config: Any) -> dict[str, str]:
    """The head, where it is a copy."""
    return {"lm_head.weight": "backbone.embeddings.weight"} if config.tie_embeddings else {}


def convolution(ours: str, mixer: str) -> list[Link]:
    """The short convolution of both generations."""
    return [
        link(f"{ours}.conv.weight", f"{mixer}.conv1d.weight", TAPS),
        link(f"{ours}.conv.bias", f"{mixer}.conv1d.bias"),
    ]


FAMILY = Family("mamba", "mamba", read, table, write, model_types=("mamba",), renames=RENAMES)
ORIGINAL = Family("mamba (original layout)", "mamba", read_mamba_original, table, renames=RENAMES)
