"""`data=text`: local files or a Hugging Face dataset, as bytes or tokens, packed into windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from zoo.codec import ByteCodec, Codec, codec_from_dict, load_tokenizer
from zoo.kernels.errors import ConfigError, DataError
from zoo.settings import setting
from zoo.train.data.base import DataConfig, Source, register_data
from zoo.train.data.cache import build, token_types
from zoo.train.data.corpus import Corpus, Shares, hub_corpus, path_corpus
from zoo.train.data.packing import pack
from zoo.train.recipe import Recipe

if TYPE_CHECKING:
    import datasets

# Part of what the cache is found by: raise it whenever the packed rows of the same corpus change.
FORMAT = 2


@dataclass(kw_only=True)
class PackedTextConfig(DataConfig):
    """Settings of every packed text."""

    batch_size: int | None = setting(16, "windows per training batch, over all devices together", minimum=1)
    eval_batch_size: int | None = setting(16, "the same for validation and test", minimum=1)
    shuffle: bool | None = setting(True, "take the training windows in a new order each epoch")
    seq_len: int = setting(512, "tokens per window", minimum=2)
    num_examples: int | None = setting(None, "training windows to keep, spread over the split; null: all", minimum=1)
    validation_examples: int | None = setting(None, "the same for validation", minimum=1)
    test_examples: int | None = setting(None, "the same for test", minimum=1)


@dataclass(kw_only=True)
class TextConfig(PackedTextConfig):
    """Settings of `data=text`; give either `path` or `hub`.

    Of local files, 100 or more are split by file; fewer are each cut into a training, a validation and a test block.
    """

    path: str | None = setting(None, "a file, a folder, or a pattern such as 'books/*.txt'")
    hub: str | None = setting(None, "id of a dataset on the Hugging Face hub, or a local folder `datasets` can read")
    hub_config: str | None = setting(None, "the hub dataset's configuration, where it has several")
    hub_revision: str | None = setting(None, "branch, tag or commit on the hub")
    column: str | None = setting(None, "the hub dataset's column of text; null: 'text' or the only one of strings")
    tokenizer: str | None = setting(None, "a tokenizer.json, a folder with one, or a hub id; null: bytes")
    vocab_size: int | None = setting(None, "vocabulary to declare; null: just what the tokens need", minimum=1)
    validation_share: float = setting(0.05, "part of the text for validation, where it has no such split", above=0)
    test_share: float = setting(0.05, "part of the text for test, where it has no such split", above=0)

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: A value is out of range, or the shares leave nothing to train on.
        """
        super().__post_init__()
        if self.validation_share + self.test_share >= 1:
            self.fail("validation_share", f"expected less than 1 together with data.test_share={self.test_share}")


PackedConfigT = TypeVar("PackedConfigT", bound=PackedTextConfig)


class PackedText(Source[PackedConfigT]):
    """Documents of a corpus, encoded, and packed into windows with their boundaries in `segment_ids`.

    Each token but a document's first is predicted exactly once, whatever `seq_len` is, and there is no token for the
    end of a document: losses per byte compare between window lengths and tokenizers.

    Args:
        config: its settings.
        corpus: the documents.
        codec: what makes them tokens.
    """

    running = True
    # A few minutes on two CPU cores; a small model is well below 3 bits per byte of source code by then.
    recipe = Recipe(max_steps=1_000, lr=3e-3)

    def __init__(self, config: PackedConfigT, corpus: Corpus, codec: Codec) -> None:
        self.config = config
        self.corpus = corpus
        self.codec: Codec = codec
        self.unit = codec.unit
        self.vocab_size = codec.vocab_size
        self.batch_size = config.batch_size or 16
        self.eval_batch_size = config.eval_batch_size or 16
        self.shuffle = config.shuffle is not False
        self.slice_values = {}
        self.levels = {}

    def windows(self, split: str) -> datasets.Dataset:
        """All windows of a split, in the order of the text.

        Raises:
            DataError: the split has less text than one window, or documents of one token alone.
        """
        seq_len = self.config.seq_len
        inputs, targets = token_types(self.codec.vocab_size)
        return build(
            _windows,
            {
                "inputs": (inputs, seq_len),
                "targets": (targets, seq_len),
                "segment_ids": (np.min_scalar_type(seq_len).name, seq_len),
                "document": ("int64", None),
                "target_bytes": ("int64", None),
            },
            corpus=self.corpus,
            split=split,
            codec=self.codec.to_dict(),
            seq_len=seq_len,
            format=FORMAT,
        )

    def load(self, split: str) -> list[datasets.Dataset]:
        """The windows of a split that are asked for, as one table.

        Raises:
            DataError: as in `windows`.
        """
        windows, wanted = self.windows(split), self.config.examples(split)
        if wanted is None or wanted >= len(windows):
            return [windows]
        return [windows.select(np.linspace(0, len(windows) - 1, wanted).round().astype(np.int64))]

    def bytes_per_label(self, split: str, windows: datasets.Dataset | None = None) -> float:
        """Bytes that the targets of these windows stand for, by their number; exactly 1 for bytes.

        Raises:
            DataError: the windows have no targets.
        """
        if windows is None:
            (windows,) = self.load(split)
        sizes = windows[:]["target_bytes"].to_numpy().sum()
        labels = sum(
            int((batch["targets"].combine_chunks().flatten().to_numpy() >= 0).sum())
            for batch in windows.select_columns(["targets"]).iter(1000)
        )
        if not labels:
            raise _nothing_to_predict(self.corpus, split)
        return float(sizes / labels)

    def facts(self) -> dict[str, Any]:
        """Name and hash of the corpus."""
        return {"corpus": self.corpus.name, "corpus_hash": self.corpus.digest}


@register_data("text", config=TextConfig)
class Text(PackedText[TextConfig]):
    """Text of the user's own.

    Args:
        config: its settings.

    Raises:
        ConfigError: both or neither of `path` and `hub` are given.
        DataError: there is no text, it cannot be had, or the vocabulary is too small for its tokens.
    """

    def __init__(self, config: TextConfig) -> None:
        shares = Shares(config.validation_share, config.test_share)
        corpus: Corpus
        if config.path is not None and config.hub is None:
            corpus = path_corpus(config.path, shares)
        elif config.hub is not None and config.path is None:
            corpus = hub_corpus(config.hub, config.hub_config, config.hub_revision, config.column, shares)
        else:
            given = "neither" if config.path is None else "both"
            raise ConfigError(
                f"data=text got {given} of data.path and data.hub: give one, a local path or a Hugging Face dataset id"
            )
        codec = ByteCodec() if config.tokenizer is None else load_tokenizer(config.tokenizer)
        super().__init__(config, corpus, codec)
        if config.vocab_size is not None:
            if config.vocab_size < codec.vocab_size:
                raise DataError(
                    f"data.vocab_size={config.vocab_size}: the {codec.unit}s go up to {codec.vocab_size - 1}, outside "
                    f"the vocabulary; give at least {codec.vocab_size} or leave it out"
                )
            self.vocab_size = config.vocab_size


def _windows(corpus: Corpus, split: str, codec: dict[str, str], seq_len: int, format: int) -> Iterator[dict[str, Any]]:
    encoder = codec_from_dict(codec)
    tokens = targets = 0

    def encoded() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal tokens, targets
        for document in corpus.documents(split):
            ids, sizes = encoder.encode_document(document)
            tokens += len(ids)
            targets += max(0, len(ids) - 1)
            yield ids, sizes

    yield from pack(encoded(), seq_len)
    if tokens < seq_len:
        raise DataError(
            f"{corpus.name}: the {split} split has {tokens} {encoder.unit}s, too short for one window of "
            f"data.seq_len={seq_len}: give more text or lower data.seq_len"
        )
    if not targets:
        raise _nothing_to_predict(corpus, split)


def _nothing_to_predict(corpus: Corpus, split: str) -> DataError:
    return DataError(
        f"{corpus.name}: the {split} split has nothing to predict, as no document's first token is: give longer "
        f"documents, or more windows of them"
    )
