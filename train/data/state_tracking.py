"""`data=parity` and `data=word`: what a sequence amounts to so far, asked at every token.

Parity asks whether the number of ones among the bits so far is odd. The word problem (arXiv 2404.08819) multiplies
elements of a group; parity is the same with the group of two elements. A model has to carry a state through the whole
sequence, so that attention of fixed depth learns it for the lengths it saw and not beyond: test lengths exceed those of
training, and metrics are split by them.

Shape letters: N examples, L tokens per example, G elements of the group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import SPLITS, DataConfig, Source, register_data
from zoo.train.data.cache import build, token_types
from zoo.train.data.stream import SLICE_PREFIX
from zoo.train.recipe import Recipe

if TYPE_CHECKING:
    import datasets

# Part of what the cache is found by: raise it whenever `generate` gives other examples for the same arguments.
FORMAT = 1

Permutation = tuple[int, ...]


def _symmetric(points: int) -> list[Permutation]:
    return list(itertools.permutations(range(points)))


def _alternating(points: int) -> list[Permutation]:
    def inversions(p: Permutation) -> int:
        return sum(a > b for a, b in itertools.combinations(p, 2))

    return [p for p in _symmetric(points) if inversions(p) % 2 == 0]


def _cyclic(points: int) -> list[Permutation]:
    return [tuple((i + shift) % points for i in range(points)) for shift in range(points)]


def _product(left: list[Permutation], right: list[Permutation]) -> list[Permutation]:
    """Pairs, the second moving the points behind those of the first."""
    points = len(left[0])
    return [(*p, *(points + i for i in q)) for p, q in itertools.product(left, right)]


GROUPS: dict[str, Callable[[], list[Permutation]]] = {
    "z2": lambda: _cyclic(2),
    "z60": lambda: _cyclic(60),
    "a4z5": lambda: _product(_alternating(4), _cyclic(5)),
    "a5": lambda: _alternating(5),
    "s5": lambda: _symmetric(5),
}
"""Groups by name, as permutations. z60 and a4z5 are solvable; a5, and with it s5, is not."""


@lru_cache
def elements(group: str) -> tuple[Permutation, ...]:
    """The elements of a group as permutations in lexicographic order: a token is a place in it, 0 the identity."""
    return tuple(sorted(GROUPS[group]()))


@lru_cache
def table(group: str) -> np.ndarray:
    """The multiplication table, (G, G): entry (a, b) is a b, where (p q)(i) = p[q[i]]."""
    listed = elements(group)
    place = {p: index for index, p in enumerate(listed)}
    return np.array([[place[tuple(p[i] for i in q)] for q in listed] for p in listed])


def generate(
    group: str, num_examples: int, seq_len: int, split: str, data_seed: int, partition: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Words of uniformly drawn elements, and the products of their beginnings.

    In a `partition` every sequence belongs to one split, by a hash of its tokens: eight in ten to training, one to
    validation and one to test. No sequence is then seen and tested, however few there are of its length.

    Args:
        group: a name in `GROUPS`.
        num_examples: N.
        seq_len: L.
        split: "train", "validation" or "test": each has its own stream of draws.
        data_seed: of all draws.
        partition: whether to keep to the split's own sequences.

    Returns:
        inputs (N, L) and targets (N, L), int64; targets[n, i] = inputs[n, 0] inputs[n, 1] ... inputs[n, i].
    """
    products = table(group)
    words = _words(len(products), num_examples, seq_len, SPLITS.index(split), data_seed, partition)
    targets = words.copy()
    for i in range(1, seq_len):
        targets[:, i] = products[targets[:, i - 1], words[:, i]]
    return words, targets


def _words(size: int, num_examples: int, seq_len: int, split: int, data_seed: int, partition: bool) -> np.ndarray:
    bits = np.random.PCG64(np.random.SeedSequence([data_seed, size, seq_len, split]))
    found = np.empty((0, seq_len), dtype=np.int64)
    while len(found) < num_examples:
        # Raw output, as numpy promises never to change it; the remainder's bias is below 2^-50.
        raw = bits.random_raw((num_examples, seq_len))
        words = (raw % size).astype(np.int64)
        found = np.concatenate([found, words[_owner(words) == split] if partition else words])
    return found[:num_examples]


def _owner(words: np.ndarray) -> np.ndarray:
    """The split (its place in `SPLITS`) that each sequence belongs to, (N,)."""
    mixed = np.zeros(len(words), dtype=np.uint64)
    for column in words.T.astype(np.uint64):
        mixed = (mixed ^ (column + np.uint64(1))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return np.maximum((mixed % np.uint64(10)).astype(np.int64) - 7, 0)


@dataclass(kw_only=True)
class StateTrackingConfig(DataConfig):
    """What both tasks can be set to. Numbers of examples are per length."""

    lengths: list[int] = setting([8, 24, 40], "training lengths in tokens; equally many examples of each")
    test_lengths: list[int] = setting([40, 64, 128, 256], "lengths of validation and test")
    num_examples: int | None = setting(
        None, "training examples per length; null: as many as the recipe's steps take, each seen once", minimum=1
    )
    data_seed: int = setting(0, "makes the examples; the run's own seed only orders them", minimum=0)

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: A value is out of range.
        """
        super().__post_init__()
        for name in ("lengths", "test_lengths"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
                self.fail(name, "expected different numbers, each at least 1")
        size = len(elements(self.group_name))
        for length in self.test_lengths:
            if size**length < 1_000:
                self.fail("test_lengths", f"only {size**length} sequences have {length} tokens, give longer ones")

    @property
    def group_name(self) -> str:
        """The group whose elements the tokens are."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ParityConfig(StateTrackingConfig):
    """Settings of `data=parity`."""

    @property
    def group_name(self) -> str:
        """Bits under addition."""
        return "z2"


@dataclass(kw_only=True)
class WordConfig(StateTrackingConfig):
    """Settings of `data=word`."""

    group: str = setting("a5", "the group: a5 and s5 are not solvable, z60 and a4z5 are", choices=[*GROUPS][1:])
    lengths: list[int] = setting([2, 4, 8, 12], "training lengths in tokens; equally many examples of each")
    test_lengths: list[int] = setting([8, 12, 16, 32], "lengths of validation and test")

    @property
    def group_name(self) -> str:
        """The setting `group`."""
        return self.group


class _StateTracking(Source[StateTrackingConfig]):
    """Running products in a group, in one table per length; slice `seq_len`.

    Args:
        config: its settings.
    """

    default_examples: ClassVar[dict[str, int]] = {"validation": 128, "test": 1_024}

    def __init__(self, config: StateTrackingConfig) -> None:
        self.config = config
        self.vocab_size = len(elements(config.group_name))
        self.batch_size = 64 if config.batch_size is None else config.batch_size
        self.eval_batch_size = 256 if config.eval_batch_size is None else config.eval_batch_size
        self.shuffle = True if config.shuffle is None else config.shuffle
        self.slice_values = {"seq_len": sorted(config.test_lengths)}
        # The first product is the first token and the second an entry of the table, which take no state. Micro accuracy
        # over the test labels.
        known = sum(min(length, 2) for length in config.test_lengths)
        labels = sum(config.test_lengths)
        chance = 1 / self.vocab_size
        self.levels = {"chance": chance, "plateau": (known + (labels - known) * chance) / labels}

    def load(self, split: str) -> list[datasets.Dataset]:
        """One table per length."""
        config = self.config
        inputs, targets = token_types(self.vocab_size)
        lengths = config.lengths if split == "train" else config.test_lengths
        # The recipe's steps are one epoch, shared equally by the lengths.
        fresh = -(-self.recipe.max_steps // len(lengths)) * self.batch_size
        num_examples = config.examples(split) or self.default_examples.get(split, fresh)
        return [
            build(
                _rows,
                {
                    "inputs": (inputs, length),
                    "targets": (targets, length),
                    f"{SLICE_PREFIX}seq_len": ("int32", None),
                },
                group=config.group_name,
                num_examples=num_examples,
                seq_len=length,
                split=split,
                data_seed=config.data_seed,
                partition=length in config.test_lengths,
                format=FORMAT,
            )
            for length in lengths
        ]

    def facts(self) -> dict[str, Any]:
        """The group, the training lengths and the seed of the examples."""
        config = self.config
        lengths = " ".join(map(str, config.lengths))
        return {"group": config.group_name, "lengths": lengths, "data_seed": config.data_seed}


def _rows(format: int, **arguments: Any) -> Iterator[dict[str, Any]]:
    for inputs, targets in zip(*generate(**arguments), strict=True):
        yield {"inputs": inputs, "targets": targets, f"{SLICE_PREFIX}seq_len": arguments["seq_len"]}


@register_data("parity", config=ParityConfig)
class Parity(_StateTracking):
    """Whether the ones so far are odd in number, at every bit (`parity_all`)."""

    recipe = Recipe(max_steps=3_000, lr=2e-3)


@register_data("word", config=WordConfig)
class Word(_StateTracking):
    """The running product of group elements, at every element."""

    recipe = Recipe(max_steps=10_000, lr=2e-3)
