"""Hybrids: a pattern of registered architectures, block by block (Jamba: Lieber et al. 2024, arXiv 2403.19887)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from zoo.config import ModelConfig
from zoo.mixer import Mixer, Wrapper
from zoo.registry import architecture, register
from zoo.settings import setting


@dataclass(kw_only=True)
class HybridConfig(ModelConfig):
    """Settings of a hybrid: the pattern, and what its members are told."""

    n_layers: int = setting(3, "number of blocks", minimum=1)
    pattern: list[str] = setting(["mamba", "mamba", "transformer"], "architecture of each block, repeated to n_layers")
    members: dict[str, Any] = setting({}, "settings of a member: arch.members={mamba: {d_state: 32}}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern or "hybrid" in self.pattern:
            self.fail("pattern", "expected a list of registered architectures other than hybrid")
        for name in self.members:
            if name not in self.pattern:
                self.fail("members", f"expected settings of {', '.join(dict.fromkeys(self.pattern))}, not of {name}")
        for name in self.pattern:
            self.member(name)

    def member(self, name: str) -> ModelConfig:
        """The config of the blocks called `name`: the shell's settings are the hybrid's."""
        common = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        own = self.members.get(name, {})
        if not isinstance(own, dict):
            self.fail("members", f"expected a mapping of settings for {name}")
        for key in own:
            if key in common:
                self.fail("members", f"{key} belongs to the whole model: set arch.{key}")
        return architecture(name).config.from_dict(common | own, owner=f"member {name!r} of the hybrid")


@register("hybrid", config=HybridConfig)
class Hybrid(Mixer):
    """Hybrid: a pattern of the other architectures, block by block."""

    @classmethod
    def make_wrapper(cls, config: HybridConfig) -> Wrapper | None:
        """That of the member that has one: the others read the tokens that it inserts like all others."""
        members = dict.fromkeys(config.pattern)
        wrappers = (architecture(name).mixer.make_wrapper(config.member(name)) for name in members)
        wrapper = next((wrapper for wrapper in wrappers if wrapper is not None), None)
        if wrapper is not None:
            wrapper.strict = len(members) > 1
        return wrapper

    @classmethod
    def sublayers(cls, config: HybridConfig, layer: int) -> list[Mixer]:
        """Those of the architecture whose turn it is. It counts the blocks of its own kind only."""
        name = config.pattern[layer % len(config.pattern)]
        before = sum(config.pattern[i % len(config.pattern)] == name for i in range(layer))
        return architecture(name).mixer.sublayers(config.member(name), before)
