"""Reading further than in training: what of a trained model can change without touching its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from zoo.architectures.hybrid import HybridConfig
from zoo.architectures.landmark import Landmark
from zoo.config import ModelConfig
from zoo.kernels.errors import ConfigError, did_you_mean
from zoo.layers.attention import Attention, AttentionConfig
from zoo.layers.cache import CachedAttention, CachePolicy
from zoo.layers.heavy_hitters import H2O
from zoo.layers.landmark_retrieval import Retrieval
from zoo.layers.rope_scaling import SCALINGS
from zoo.layers.streaming import Streaming, Window
from zoo.model import Model
from zoo.settings import S


def set_rope_scaling(model: Model, name: str, /, **settings: Any) -> None:
    """Changes how the rotary frequencies of a model are scaled; `save_pretrained` keeps it.

    Of a hybrid, all members that have rotary positions change. Weights stay as they are, so that "none" restores the
    model bit for bit. A state belongs to the scaling that it was made with: begin with a new one.

    Args:
        model: The model, changed in place.
        name: none, linear, ntk, dynamic, yarn, dynamic_yarn, llama3 or longrope; see `zoo.layers.rope_scaling`.
        **settings: Of that scaling, such as factor=8; original_length where the model has no trained_length.

    Raises:
        ConfigError: Unknown name or setting, or a bad or missing value; the model has no rotary positions.
    """
    if not isinstance(name, str):
        raise ConfigError(f"rope_scaling {name!r} is no name: expected one of {', '.join(SCALINGS)}")
    if "type" in settings:
        raise ConfigError(f"rope_scaling {name!r} has no setting 'type': its name is its type")
    scaling = {} if name == "none" and not settings else {"type": name, **settings}
    config = _with_scaling(model.config, scaling)
    rotaries = {}
    for layer, mixers in enumerate(model.mixers()):
        own = _of_block(config, layer)
        for mixer in mixers:
            if isinstance(mixer, Attention) and isinstance(own, AttentionConfig) and own.rotary:
                rotaries[mixer] = own.make_rotary()
    if not rotaries:
        raise ConfigError(
            f"this {model.architecture} has no rotary positions to scale: use an attention architecture, or a hybrid "
            f"with one, that has rotary=true"
        )
    for mixer, rotary in rotaries.items():  # only now, when nothing can fail any more
        mixer.rotary = rotary
    model.config = config


POLICIES: dict[str, type[CachePolicy] | type[Retrieval] | None] = {
    "full": None,
    "window": Window,
    "streaming": Streaming,
    "h2o": H2O,
    "landmark": Retrieval,
}
"""What a cache may keep, or what of it is read, by name; None: everything."""


def set_cache(model: Model, name: str, /, **settings: Any) -> None:
    """Changes what the attention of a Transformer keeps of what it has read, for evaluation: there are no gradients.

    Of a hybrid, all Transformer members change. A whole sequence at once, without a state, is read with full attention
    as before. A state belongs to the cache that it was made with: begin with a new one. Nothing is saved with the
    model.

    Landmark attention keeps everything. For it, "landmark" says how many blocks of that a token reads, in whole
    sequences too; where gradients are recorded all are read. Only another memory_device wants a new state.

    Args:
        model: The model, changed in place.
        name: full (everything), window (window=), streaming (sinks=, window=) or h2o (recent=, heavy=); landmark
            (top_k=, retrieval=, memory_device=) for arch=landmark.
        **settings: Of that policy; see `zoo.layers.streaming`, `heavy_hitters` and `landmark_retrieval`.

    Raises:
        ConfigError: Unknown name or setting, or a bad value; an architecture without such a cache, or a model that
            keeps nothing (causal=false) or a window already.
    """
    if not isinstance(name, str) or name not in POLICIES:
        name = str(name)
        raise ConfigError(f"no cache {name!r}: {did_you_mean(name, POLICIES)}")
    kind = POLICIES[name]
    if kind is None and settings:
        raise ConfigError(f"cache 'full' has no setting {next(iter(settings))!r}: it has none")
    policy = None if kind is None else _named_settings(kind, settings, name)
    both: dict[Any, Any] = {None: (CachedAttention, Landmark), Retrieval: Landmark}
    choosing = both.get(kind, CachedAttention)
    caches = [mixer for mixers in model.mixers() for mixer in mixers if isinstance(mixer, choosing)]
    if not caches:
        having = "that of landmark" if kind is Retrieval else "the attention of a transformer"
        raise ConfigError(f"this {model.architecture} has no cache to choose: only {having}, alone or in a hybrid, has")
    if not model.config.causal:
        raise ConfigError(
            f"this {model.architecture} has causal=false and so no cache to choose: build it with causal=true"
        )
    if policy is not None and any(mixer.span is not None for mixer in caches):
        raise ConfigError(
            f"this {model.architecture} keeps its own window only, which cache={name} cannot widen: build it with "
            f"window=null"
        )
    for mixer in caches:
        mixer.policy = policy


def has_cache_policy(model: Model) -> bool:
    """Whether a part of the model keeps less than it was built to keep."""
    return any(isinstance(m, CachedAttention) and m.policy is not None for mixers in model.mixers() for m in mixers)


def _named_settings(kind: type[S], settings: dict[str, Any], name: str) -> S:
    try:
        return kind.from_dict(settings, owner=f"cache {name!r}")
    except ConfigError as error:
        own = str(error).partition("=")[0] in {field.name for field in dataclasses.fields(kind)}
        raise ConfigError(f"cache.{error}" if own else str(error)) from None


def _with_scaling(config: ModelConfig, scaling: dict[str, Any]) -> ModelConfig:
    if isinstance(config, HybridConfig):
        members = dict(config.members)
        for name in dict.fromkeys(config.pattern):
            member = config.member(name)
            if isinstance(member, AttentionConfig) and member.rotary:
                members[name] = {**members.get(name, {}), "rope_scaling": scaling}
        return dataclasses.replace(config, members=members)
    if isinstance(config, AttentionConfig) and config.rotary:
        return dataclasses.replace(config, rope_scaling=scaling)
    return config


def _of_block(config: ModelConfig, layer: int) -> ModelConfig:
    """The config that a block was built from."""
    return config.member(config.pattern[layer % len(config.pattern)]) if isinstance(config, HybridConfig) else config
