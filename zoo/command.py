"""What the commands share that use a trained model: its folder, its device, and how it reads a long context.

A policy has a name and settings of its own, which follow its name after a dot:
`rope_scaling=yarn rope_scaling.factor=8 cache=streaming cache.sinks=4 cache.window=1024`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from zoo.checkpoint import load_pretrained
from zoo.codec import Codec
from zoo.devices import usable_device
from zoo.kernels.errors import ConfigError
from zoo.long_context import set_cache, set_rope_scaling
from zoo.model import Model
from zoo.pretrained.tokenizer import find_tokenizer
from zoo.settings import Settings, describe_settings, parse_overrides, parse_value, setting

POLICIES: dict[str, Callable[..., None]] = {"rope_scaling": set_rope_scaling, "cache": set_cache}


@dataclass(kw_only=True)
class ModelSettings(Settings):
    """Which model, where, and how it reads."""

    model: str = setting(help="folder of a model or of its run, a name that `zoo list --pretrained` shows, or a hub id")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    rope_scaling: str | None = setting(
        None, "scale the rotary positions for longer contexts; settings after a dot: rope_scaling.factor=8"
    )
    cache: str | None = setting(
        None, "what attention keeps of a long context: cache=streaming cache.sinks=4 cache.window=1024"
    )


S = TypeVar("S", bound=ModelSettings)
PolicySettings = dict[str, dict[str, Any]]


def parse_command(settings: type[S], arguments: Sequence[str], owner: str) -> tuple[S, PolicySettings]:
    """The settings of a command, and for each policy its own.

    Raises:
        ConfigError: A word is not `key=value`, the settings refuse it, or a policy has settings and no name.
    """
    plain: list[str] = []
    policies: PolicySettings = {policy: {} for policy in POLICIES}
    for word in arguments:
        key, equals, text = word.partition("=")
        policy, _, name = key.partition(".")
        if equals and name and policy in POLICIES:
            policies[policy][name] = parse_value(text)
        else:
            plain.append(word)
    config = parse_overrides(settings, plain, owner)
    for policy, own in policies.items():
        if own and getattr(config, policy) is None:
            name = next(iter(own))
            raise ConfigError(f"{policy}.{name} is a setting of no policy: say which one with {policy}=...")
    return config, policies


def load_model(config: ModelSettings, policies: PolicySettings) -> tuple[Model, Codec | None]:
    """The model, its policies set, and how text becomes its tokens (None where it was not trained on text).

    Raises:
        ConfigError: The device cannot be used, or a policy does not fit the model.
        CheckpointError: There is no model, or a damaged one.
    """
    device = usable_device(config.device)
    codec = find_tokenizer(config.model)
    model = load_pretrained(config.model, device=device)
    for policy, set_policy in POLICIES.items():
        name = getattr(config, policy)
        if name is not None:
            set_policy(model, name, **policies[policy])
    return model, codec


def print_help(settings: type[ModelSettings], usage: str) -> None:
    """Prints the usage line and a line for each setting."""
    print(f"usage: {usage} [key=value ...]\n")
    for name, default, text in describe_settings(settings):
        print(f"  {name:<16} {text}" + (f" [{default}]" if default else ""))
