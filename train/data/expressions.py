"""The expressions of `data=listops`: which there are, how they are drawn, and what they come to.

Whole forests are drawn, measured and written level by level of nesting, all trees at once: of long expressions only a
few in a hundred draws are of use, which a loop over trees would pay for with minutes.

Shape letters: N expressions, M nodes of one level of nesting, over all trees.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from zoo.kernels.errors import ConfigError
from zoo.train.data.base import SPLITS

# Part of what the cache is found by: raise it whenever `generate` gives other expressions for the same arguments.
FORMAT = 2

OPERATORS = ("MIN", "MAX", "MED", "SM")
"""Least, greatest, median (of an even number, the mean of the middle two without its fraction), sum modulo 10."""
DIGITS = 10
FIRST_OPERATOR = DIGITS
CLOSER = FIRST_OPERATOR + len(OPERATORS)
READ_OUT = CLOSER + 1
PADDING = READ_OUT + 1
SYMBOLS = (*map(str, range(DIGITS)), *(f"[{name}" for name in OPERATORS), "]", "=", "_")
"""How the tokens are written, by id."""

# Drawn at once, as many as have so many nodes at the most; the expressions of a seed depend on both numbers.
_TREES, _NODES = 4_096, 2**23
_DRAWS_PER_EXPRESSION = 1_000


@dataclass(frozen=True)
class Grammar:
    """Which expressions there are, and how likely.

    Attributes:
        max_depth: levels of nesting; at the last there are digits only, so that operators nest one less.
        max_arguments: of an operator; 2 is the least.
        min_length: tokens, the read-out token not counted.
        max_length: the same.
        operator_share: chance that a node is an operator where it may be one.
    """

    max_depth: int
    max_arguments: int
    min_length: int
    max_length: int
    operator_share: float = 0.25

    @property
    def longest(self) -> int:
        """Tokens of the longest expression that the depth and the arguments allow."""
        length = 1
        for _ in range(self.max_depth - 1):
            length = 2 + self.max_arguments * length
        return length


class Expressions(NamedTuple):
    """N expressions, one behind the other."""

    tokens: list[np.ndarray]
    """The tokens of each, uint8, without read-out token."""
    values: np.ndarray
    """(N,) digits."""
    depths: np.ndarray
    """(N,) operators that are nested in each other, the outermost counted."""


class _Level(NamedTuple):
    """The nodes at one level of nesting, those of one parent side by side and in the order of the parents."""

    symbols: np.ndarray  # (M,) token ids
    arguments: np.ndarray  # (M,), 0 for a digit

    @property
    def operators(self) -> np.ndarray:  # (M,)
        return self.arguments > 0

    @property
    def first_children(self) -> np.ndarray:
        """Where the children of each operator begin in the next level."""
        arguments = self.arguments[self.operators]
        return np.cumsum(arguments) - arguments


@lru_cache(maxsize=1)  # the tables of a split are made one after the other from the same expressions
def generate(grammar: Grammar, num_examples: int, split: str, data_seed: int) -> Expressions:
    """Different expressions, drawn as the grammar says and kept if their length is right.

    Every expression belongs to one split, by a hash of its tokens: eight in ten to training, one to validation and one
    to test. No expression is then seen and tested, however few there are of its length.

    Args:
        grammar: what to draw from.
        num_examples: N.
        split: "train", "validation" or "test": each has its own stream of draws.
        data_seed: of all draws.

    Raises:
        ConfigError: the grammar has too few expressions of such a length.
    """
    own = SPLITS.index(split)
    share = int(grammar.operator_share * 2**53)
    shape = (*astuple(grammar)[:-1], share)
    bits = np.random.PCG64(np.random.SeedSequence([data_seed, own, *shape]))
    tokens: list[np.ndarray] = []
    values, depths = [], []
    seen: set[bytes] = set()
    trees = max(1, min(_TREES, _NODES // grammar.max_length))
    drawn = 0
    while len(tokens) < num_examples:
        if drawn > _DRAWS_PER_EXPRESSION * (len(tokens) + 100):
            raise ConfigError(
                f"data=listops found {len(tokens)} different {split} expressions of {grammar.min_length} to "
                f"{grammar.max_length} tokens in {drawn:,} draws, not {num_examples}: ask for fewer examples, or widen "
                f"data.min_length and data.max_length"
            )
        forest, whole = _draw(grammar, share, bits, trees)
        drawn += trees
        lengths, results, nesting = _measure(forest)
        flat, ends = _write(forest, lengths), np.cumsum(lengths[0])
        right = (lengths[0] >= grammar.min_length) & (lengths[0] <= grammar.max_length)
        for tree in np.flatnonzero(whole & right):
            expression = flat[ends[tree] - lengths[0][tree] : ends[tree]]
            key = hashlib.blake2b(expression.tobytes(), digest_size=16).digest()
            # Tenths 0 to 7 are training, 8 validation, 9 test.
            if max(int.from_bytes(key[:8], "little") % 10 - 7, 0) == own and key not in seen:
                seen.add(key)
                tokens.append(expression)
                values.append(results[tree])
                depths.append(nesting[tree])
    return Expressions(tokens[:num_examples], np.array(values[:num_examples]), np.array(depths[:num_examples]))


def _draw(grammar: Grammar, share: int, bits: np.random.PCG64, trees: int) -> tuple[list[_Level], np.ndarray]:
    """Trees by levels, and which of them are whole, (trees,): one that grows too long is cut where it does.

    Their roots are operators: a lone digit would be too short for every grammar.
    """
    levels = []
    owners = np.arange(trees)  # (M,): the tree of each node
    sizes = np.ones(trees, dtype=np.int64)  # nodes so far, those of the next level included
    for depth in range(1, grammar.max_depth + 1):
        # Raw output, as numpy promises never to change it; the remainders' bias is below 2^-50.
        chance, choice = bits.random_raw((2, len(owners)))
        operators = ((chance >> np.uint64(11)) < share) & (depth < grammar.max_depth)
        if depth == 1:
            operators[:] = True
        kind, choice = choice % np.uint64(len(OPERATORS)), choice // np.uint64(len(OPERATORS))
        number = choice % np.uint64(grammar.max_arguments - 1) + np.uint64(2)
        arguments = np.where(operators, number, 0).astype(np.int64)
        sizes += np.bincount(owners, weights=arguments, minlength=trees).astype(np.int64)
        operators &= sizes[owners] <= grammar.max_length
        arguments[~operators] = 0
        symbols = np.where(operators, kind + np.uint64(FIRST_OPERATOR), choice % np.uint64(DIGITS))
        levels.append(_Level(symbols.astype(np.int64), arguments))
        owners = np.repeat(owners, arguments)
        if not len(owners):
            break
    return levels, sizes <= grammar.max_length


def _measure(levels: list[_Level]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """From the leaves up: the tokens under each node, by level; the value and the nesting of each root."""
    lengths: list[np.ndarray] = []
    values = nesting = np.empty(0, dtype=np.int64)
    for level in reversed(levels):
        operators, first = level.operators, level.first_children
        length, value, nested = np.ones_like(level.symbols), level.symbols.copy(), np.zeros_like(level.symbols)
        if len(first):
            length[operators] = 2 + np.add.reduceat(lengths[0], first)
            value[operators] = _evaluate(level.symbols[operators], level.arguments[operators], first, values)
            nested[operators] = 1 + np.maximum.reduceat(nesting, first)
        lengths.insert(0, length)
        values, nesting = value, nested
    return lengths, values, nesting


def _evaluate(symbols: np.ndarray, arguments: np.ndarray, first: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each operator from those of its arguments, which begin at `first`."""
    family = np.repeat(np.arange(len(first)), arguments)
    ordered = np.sort(family * DIGITS + values) % DIGITS  # within each family, as the families stand in order
    median = (ordered[first + (arguments - 1) // 2] + ordered[first + arguments // 2]) // 2
    total = np.add.reduceat(values, first) % DIGITS
    return np.choose(symbols - FIRST_OPERATOR, [ordered[first], ordered[first + arguments - 1], median, total])


def _write(levels: list[_Level], lengths: list[np.ndarray]) -> np.ndarray:
    """From the roots down: the tokens of all trees, one behind the other."""
    flat = np.empty(lengths[0].sum(), dtype=np.uint8)
    places = np.cumsum(lengths[0]) - lengths[0]
    for depth, level in enumerate(levels):
        flat[places] = level.symbols
        operators, first = level.operators, level.first_children
        flat[(places + lengths[depth] - 1)[operators]] = CLOSER
        if len(first):
            # The families stand side by side in `before`; each moves as a whole to behind its parent's symbol.
            before = np.cumsum(lengths[depth + 1]) - lengths[depth + 1]
            places = before + np.repeat(places[operators] + 1 - before[first], level.arguments[operators])
    return flat
