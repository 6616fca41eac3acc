"""What every dataset has in common: settings, what it tells the trainer, the registry, the Lightning data module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.codec import Codec
from zoo.kernels.errors import ConfigError, did_you_mean
from zoo.settings import Settings, setting
from zoo.train.data.running import RunningEval, RunningStream, RunningText
from zoo.train.data.stream import ANSWERS, IGNORE, Batch, BatchStream, EndlessBatches, EvalBatches
from zoo.train.recipe import Recipe

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Settings that every dataset has. None stands for the dataset's own choice."""

    batch_size: int | None = setting(None, "sequences per training batch, over all devices together", minimum=1)
    eval_batch_size: int | None = setting(None, "the same for validation and test", minimum=1)
    shuffle: bool | None = setting(None, "take the training examples in a new order each epoch")
    num_examples: int | None = setting(None, "training examples to generate or to keep", minimum=1)
    validation_examples: int | None = setting(None, "the same for validation", minimum=1)
    test_examples: int | None = setting(None, "the same for test", minimum=1)
    num_workers: int = setting(0, "processes that read training batches ahead; 0 is enough for cached data", minimum=0)

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raises the one-line error about `data.<name>`; `expected` says what would have been right."""
        raise ConfigError(f"data.{name}={getattr(self, name)} is not valid: {expected}")

    def examples(self, split: str) -> int | None:
        """The number of examples asked for in a split."""
        return {"train": self.num_examples, "validation": self.validation_examples, "test": self.test_examples}[split]


ConfigT = TypeVar("ConfigT", bound=DataConfig)


class Source(ABC, Generic[ConfigT]):
    """A dataset: what the trainer must know of it, and its rows.

    A split is a list of tables (`datasets.Dataset`, Arrow format, memory-mapped), as the rows of one table have one
    length. Their columns: `inputs`, `targets` and, for packed text, `segment_ids`, lists of one fixed length; and
    `slice_<name>`, one integer per row, by which metrics are split. Rows depend on the config alone.

    Attributes:
        name: the name it is registered under.
        config: its settings.
        vocab_size: token ids are below this.
        batch_size: sequences per training batch, over all devices.
        eval_batch_size: the same for validation and test.
        shuffle: whether each epoch takes the training examples in a new order.
        slice_values: for each slice, its values in validation and test.
        joint_slices: slices by which metrics are split together, such as ("seq_len", "depth").
        levels: accuracies that show no skill, to be printed beside a score ("chance", "plateau").
        unit: "byte" or "token" where a target is a piece of text (bits per byte make sense), else None.
        codec: turns text into tokens and back; None where tokens are no text.
        running: whether the rows are running text: a row of `windows` goes on where the one before it ended.
        recipe: how to train where the settings leave it open.
    """

    name: ClassVar[str]
    config: ConfigT
    vocab_size: int
    batch_size: int
    eval_batch_size: int
    shuffle: bool
    slice_values: dict[str, list[int]]
    joint_slices: tuple[tuple[str, ...], ...] = ()
    levels: dict[str, float]
    unit: str | None = None
    codec: Codec | None = None
    running: bool = False
    recipe: Recipe = Recipe()

    @abstractmethod
    def load(self, split: str) -> list[datasets.Dataset]:
        """The tables of "train", "validation" or "test": made on the first call, then read from the datasets cache."""

    def windows(self, split: str) -> datasets.Dataset:
        """Of running text all rows of a split in the order of the text; `document` numbers the first document of each.

        `segment_ids` count documents from there, so that the sum of both is a document's number in the split.
        """
        raise NotImplementedError

    def bytes_per_label(self, split: str, windows: datasets.Dataset | None = None) -> float | None:
        """Bytes of text that a label stands for: bits per byte = nats / (ln 2 * this). None: no text.

        Args:
            split: of its rows.
            windows: some of the rows of `windows(split)`; None: what `load(split)` gives.
        """
        return None

    def answer_positions(self, batch: Batch) -> Tensor | None:
        """For each label where in its row the answer stands, (B, L) int64, -1 elsewhere; None: nobody knows."""
        answers = batch["slices"].get(ANSWERS)
        if answers is None:
            return None
        labels = batch["targets"] != IGNORE
        return torch.where(labels, answers.gather(1, (labels.cumsum(1) - 1).clamp(min=0)), -1)

    def facts(self) -> dict[str, Any]:
        """What identifies the data, for a run's summary: plain strings and numbers."""
        return {}


@dataclass(frozen=True)
class Entry:
    """A registered dataset: its name, the class that makes it, and the class of its settings."""

    name: str
    source: type[Source]
    config: type[DataConfig]


_REGISTRY: dict[str, Entry] = {}


def register_data(name: str, *, config: type[DataConfig]) -> Callable[[type[Source]], type[Source]]:
    """Class decorator: makes a `Source` known as `data=<name>` with settings of the class `config`.

    Raises:
        ConfigError: the name or the config class is taken.
    """

    def register(source: type[Source]) -> type[Source]:
        for entry in _REGISTRY.values():
            if name == entry.name or config is entry.config:
                raise ConfigError(
                    f"data={name} with {config.__name__} clashes with data={entry.name}: rename one of them"
                )
        source.name = name
        _REGISTRY[name] = Entry(name, source, config)
        return source

    return register


def list_data() -> list[str]:
    """The names of all datasets, sorted."""
    return sorted(_REGISTRY)


def get_data(name: str) -> Entry:
    """The dataset registered as `name`.

    Raises:
        ConfigError: there is none; the message names near misses.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"no dataset {name!r}: {did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def create_source(config: DataConfig) -> Source:
    """The dataset whose settings `config` holds.

    Raises:
        ConfigError: no dataset has settings of this class.
        DataError: the data named by the settings do not exist.
    """
    for entry in _REGISTRY.values():
        if type(config) is entry.config:
            return entry.source(config)  # type: ignore[call-arg]
    raise ConfigError(f"{type(config).__name__} belongs to no registered dataset (known: {', '.join(list_data())})")


class DataModule(lightning.LightningDataModule):
    """Batches of one dataset.

    A batch is a dict: `inputs` (B, L) and `targets` (B, L) int64, where `targets[b, i]` is what `logits[b, i]` must
    predict and -100 is ignored; `segment_ids` (B, L) int64 where documents are packed; `slices`, a dict of (B,) int64.
    Training batches also carry `digest`, which `BatchHash` chains.

    Training batch i depends on (config, seed, i) alone: not on the model, the device, the number of devices or torch's
    random state. The training loader never ends; it starts at `start_batch`. Under several devices each gets every
    n-th row of the batch.

    Args:
        config: settings of the dataset.
        seed: orders the training batches (where the dataset shuffles).
        segment_length: read running text in order instead, so many tokens at a time: each row of a batch goes on where
            that row of the batch before it ended; see `RunningText`.

    Attributes:
        source: the dataset.
        seed: orders the training batches (where the dataset shuffles).
        start_batch: index of the batch the next training loader begins with.
    """

    def __init__(self, config: DataConfig, seed: int, segment_length: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.segment_length = segment_length
        self.start_batch = 0
        self.source = create_source(config)
        self._tables: dict[str, list[datasets.Dataset]] = {}
        self._texts: dict[str, RunningText] = {}

    def prepare_data(self) -> None:
        """Makes every split in the datasets cache; Lightning calls it in one process per machine."""
        for split in SPLITS:
            self.source.load(split)

    def bytes_per_label(self, split: str) -> float | None:
        """Bytes of text that a label of the split's batches stands for; None where the data are no text."""
        return self.source.bytes_per_label(split, None if self.segment_length is None else self._text(split).windows)

    def train_dataloader(self) -> EndlessBatches | DataLoader:
        """The endless stream of training batches, from `start_batch` on.

        Raises:
            ConfigError: the batch cannot be shared evenly by the devices.
        """
        rank, world_size = self._place()
        if self.source.batch_size % world_size:
            raise ConfigError(
                f"data.batch_size={self.source.batch_size} cannot be shared by {world_size} devices: choose a multiple"
            )
        seed = self.seed if self.source.shuffle else None
        stream: EndlessBatches
        if self.segment_length is None:
            table, size = self._load("train"), self.source.batch_size
            stream = BatchStream(table, size, seed=seed, start=self.start_batch, rank=rank, world_size=world_size)
        else:
            text = self._text("train")
            stream = RunningStream(text, seed=seed, start=self.start_batch, rank=rank, world_size=world_size)
        if not self.config.num_workers:
            return stream
        # An own generator, because a DataLoader without one draws from torch's global random state.
        return DataLoader(
            stream, batch_size=None, num_workers=self.config.num_workers, generator=torch.Generator().manual_seed(0)
        )

    def val_dataloader(self) -> EvalBatches:
        """All validation batches, in a fixed order."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvalBatches:
        """All test batches, in a fixed order."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> EvalBatches:
        rank, world_size = self._place()
        if self.segment_length is not None:
            return RunningEval(self._text(split), rank=rank, world_size=world_size)
        return EvalBatches(self._load(split), self.source.eval_batch_size, rank=rank, world_size=world_size)

    def _load(self, split: str) -> list[datasets.Dataset]:
        if split not in self._tables:
            self._tables[split] = self.source.load(split)
        return self._tables[split]

    def _text(self, split: str) -> RunningText:
        if split not in self._texts:
            assert self.segment_length is not None
            rows = self.source.batch_size if split == "train" else self.source.eval_batch_size
            wanted = self.config.examples(split)
            self._texts[split] = RunningText(self.source.windows(split), rows, self.segment_length, wanted)
        return self._texts[split]

    def _place(self) -> tuple[int, int]:
        """This process among all that share the batches: (rank, number of processes)."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
