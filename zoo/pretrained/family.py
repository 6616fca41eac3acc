"""What a family of published checkpoints is: two configurations, each from the other, and a table of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.config import ModelConfig
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.pretrained.convert import Table
from zoo.pretrained.weights import Weights

_REQUIRED = object()

PLAIN_SHELL: dict[str, Any] = {
    "norm": "rms",
    "embedding_norm": False,
    "post_norm": False,
    "max_positions": None,
    "mlm_head": None,
    "causal": True,
}
"""The settings of a shell with nothing unusual about it."""


class Published:
    """The settings of a published model, read by their own names.

    Args:
        values: The parsed config.json, or nothing.
        where: What to call it in messages.
        shapes: Of the tensors, for files that come without settings.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str = "config.json", shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self.values, self.where, self.shapes = values, where, shapes or {}

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key.

        Raises:
            CheckpointError: It is not there, and has no default.
        """
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.where} has no {key}: copy it again")
        # Strict JSON has no infinity.
        return _number(value) if isinstance(value, dict) and set(value) == {"__float__"} else value

    def only(self, key: str, *known: Any) -> Any:
        """The value of a key that may have some values only, the first of which is the default.

        Raises:
            CheckpointError: It has another.
        """
        value = self(key, known[0])
        if value not in known:
            expected = " or ".join(repr(choice) for choice in known)
            raise CheckpointError(
                f"{self.where} has {key}={value!r}, which the zoo's architecture does not know: expected {expected}"
            )
        return value


def _number(value: dict[str, str]) -> float:
    return float(value["__float__"])


@dataclass(frozen=True)
class Family:
    """One form of published checkpoints and the architecture of ours that it is."""

    name: str
    architecture: str
    read: Callable[[Published], dict[str, Any]]
    """Our settings from theirs. Raises CheckpointError for what we cannot express."""
    table: Callable[[Any, Published], Table]
    """The tensors, from our config and their settings."""
    write: Callable[[Any], dict[str, Any]] | None = None
    """Their settings from our config. Raises ConfigError for what they cannot express. None: never written."""
    model_types: tuple[str, ...] = ()
    """What config.json calls it."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements for the names in files of other layouts."""
    inert: tuple[str, ...] = ()
    """Patterns of names in files that nobody needs."""
    marks: tuple[str, ...] = field(default=())
    """Patterns of names of which a file without settings has one each, and no other family does."""


def insist(config: ModelConfig, form: str, **expected: Any) -> None:
    """Raises ConfigError where a config has other settings than the published form can say.

    Args:
        config: Ours.
        form: What the published form is called.
        **expected: Our settings.
    """
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no word in the {form} of transformers, which knows {value!r} "
                f'only: save with format="zoo"'
            )


LAYERS = ("n_layers", "num_hidden_layers", "n_layer")
WIDTHS = ("d_model", "hidden_size", "vocab_size", "max_positions", "d_ff")
"""What settings of ours and of others call numbers of layers, each of which has tensors, and sizes of tensors."""


def bound(settings: Mapping[str, Any], where: str | Path, found: Weights) -> None:
    """Refuses sizes that the file cannot fill, before anything of that size is made.

    Args:
        settings: Ours or theirs.
        where: What to call them in messages.
        found: The files.

    Raises:
        CheckpointError: More layers than tensors, or a width above the number of weights.
    """
    elements = sum(math.prod(entry.shape) for entry in found.entries.values())
    for keys, limit, what in ((LAYERS, len(found.entries), "tensors"), (WIDTHS, elements, "weights")):
        for key in keys:
            value = settings.get(key)
            if isinstance(value, int) and value > limit:
                raise CheckpointError(
                    f"{where} has {key}={value}, which the {limit} {what} in {found.where} cannot fill: copy it again"
                )


def finite(value: float | None) -> float | None:
    """A limit, or None where there is none."""
    return None if value is None or math.isinf(value) else float(value)
