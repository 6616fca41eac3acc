"""Settings: keyword-only dataclasses whose fields carry their own help text and range.

One mechanism serves every configuration of the zoo (architectures, data, trainer, optimiser): the command line prints
the help, Hydra builds its structured configs from the annotations, and `Settings.__post_init__` checks types and
ranges, so that a wrong value is one clear line wherever it comes from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

from zoo.kernels.errors import ConfigError, did_you_mean

S = TypeVar("S", bound="Settings")


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A dataclass field with a help text and a range.

    Args:
        default: The default value; lists and dicts are copied for each instance.
        help: One line for `--help`.
        minimum: Smallest allowed value.
        above: Largest value that is *not* allowed.
        maximum: Largest allowed value.
        choices: The allowed values.
    """
    metadata = {"help": help, "minimum": minimum, "above": above, "maximum": maximum, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Base of all configurations: checks every field after construction.

    Raises:
        ConfigError: A value has the wrong type or lies outside its range.
    """

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, self._checked(field, hints[field.name], getattr(self, field.name)))

    def _checked(self, field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
        value = _coerce(value, hint)
        if value is _WRONG_TYPE:
            self.fail(field.name, f"expected {describe_type(hint)}")
        if value is None:
            return value
        limits = field.metadata
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(field.name, "expected a finite number")
        if limits.get("choices") is not None and value not in limits["choices"]:
            self.fail(field.name, did_you_mean(str(value), map(str, limits["choices"])))
        if limits.get("minimum") is not None and value < limits["minimum"]:
            self.fail(field.name, f"expected at least {limits['minimum']:g}")
        if limits.get("above") is not None and value <= limits["above"]:
            self.fail(field.name, f"expected more than {limits['above']:g}")
        if limits.get("maximum") is not None and value > limits["maximum"]:
            largest = limits["maximum"]
            self.fail(field.name, f"expected at most {largest if isinstance(largest, int) else f'{largest:g}'}")
        return value

    def fail(self, name: str, expected: str) -> typing.NoReturn:
        """Raises the one-line error about field `name`; `expected` says what would have been right."""
        raise ConfigError(f"{name}={getattr(self, name)!r} is not valid: {expected}")

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any], owner: str) -> S:
        """Builds the settings from a mapping; an unknown or missing key is an error.

        Args:
            values: Field names and values.
            owner: What the settings belong to, for the message ("architecture 'mamba'").

        Raises:
            ConfigError: Unknown key (near misses are named), missing key, or a bad value.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ConfigError(f"{owner} has no setting {key!r}: {did_you_mean(key, fields)}")
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise ConfigError(f"{owner} needs {name}: pass {name}=...")
        return cls(**values)


_WRONG_TYPE = object()


def field_types(settings: type[Settings]) -> dict[str, Any]:
    """The resolved annotations of a settings class."""
    return typing.get_type_hints(settings)


def describe_type(hint: Any) -> str:
    """A type annotation in words: 'an integer', 'a number or null'."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list (each item {describe_type(typing.get_args(hint)[0])})"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it, or `_WRONG_TYPE`. An int is a float; a bool is never a number."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in typing.get_args(hint):
            result = _coerce(value, option)
            if result is not _WRONG_TYPE:
                return result
        return _WRONG_TYPE
    if origin is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return _WRONG_TYPE
        items = [_coerce(item, typing.get_args(hint)[0]) for item in value]
        return _WRONG_TYPE if any(item is _WRONG_TYPE for item in items) else items
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else _WRONG_TYPE
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float) and isinstance(value, bool):
        return _WRONG_TYPE
    return value if isinstance(value, hint) else _WRONG_TYPE


def parse_overrides(settings: type[S], arguments: Sequence[str], owner: str) -> S:
    """Builds settings from `key=value` words of a command line; a list may be without its brackets: `lrs=1e-3,3e-3`.

    Raises:
        ConfigError: A word is not `key=value`, or the settings refuse it.
    """
    hints = field_types(settings)
    values = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not an argument of {owner}: write key=value, see --help")
        hint = hints.get(key)
        is_text = hint in (str, None) or (hint == str | None and text != "null")
        if _takes_list(hint) and text != "null" and not text.startswith("["):
            text = f"[{text}]"
        values[key] = text if is_text else parse_value(text)
    return settings.from_dict(values, owner)


def _takes_list(hint: Any) -> bool:
    return any(typing.get_origin(option) is list for option in (hint, *typing.get_args(hint)))


def parse_value(text: str) -> Any:
    """A value as the command line writes it: JSON, a list whose texts need no quotes ([mamba,rwkv7]), or a text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        if text.startswith("[") and text.endswith("]"):
            return [parse_value(item.strip()) for item in text[1:-1].split(",")]
        return text


def describe_settings(settings: type[Settings]) -> list[tuple[str, str, str]]:
    """Name, default and help (with the choices, where the help names not all of them) of each field."""
    rows = []
    for field in dataclasses.fields(settings):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        shown = "" if default is dataclasses.MISSING else "null" if default is None else str(default)
        text = field.metadata.get("help", "")
        choices = [str(choice) for choice in field.metadata.get("choices") or ()]
        if not all(choice in text for choice in choices):
            text += f"; {' or '.join(choices)}"
        rows.append((field.name, shown, text))
    return rows
