"""Rotary settings: the `rope_parameters` of transformers, its older `rope_scaling`, and ours."""

from __future__ import annotations

from typing import Any

from zoo.kernels.errors import CheckpointError, ConfigError, did_you_mean
from zoo.layers.attention import AttentionConfig
from zoo.layers.rope_scaling import NTK
from zoo.pretrained.family import Published

_YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": _YARN,
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
}
"""The settings of each kind that both sides call alike."""

FROM_ORIGINAL = ("yarn", "llama3", "longrope")
"""The kinds that say at which length scaling begins; `dynamic` takes max_position_embeddings for it."""


_ALL_SAID = ("dynamic", "llama3")
"""The kinds whose settings have no defaults over there."""


def read_rope(theirs: Published) -> dict[str, Any]:
    """Our rotary settings from theirs.

    Raises:
        CheckpointError: A kind that we do not have.
    """
    longest = theirs("max_position_embeddings", None)
    rope = dict(theirs("rope_parameters", None) or theirs("rope_scaling", None) or {})
    if rope and all(isinstance(value, dict) for value in rope.values()):  # one per type of layer
        first, *others = rope.values()
        if any(other != first for other in others):
            raise CheckpointError(f"{theirs.where} has other rotary positions in some layers, which the zoo does not")
        rope = dict(first)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KEYS:
        raise CheckpointError(f"{theirs.where} has rotary positions of type {kind!r}: {did_you_mean(str(kind), KEYS)}")
    if rope.get("partial_rotary_factor", theirs("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise CheckpointError(f"{theirs.where} rotates a part of each head only, which the zoo's attention does not")
    ours: dict[str, Any] = {
        "rope_base": rope.get("rope_theta") or theirs("rope_theta", 10_000.0),
        "trained_length": longest,
    }
    if kind == "default":
        return ours
    scaling = {key: rope[key] for key in KEYS[kind] if rope.get(key) is not None}
    if kind == "dynamic":
        scaling["original_length"] = longest
    elif kind in FROM_ORIGINAL:
        original = rope.get("original_max_position_embeddings") or theirs("original_max_position_embeddings", longest)
        scaling["original_length"] = original
        if "factor" not in scaling and kind != "llama3":
            scaling["factor"] = longest / original
    return ours | {"rope_scaling": {"type": kind, **scaling}}


def write_rope(config: AttentionConfig) -> dict[str, Any]:
    """Their rotary settings from ours.

    Raises:
        ConfigError: A scaling for which they have no word.
    """
    rotary = config.make_rotary()
    assert rotary is not None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    longest = config.trained_length
    kind = config.rope_scaling.get("type", "none")
    scaling = rotary.scaling
    if isinstance(scaling, NTK):  # which is nothing but another base
        rope["rope_theta"] = config.rope_base * scaling.factor ** (rotary.width / max(rotary.width - 2, 1))
    elif kind != "none":
        if kind not in KEYS or getattr(scaling, "form", "index") != "index":
            raise ConfigError(
                f"rope_scaling={config.rope_scaling!r} has no word in transformers: scale by another of "
                f'{", ".join(KEYS)}, or save with format="zoo"'
            )
        values = {key: getattr(scaling, key) for key in KEYS[kind]}
        said = values.keys() if kind in _ALL_SAID else config.rope_scaling.keys()
        rope |= {"rope_type": kind} | {key: value for key, value in values.items() if key in said and value is not None}
        original = getattr(scaling, "original_length", None)
        if kind == "dynamic":
            longest = original
        elif kind in FROM_ORIGINAL:
            rope["original_max_position_embeddings"] = original
            longest = longest or round(original * values["factor"])
    return {"rope_parameters": rope} | ({} if longest is None else {"max_position_embeddings": longest})
