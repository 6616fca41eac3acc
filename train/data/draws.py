"""Random numbers for generated tasks, and what is done with whole tables of them at once.

Shape letters: N rows, T tokens or other things in a row, L tokens per row.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

DEPTHS = 10


class Draws:
    """A stream of random numbers, made from raw output, which numpy promises never to change.

    Args:
        *key: plain values; equal keys give equal streams, in every process.
    """

    def __init__(self, *key: Any) -> None:
        entropy = int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "little")
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def integers(self, below: int | np.ndarray, *shape: int) -> np.ndarray:
        """Integers from 0 to below - 1, all equally likely up to a bias of below / 2^64; an array sets each bound."""
        return (self._bits.random_raw(shape) % np.asarray(below).astype(np.uint64)).astype(np.int64)

    def events(self, chance: float, *shape: int) -> np.ndarray:
        """True with a probability of `chance`, each by itself."""
        return (self._bits.random_raw(shape) >> np.uint64(11)) < int(chance * 2**53)

    def orders(self, rows: int, size: int) -> np.ndarray:
        """An order of 0 ... size - 1 in each row, (rows, size)."""
        return np.argsort(self._bits.random_raw((rows, size)), axis=1, kind="stable")

    def distinct(self, below: int, rows: int, size: int) -> np.ndarray:
        """In each row different integers from 0 to below - 1, in random order, (rows, size), by Floyd's algorithm."""
        drawn = np.empty((rows, size), dtype=np.int64)
        for i, largest in enumerate(range(below - size, below)):
            new = self.integers(largest + 1, rows)
            taken = (drawn[:, :i] == new[:, None]).any(1)
            drawn[:, i] = np.where(taken, largest, new)
        return np.take_along_axis(drawn, self.orders(rows, size), axis=1)

    def one_of(self, allowed: np.ndarray) -> np.ndarray:
        """In each row one of the columns that are allowed there, (rows,); `allowed` (rows, columns) is boolean."""
        return np.where(allowed, self._bits.random_raw(allowed.shape) >> np.uint64(1), np.uint64(0)).argmax(1)


def depth(position: np.ndarray, last: int) -> np.ndarray:
    """Which tenth of the places from 0 to `last` a position lies in, 0 to 9."""
    return position * DEPTHS // (last + 1)


def first_equal(codes: np.ndarray) -> np.ndarray:
    """For each entry the place of the first entry of its row that equals it, (N, T) from (N, T)."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    new = np.ones(codes.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.maximum.accumulate(np.where(new, np.arange(codes.shape[1]), 0), axis=1)
    first = np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, starts, axis=1), axis=1)
    return first


def squeeze(tokens: np.ndarray, length: int, *, left: bool) -> np.ndarray:
    """The order that moves the tokens of each row together, -1 being none, to its left or its right end.

    Args:
        tokens: (N, T), in each row at most `length` that are not -1.
        length: L.
        left: which end.

    Returns:
        (N, L) places in the row.
    """
    order = np.argsort((tokens < 0) == left, axis=1, kind="stable")
    return order[:, :length] if left else order[:, -length:]
