"""Reading further than in training: what of a trained model can change without touching its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from zoo.architectures.hybrid import HybridConfig
from zoo.config import ModelConfig
from zoo.kernels.errors import ConfigError
from zoo.layers.attention import Attention, AttentionConfig
from zoo.model import Model


def set_rope_scaling(model: Model, name: str, **settings: Any) -> None:
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
