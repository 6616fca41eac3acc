"""What generated tasks have in common: settings, streams of random numbers, and tables of rows of one shape.

A task is a function that draws rows from a stream, and settings that become its arguments. All else is here: a stream
for each (task, arguments, split, `data.data_seed`), a split for each row, training at one length and tests at several.

Shape letters: N rows, L tokens per row.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from zoo.kernels.errors import ConfigError
from zoo.settings import setting
from zoo.train.data.base import SPLITS, DataConfig, Source, get_data
from zoo.train.data.cache import build, token_types
from zoo.train.data.stream import SLICE_PREFIX

if TYPE_CHECKING:
    import datasets

# Part of what the cache is found by: raise it whenever what is here gives other rows. Each task has one of its own.
FORMAT = 1
# Rows are drawn in blocks of about so many tokens; the rows of a seed depend on it.
_BLOCK = 2**18
_DRAWS_PER_ROW = 1_000
_EVAL_TOKENS = 2**16


class Draws:
    """A stream of random numbers, made from raw output, which numpy promises never to change.

    Args:
        *key: plain values; equal keys give equal streams, in every process.
    """

    def __init__(self, *key: Any) -> None:
        entropy = int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "little")
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def integers(self, below: int, *shape: int) -> np.ndarray:
        """Integers from 0 to below - 1, all equally likely up to a bias of below / 2^64."""
        return (self._bits.random_raw(shape) % np.uint64(below)).astype(np.int64)

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


class Examples(NamedTuple):
    """Rows of one length."""

    inputs: np.ndarray
    """(N, L)"""
    targets: np.ndarray
    """(N, L): what the logits at a token must predict, -100 where nothing is asked."""
    slices: Mapping[str, np.ndarray] = {}
    """By name (N,), those that differ from row to row; the others are arguments of the task."""
    valid: np.ndarray | None = None
    """(N,): rows to keep; None: all."""


@dataclass(kw_only=True)
class SyntheticConfig(DataConfig):
    """Settings of all generated tasks."""

    num_examples: int | None = setting(
        None, "training examples; null: as many as the recipe's steps take, each seen once", minimum=1
    )
    test_examples: int | None = setting(None, "test examples per length", minimum=1)
    seq_len: int = setting(64, "tokens per sequence in training and validation", minimum=1)
    test_lengths: list[int] | None = setting(None, "tokens per sequence in the test, one or several; null: seq_len")
    data_seed: int = setting(0, "makes the examples; the run's own seed only orders them", minimum=0)

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: A value is out of range, or the sizes do not go together.
        """
        super().__post_init__()
        if self.test_lengths is not None and (
            not self.test_lengths or min(self.test_lengths) < 1 or len(set(self.test_lengths)) < len(self.test_lengths)
        ):
            self.fail("test_lengths", "expected different numbers, each at least 1")
        self.check()
        for name, lengths in (("seq_len", self.lengths("train")), ("test_lengths", self.lengths("test"))):
            if min(lengths) < self.shortest():
                self.fail(name, f"expected at least {self.shortest()} with the other settings as they are")

    def lengths(self, split: str) -> list[int]:
        """The lengths of a split, one table each."""
        return self.test_lengths if split == "test" and self.test_lengths is not None else [self.seq_len]

    def check(self) -> None:
        """Refuses settings that do not go together, whatever the length.

        Raises:
            ConfigError: They do not.
        """

    def shortest(self) -> int:
        """The least length for which there are sequences."""
        return 1


C = TypeVar("C", bound=SyntheticConfig)


class Synthetic(Source[C]):
    """A generated task, in one table per length; slice `seq_len` and what the task adds.

    Every row belongs to one split, by a hash of its tokens: eight in ten to training, one to validation and one to
    test. No row is then seen and tested, however few there are.

    Args:
        config: its settings.

    Attributes:
        format: raised whenever `generate` gives other rows for the same arguments.
        marks: what is known of a row beside its slices, as columns of the same kind; metrics are not split by them.
    """

    format: ClassVar[int] = 1
    marks: ClassVar[tuple[str, ...]] = ()
    default_examples: ClassVar[dict[str, int]] = {"validation": 256, "test": 512}

    def __init__(self, config: C) -> None:
        self.config = config
        self.batch_size = 64 if config.batch_size is None else config.batch_size
        # Long sequences come in small batches: it is their tokens that take memory.
        longest = max(config.seq_len, *config.lengths("test"))
        fitting = min(max(_EVAL_TOKENS // longest, 1), 512)
        self.eval_batch_size = fitting if config.eval_batch_size is None else config.eval_batch_size
        self.shuffle = True if config.shuffle is None else config.shuffle
        self.slice_values = {"seq_len": sorted({*config.lengths("validation"), *config.lengths("test")})}

    @staticmethod
    @abstractmethod
    def generate(rows: int, draws: Draws, **arguments: Any) -> Examples:
        """Draws N = `rows` rows.

        Args:
            rows: N.
            draws: where all randomness comes from.
            **arguments: of one table, as `arguments` gives them.
        """

    @abstractmethod
    def arguments(self, split: str) -> list[dict[str, Any]]:
        """For each table of a split the arguments of `generate`, which are plain numbers and texts."""

    def load(self, split: str) -> list[datasets.Dataset]:
        """One table per length.

        Raises:
            ConfigError: the task has too few different rows of a length.
        """
        inputs, targets = token_types(self.vocab_size)
        tables = self.arguments(split)
        # The recipe's steps are one epoch, shared equally by the tables.
        fresh = -(-self.recipe.max_steps // len(tables)) * self.batch_size
        num_examples = self.config.examples(split) or self.default_examples.get(split, fresh)
        return [
            build(
                _rows,
                {"inputs": (inputs, length), "targets": (targets, length)}
                | {SLICE_PREFIX + name: ("int32", None) for name in (*self.slice_values, *self.marks)},
                task=self.name,
                split=split,
                num_examples=num_examples,
                data_seed=self.config.data_seed,
                names=(*self.slice_values, *self.marks),
                format=(FORMAT, self.format),
                **arguments,
            )
            for arguments in tables
            for length in [self.generate(1, Draws(), **arguments).inputs.shape[1]]
        ]

    def facts(self) -> dict[str, Any]:
        """The training length and the seed of the examples."""
        return {"seq_len": self.config.seq_len, "data_seed": self.config.data_seed}


def examples(task: str, split: str, num_examples: int, data_seed: int, **arguments: Any) -> Iterator[Examples]:
    """The rows of one table of a task, in blocks.

    Raises:
        ConfigError: there are too few different rows.
    """
    generate = get_data(task).source.generate  # type: ignore[attr-defined]
    draws = Draws(task, split, data_seed, sorted(arguments.items()))
    found = drawn = 0
    while found < num_examples:
        if drawn > _DRAWS_PER_ROW * (found + 100):
            raise ConfigError(
                f"data={task} found {found} {split} examples in {drawn:,} draws, not {num_examples}: "
                f"ask for longer sequences or more tokens to choose from"
            )
        block = generate(max(1, _BLOCK // arguments.get("seq_len", 64)), draws, **arguments)
        keep = _owners(block.inputs) == SPLITS.index(split)
        if block.valid is not None:
            keep &= block.valid
        rows = np.flatnonzero(keep)[: num_examples - found]
        drawn += len(block.inputs)
        found += len(rows)
        yield Examples(
            block.inputs[rows], block.targets[rows], {name: values[rows] for name, values in block.slices.items()}
        )


def _owners(inputs: np.ndarray) -> np.ndarray:
    """The split (its place in `SPLITS`) that each row belongs to, (N,)."""
    weights = np.random.PCG64(0).random_raw(inputs.shape[1]) | np.uint64(1)
    mixed = ((inputs + 1).astype(np.uint64) * weights).sum(1)  # modulo 2^64
    return np.maximum(((mixed >> np.uint64(32)) % np.uint64(10)).astype(np.int64) - 7, 0)


def _rows(format: tuple[int, int], names: tuple[str, ...], **arguments: Any) -> Iterator[dict[str, Any]]:
    same = {name: arguments[name] for name in names if name in arguments}
    for block in examples(**arguments):
        slices = {SLICE_PREFIX + name: np.broadcast_to(same[name], len(block.inputs)) for name in same} | {
            SLICE_PREFIX + name: values for name, values in block.slices.items()
        }
        for inputs, targets, *values in zip(block.inputs, block.targets, *slices.values(), strict=True):
            yield {"inputs": inputs, "targets": targets} | dict(zip(slices, values, strict=True))
