"""Errors that a user can mend: one line says what is wrong, what was expected, and how to put it right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of every error the zoo raises on purpose. The command line prints its message as one line."""


class BackendError(ZooError):
    """A backend was asked for by name that does not exist or cannot run here."""


class ConfigError(ZooError):
    """A setting has a wrong name, type or value."""


class DataError(ZooError):
    """A dataset is missing, empty, too short, or holds tokens outside the vocabulary."""


class CheckpointError(ZooError):
    """A checkpoint is missing, damaged, or belongs to another model."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Names the options that look like `name`, or all of them: the mend part of an unknown-name message."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}? (known: {', '.join(options)})"
    return f"known: {', '.join(options)}"
