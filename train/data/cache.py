"""Tables made once and then read, memory-mapped, from the cache of Hugging Face `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.kernels.errors import DataError, ZooError
from zoo.train.data.stream import IGNORE

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger("zoo.train.data")


def build(
    rows: Callable[..., Iterator[Mapping[str, Any]]], columns: Mapping[str, tuple[str, int | None]], **arguments: Any
) -> datasets.Dataset:
    """The table of what `rows(**arguments)` yields: generated on the first call ever, read from the cache afterwards.

    The cache is found by the function's name and the arguments, not by its code: a function whose rows change needs an
    argument that changes with them (the sources pass a format number). Arguments must be picklable to the same bytes
    in every process, and none may be a list, which `datasets` would take for shards.

    Args:
        rows: a generator function of a module (not a closure).
        columns: for each column its number type, and its length where it is a list (-1: any), else None.
        **arguments: of `rows`.

    Raises:
        DataError: the cache cannot be written; and whatever `ZooError` the generator raises.
    """
    import datasets

    features = datasets.Features(
        {
            name: datasets.Value(kind) if length is None else datasets.Sequence(datasets.Value(kind), length=length)
            for name, (kind, length) in columns.items()
        }
    )
    try:
        with _quiet():
            table = datasets.Dataset.from_generator(rows, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, ZooError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise _unwritable(cause) from error
    except OSError as error:
        raise _unwritable(error) from error
    _log.debug("table in %s", table.cache_files)
    return table.with_format("arrow")


def _unwritable(error: OSError) -> DataError:
    import datasets

    place = f": {error.filename}" if error.filename else ""
    return DataError(
        f"cannot write to the datasets cache {datasets.config.HF_DATASETS_CACHE} ({error.strerror or error}{place}): "
        "set HF_DATASETS_CACHE to a writable folder with room"
    )


def token_types(vocab_size: int) -> tuple[str, str]:
    """The smallest number types for inputs and for targets (-100 among them)."""
    largest = np.min_scalar_type(vocab_size - 1)
    return largest.name, np.result_type(largest, np.min_scalar_type(IGNORE)).name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars of `datasets` off the terminal for a while."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
