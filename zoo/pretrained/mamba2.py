"""Mamba-2: the layout of transformers, and the original one, which differs in its settings and one name."""

from __future__ import annotations

from typing import Any

from zoo.architectures.mamba2 import Mamba2Config
from zoo.kernels.errors import CheckpointError
from zoo.pretrained.convert import Table, link
from zoo.pretrained.family import PLAIN_SHELL, Family, Published, finite, insist
from zoo.pretrained.mamba import (
    ORIGINAL_KEYS,
    RENAMES,
    convolution,
    read_original,
    read_state_space,
    shell,
    tied,
    write_state_space,
)


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    settings = read_state_space(theirs)
    theirs.only("rms_norm", True)
    theirs.only("norm_before_gate", False, None)
    heads, width = theirs("num_heads", 128), theirs("head_dim", 64)
    if heads * width != settings["expand"] * settings["d_model"]:
        raise CheckpointError(
            f"{theirs.where} has {heads} heads of width {width}: expected {settings['expand']} x {settings['d_model']} "
            f"channels in all"
        )
    return settings | {
        "tie_embeddings": theirs("tie_word_embeddings", False),
        "d_state": theirs("state_size", 128),
        "head_dim": width,
        "n_groups": theirs("n_groups", 8),
        **_limits(theirs("time_step_limit", None)),
    }


def _limits(limits: Any) -> dict[str, Any]:
    """Our limits of the step size from a pair, the second of which may be infinite."""
    low, high = (0.0, None) if limits is None else (Published({"limit": limit})("limit") for limit in limits)
    return {"dt_limit_min": low, "dt_limit_max": finite(high)}


def write(config: Mamba2Config) -> dict[str, Any]:
    """See `Family.write`."""
    insist(config, "mamba2", **PLAIN_SHELL, short_conv=True)
    # Strict JSON has no infinity.
    most = {"__float__": "Infinity"} if config.dt_limit_max is None else config.dt_limit_max
    return write_state_space(config) | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "state_size": config.d_state,
        "num_heads": config.n_heads,
        "head_dim": config.d_inner // config.n_heads,
        "n_groups": config.n_groups,
        "time_step_limit": [config.dt_limit_min, most],
    }


def read_mamba2_original(theirs: Published) -> dict[str, Any]:
    """Settings of Mamba-2 in the original layout."""
    names = {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "dt_limit"}
    settings = read_original(theirs, ORIGINAL_KEYS | names)
    settings.setdefault("head_dim", 64)
    return settings | _limits(settings.pop("dt_limit", None))


def table(config: Mamba2Config, theirs: Published) -> Table:
    """See `Family.table`."""
    links = shell(config)
    for i in range(config.n_layers):
        ours, mixer = f"blocks.{i}.mixers.0", f"backbone.layers.{i}.mixer"
        parts = ("in_proj.weight", "dt_bias", "A_log", "D", "out_proj.weight")
        links += [link(f"{ours}.{part}", f"{mixer}.{part}") for part in parts]
        links.append(link(f"{ours}.norm_weight", f"{mixer}.norm.weight"))
        links += convolution(ours, mixer)
    return Table(links, tied(config), {})


FAMILY = Family("mamba2", "mamba2", read, table, write, model_types=("mamba2",), renames=RENAMES)
ORIGINAL = Family("mamba2 (original layout)", "mamba2", read_mamba2_original, table, renames=RENAMES)
