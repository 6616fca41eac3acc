"""The registry: an architecture is one decorated mixer class, found by its name everywhere."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeVar

from zoo.config import ModelConfig
from zoo.kernels.errors import ConfigError, ZooError, did_you_mean
from zoo.mixer import Mixer

M = TypeVar("M", bound=type[Mixer])
ENTRY_POINT_GROUP = "zoo.architectures"


@dataclass(frozen=True)
class Architecture:
    """A registered architecture: its name, its mixer and the config that both the shell and the mixer read."""

    name: str
    mixer: type[Mixer]
    config: type[ModelConfig]

    @property
    def summary(self) -> str:
        """First line of the mixer's docstring."""
        return first_line(self.mixer)


def first_line(thing: object) -> str:
    """The first line of a class's docstring."""
    return (thing.__doc__ or "").strip().partition("\n")[0]


_REGISTRY: dict[str, Architecture] = {}


def register(name: str, *, config: type[ModelConfig]) -> Callable[[M], M]:
    """Registers a mixer class under `name`, which is also its name on the command line.

    Raises:
        ConfigError: The name is taken.
    """

    def add(mixer: M) -> M:
        if name in _REGISTRY:
            taken = _REGISTRY[name].mixer
            raise ConfigError(
                f"architecture {name!r} is already registered by {taken.__module__}.{taken.__qualname__}: "
                f"give {mixer.__module__}.{mixer.__qualname__} another name"
            )
        _REGISTRY[name] = Architecture(name, mixer, config)
        return mixer

    return add


@functools.cache
def _discover() -> None:
    """Imports the zoo's own architectures and those of installed packages, each once."""
    from zoo import architectures

    for module in pkgutil.iter_modules(architectures.__path__):
        importlib.import_module(f"{architectures.__name__}.{module.name}")
    for plugin in entry_points(group=ENTRY_POINT_GROUP):
        try:
            plugin.load()
        except Exception as error:
            owner = plugin.dist.name if plugin.dist else "unknown"
            raise ZooError(
                f"the architecture plug-in {plugin.name!r} of package {owner!r} does not load ({error}): "
                f"mend or uninstall that package"
            ) from error


def architecture(name: str) -> Architecture:
    """The registered architecture of that name.

    Raises:
        ConfigError: No such architecture; near misses are named.
    """
    _discover()
    if name not in _REGISTRY:
        raise ConfigError(f"no architecture {name!r}: {did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Sorted names of the registered architectures that match a shell pattern, such as "rwkv*".

    Args:
        pattern: The pattern.
        pretrained: Lists what `load_pretrained` loads by name instead: the variants in the package, then public ones.
    """
    if pretrained:
        from zoo.pretrained.variants import variants

        return fnmatch.filter(variants(), pattern)
    _discover()
    return sorted(fnmatch.filter(_REGISTRY, pattern))
