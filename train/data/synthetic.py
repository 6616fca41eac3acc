"""What generated tasks have in common: settings, streams of random numbers, and tables of rows of one shape.

A task is a function that draws rows from a stream, and settings that become its arguments. All else is here: a stream
for each (task, arguments, split, `data.data_seed`), a split for each row, training at one length and tests at several.

Shape letters: N rows, L tokens per row, A labels of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from zoo.kernels.errors import ConfigError
from zoo.settings import setting
from zoo.train.data.base import SPLITS, DataConfig, Source, get_data
from zoo.train.data.cache import build, token_types
from zoo.train.data.draws import Draws
from zoo.train.data.stream import ANSWERS, IGNORE, SLICE_PREFIX, EvalBatches

if TYPE_CHECKING:
    import datasets

# Part of what the cache is found by: raise it whenever what is here gives other rows. Each task has one of its own.
FORMAT = 1
# Rows are drawn in blocks of about so many tokens; the rows of a seed depend on it.
_BLOCK = 2**18
_DRAWS_PER_ROW = 1_000
_EVAL_TOKENS = 2**16


class Examples(NamedTuple):
    """Rows of one length."""

    inputs: np.ndarray
    """(N, L)"""
    targets: np.ndarray
    """(N, L): what the logits at a token must predict, -100 where nothing is asked."""
    slices: Mapping[str, np.ndarray] = {}
    """By name (N,), those that differ from row to row; the others are arguments of the task. `answers` is (N, A)."""
    valid: np.ndarray | None = None
    """(N,): rows to keep; None: all."""


@dataclass(kw_only=True)
class SyntheticConfig(DataConfig):
    """Settings of all generated tasks.

    A length is always the number of tokens that the model sees. What a task adds become arguments of its generator.
    """

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
        for name, split in (("seq_len", "train"), ("test_lengths", "test")):
            lengths = self.lengths(split)
            if self.parity() is not None and any(length % 2 != self.parity() for length in lengths):
                self.fail(name, f"expected {'odd' if self.parity() else 'even'} numbers")
            if min(lengths) < self.shortest():
                self.fail(name, f"expected at least {self.shortest()} with the other settings as they are")

    def lengths(self, split: str) -> list[int]:
        """The lengths of a split, one table each."""
        return self.test_lengths if split == "test" and self.test_lengths is not None else [self.seq_len]

    def options(self, split: str) -> dict[str, Any]:
        """The arguments of the generator in a split, beside the length: plain numbers and texts."""
        common = {field.name for field in fields(SyntheticConfig)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}

    def check(self) -> None:
        """Refuses settings that do not go together, whatever the length.

        Raises:
            ConfigError: They do not.
        """

    def parity(self) -> int | None:
        """0 where lengths must be even, 1 where odd; None: any."""
        return None

    def shortest(self) -> int:
        """The least length for which there are sequences."""
        return 1


@dataclass(kw_only=True)
class NextTokenConfig(SyntheticConfig):
    """Settings of tasks that can be learnt from every next token or from the answers alone."""

    loss_on: str = setting("all", "training labels: all next tokens, or the answer only", choices=("all", "answer"))

    def options(self, split: str) -> dict[str, Any]:
        """Validation and test ask for the answers alone."""
        return super().options(split) | ({} if split == "train" else {"loss_on": "answer"})


def levels_of(shown: int, ids: int) -> dict[str, float]:
    """Accuracy of guessing one of all `ids` answers, or, on the plateau, one of the `shown` in the row.

    Where only one is shown, to give it takes all the skill that the task asks for.
    """
    chance = 1 / ids
    return {"chance": chance} if shown == 1 else {"chance": chance, "plateau": (1 + (shown - 1) * chance) / shown}


C = TypeVar("C", bound=SyntheticConfig)


class Synthetic(Source[C]):
    """A generated task, in one table per length; slice `seq_len` and what the task adds.

    Every row belongs to one split, by a hash of its tokens: eight in ten to training, one to validation and one to
    test. No row is then seen and tested, however few there are.

    Args:
        config: its settings.

    Attributes:
        generate: draws rows, from their number, a `Draws` and the arguments of a table, which are named.
        format: raised whenever `generate` gives other rows for the same arguments.
        marks: what is known of a row beside its slices, as columns of the same kind; metrics are not split by them.
            `answers` is a list: for each label of a row, in order, where in the row its answer stands.
    """

    generate: ClassVar[Callable[..., Examples]]
    format: ClassVar[int] = 1
    marks: tuple[str, ...] = ()
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

    def arguments(self, split: str) -> list[dict[str, Any]]:
        """For each table of a split the arguments of `generate`."""
        return [{"seq_len": length, **self.config.options(split)} for length in self.config.lengths(split)]

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
                {"inputs": (inputs, arguments["seq_len"]), "targets": (targets, arguments["seq_len"])}
                | {
                    SLICE_PREFIX + name: ("int32", -1 if name == ANSWERS else None)
                    for name in (*self.slice_values, *self.marks)
                },
                task=self.name,
                split=split,
                num_examples=num_examples,
                data_seed=self.config.data_seed,
                names=(*self.slice_values, *self.marks),
                format=(FORMAT, self.format),
                **arguments,
            )
            for arguments in tables
        ]

    def facts(self) -> dict[str, Any]:
        """The training length, the task's settings and the seed of the examples."""
        config = self.config
        return {"seq_len": config.seq_len, **config.options("train"), "data_seed": config.data_seed}


class Recall(Synthetic[C]):
    """A generated task whose answers are among the values that the row has shown, some far more often than others.

    Its plateau is measured on the test rows: the accuracy of answering with the value that has stood most often so far,
    token by token where values have several.

    Attributes:
        values: the token ids of values.
        value_size: most tokens of a value.
    """

    values: range
    value_size: int = 1

    @cached_property
    def levels(self) -> dict[str, float]:  # type: ignore[override]
        """Accuracy of guessing one of all values, and of the plateau."""
        right = labels = 0
        for batch in EvalBatches(self.load("test"), self.eval_batch_size).whole():
            inputs, targets = batch["inputs"].numpy(), batch["targets"].numpy()
            right += (most_frequent(inputs, self.values, self.value_size) == targets).sum()
            labels += (targets != IGNORE).sum()
        return {"chance": 1 / len(self.values), "plateau": float(right / labels)}


def most_frequent(inputs: np.ndarray, values: range, value_size: int) -> np.ndarray:
    """At each token the value that has stood most often so far, (N, L); -1 before the first.

    Only the same token of a value counts, the first or the second, ...; of several values the first to be so frequent.
    """
    row = np.arange(len(inputs))
    counts = np.zeros((len(inputs), value_size + 1, len(values)), dtype=np.int64)
    guess = np.full(counts.shape[:2], -1)
    often, place = np.zeros_like(guess), np.zeros_like(row)  # place: tokens of a value that stand just before
    found = np.empty_like(inputs)
    for i, token in enumerate(inputs.T):
        is_value = (token >= values.start) & (token < values.stop)
        at = row[is_value], place[is_value]
        new = token[is_value]
        counts[(*at, new - values.start)] += 1
        count = counts[(*at, new - values.start)]
        guess[at] = np.where(count > often[at], new, guess[at])
        often[at] = np.maximum(count, often[at])
        place = np.where(is_value, place + 1, 0)
        found[:, i] = guess[row, place]
    return found


def examples(task: str, split: str, num_examples: int, data_seed: int, **arguments: Any) -> Iterator[Examples]:
    """The rows of one table of a task, in blocks.

    Raises:
        ConfigError: there are too few different rows.
    """
    generate = get_data(task).source.generate  # type: ignore[attr-defined]
    draws = Draws(task, split, data_seed, sorted(arguments.items()))
    rows = max(1, _BLOCK // arguments["seq_len"])

    def too_few(found: int, drawn: int) -> str:
        return (
            f"data={task} found {found} {split} examples in {drawn:,} draws, not {num_examples}: "
            f"ask for longer sequences or more tokens to choose from"
        )

    return owned(
        (generate(rows, draws, **arguments) for _ in itertools.count()), split, num_examples, _DRAWS_PER_ROW, too_few
    )


def owned(
    blocks: Iterator[Examples],
    split: str,
    num_examples: int,
    draws_per_row: int,
    too_few: Callable[[int, int], str],
) -> Iterator[Examples]:
    """The rows of endless blocks that belong to a split, the first `num_examples`, in blocks.

    Args:
        blocks: what is drawn.
        split: one of `SPLITS`.
        num_examples: how many rows.
        draws_per_row: how many draws each row may take, and a hundred rows more.
        too_few: says what is wrong where nearly no row is of the split, from how many were found and drawn.

    Raises:
        ConfigError: there are too few different rows.
    """
    found = drawn = 0
    while found < num_examples:
        if drawn > draws_per_row * (found + 100):
            raise ConfigError(too_few(found, drawn))
        block = next(blocks)
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
