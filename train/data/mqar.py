"""`data=mqar`: multi-query associative recall (Zoology, arXiv 2312.04927; Based, arXiv 2402.18668).

A sequence names `num_pairs` keys with their values, k0 v0 k1 v1 ..., then asks for each key once; the label stands at
the asked key. In between is filler, token 0. Keys are the ids 1 ... V/2 - 1, values V/2 ... V - 1.

Each split has seeds of its own, as published, which keeps them apart as long as two examples are hardly ever alike. For
small shapes, none of them published, an example belongs to one split by a hash of its tokens instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.kernels.errors import ConfigError
from zoo.settings import setting
from zoo.train.data.base import SPLITS, DataConfig, Source, register_data
from zoo.train.data.cache import build, token_types
from zoo.train.data.mqar_examples import FORMAT, check, check_even, generate, generate_apart
from zoo.train.data.stream import SLICE_PREFIX
from zoo.train.recipe import Recipe

if TYPE_CHECKING:
    import datasets

# With more different contexts, keys and their values, than this, a thousand test examples meet one of a million of
# training less than once in a hundred seeds.
_MANY = 10**11


@dataclass(frozen=True)
class Segment:
    """Some examples of one shape."""

    seq_len: int
    num_pairs: int
    num_examples: int

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and pairs."""
        return self.seq_len, self.num_pairs


@dataclass(frozen=True)
class Preset:
    """A published or proposed setting.

    Attributes:
        train: segments, in the order in which they are trained on.
        validation: segments; the published code has none, it validates on its test set.
        test: segments.
        lines: the pairs that belong to a length, used when a run asks for one length.
        batch_sizes: training batch for lengths up to the first number.
        eval_batch_size: of validation and test; None: as in training.
        recipe: steps and learning rate; those of the papers are their epochs and the middle of their grids.
    """

    train: tuple[Segment, ...]
    validation: tuple[Segment, ...]
    test: tuple[Segment, ...]
    lines: dict[int, int]
    batch_sizes: dict[int, int]
    eval_batch_size: int | None
    vocab_size: int
    shuffle: bool
    random_fillers: bool
    recipe: Recipe
    power_a: float = 0.01


_BASED_TEST = tuple(
    Segment(length, pairs, 1_000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)

PRESETS = {
    # Two CPU cores learn it in a minute or two; a plain GRU stays near one right answer in four. The easier segments
    # are for training only: with them recurrent models leave the plateau of guessing among the shown values.
    "nano": Preset(
        train=(Segment(32, 4, 60_000), Segment(16, 2, 20_000), Segment(8, 2, 20_000)),
        validation=(Segment(32, 4, 512),),
        test=(Segment(32, 4, 2_048),),
        lines={32: 4, 64: 4},
        batch_sizes={64: 64},
        eval_batch_size=512,
        vocab_size=64,
        shuffle=True,
        random_fillers=False,
        recipe=Recipe(max_steps=5_000, lr=2e-3),
    ),
    # Figure 2 of arXiv 2312.04927: one line at a time, chosen by data.seq_len.
    "zoology_fig2": Preset(
        train=(Segment(64, 4, 100_000),),
        validation=(Segment(64, 4, 3_000),),
        test=(Segment(64, 4, 3_000),),
        lines={64: 4, 128: 8, 256: 16, 512: 64},
        batch_sizes={128: 512, 256: 256, 512: 128, 1024: 64},
        eval_batch_size=None,
        vocab_size=8_192,
        shuffle=False,
        random_fillers=False,
        recipe=Recipe(max_steps=12_500, lr=1e-3),
    ),
    # The recall experiment of arXiv 2402.18668, as in the published code.
    "based_recall": Preset(
        train=(
            Segment(64, 4, 100_000),
            *(Segment(length, pairs, 20_000) for length, pairs in ((128, 8), (256, 16), (256, 32), (256, 64))),
        ),
        validation=_BASED_TEST,
        test=_BASED_TEST,
        lines={64: 4, 128: 8, 256: 16, 512: 128, 1024: 256},
        batch_sizes={1024: 256},
        eval_batch_size=32,
        vocab_size=8_192,
        shuffle=False,
        random_fillers=True,
        recipe=Recipe(max_steps=22_500, lr=3e-3),
    ),
}


@dataclass(kw_only=True)
class MQARConfig(DataConfig):
    """Settings of `data=mqar`. None takes the preset's value.

    With `seq_len` or `num_pairs` every split is one segment of that shape, but for the test with `test_lengths`.
    """

    preset: str = setting("nano", "the setting to start from", choices=list(PRESETS))
    seq_len: int | None = setting(None, "tokens per sequence, even", minimum=4)
    num_pairs: int | None = setting(None, "key-value pairs per sequence, at most seq_len / 4", minimum=1)
    test_lengths: list[int] | None = setting(None, "tokens per sequence in the test, one or several; null: no others")
    test_pairs: list[int] | None = setting(None, "the pairs of each of these; null: those of the (first) training")
    vocab_size: int | None = setting(None, "token ids: filler, keys and values; at least 2 num_pairs + 2", minimum=4)
    num_examples: int | None = setting(None, "training examples per segment", minimum=1)
    validation_examples: int | None = setting(None, "validation examples per segment", minimum=1)
    test_examples: int | None = setting(None, "test examples per segment", minimum=1)
    power_a: float | None = setting(None, "how early queries come; 1 spreads them evenly", above=0)
    random_fillers: bool | None = setting(None, "random tokens between the queries instead of token 0")
    data_seed: int = setting(
        123, "makes the examples; the run's own seed only orders them", minimum=0, maximum=2**32 - 1
    )

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: A value is out of range, or the sizes do not go together.
        """
        super().__post_init__()
        if self.test_lengths == []:
            self.fail("test_lengths", "expected at least one length, or null")
        if self.test_pairs is not None and len(self.test_pairs) != len(self.test_lengths or ()):
            self.fail("test_pairs", f"expected one number for each of data.test_lengths={self.test_lengths}")
        vocab_size, power_a = _given(self.vocab_size, self.base.vocab_size), _given(self.power_a, self.base.power_a)
        for split in SPLITS:
            for segment in self.segments(split):
                check(segment.seq_len, segment.num_pairs, vocab_size, power_a)
        for segment in self.segments("test"):
            learnt = segment.shape in _shapes(self.segments("train"))
            if learnt and self._small(segment) and not self.apart(segment):
                raise ConfigError(
                    f"data.preset={self.preset} has nearly all examples of {segment.seq_len} tokens with "
                    f"{segment.num_pairs} pairs in training: test at another of data.test_lengths or data.test_pairs"
                )

    @property
    def base(self) -> Preset:
        """The preset that fills in what is None."""
        return PRESETS[self.preset]

    def segments(self, split: str) -> tuple[Segment, ...]:
        """The segments of "train", "validation" or "test".

        Raises:
            ConfigError: the preset knows no number of pairs for `seq_len`, and none is given.
        """
        segments = self._segments(split)
        if split != "test" or self.test_lengths is None:
            return segments
        pairs = self.test_pairs or [self._segments("train")[0].num_pairs] * len(self.test_lengths)
        number = segments[0].num_examples
        return tuple(Segment(length, count, number) for length, count in zip(self.test_lengths, pairs, strict=True))

    def _segments(self, split: str) -> tuple[Segment, ...]:
        """The same without `test_lengths`."""
        segments: tuple[Segment, ...] = getattr(self.base, split)
        if self.seq_len is not None or self.num_pairs is not None:
            seq_len = _given(self.seq_len, segments[0].seq_len)
            check_even(seq_len)
            num_pairs = self.base.lines.get(seq_len) if self.num_pairs is None else self.num_pairs
            if num_pairs is None:
                known = ", ".join(f"{length} with {pairs} pairs" for length, pairs in self.base.lines.items())
                raise ConfigError(
                    f"data.seq_len={seq_len} is not in data.preset={self.preset} ({known}): give data.num_pairs too"
                )
            segments = (Segment(seq_len, num_pairs, segments[0].num_examples),)
        wanted = self.examples(split)
        return tuple(Segment(s.seq_len, s.num_pairs, _given(wanted, s.num_examples)) for s in segments)

    def apart(self, segment: Segment) -> bool:
        """Whether splits share the shape of a segment and it is so small that their examples would be alike.

        Whatever `test_lengths` are: they change nothing of the training.
        """
        return self._small(segment) and sum(segment.shape in _shapes(self._segments(split)) for split in SPLITS) > 1

    def _small(self, segment: Segment) -> bool:
        vocab_size = _given(self.vocab_size, self.base.vocab_size)
        keys, values = vocab_size // 2 - 1, vocab_size - vocab_size // 2
        return math.perm(keys, segment.num_pairs) * math.perm(values, segment.num_pairs) <= _MANY

    def seeds(self, split: str) -> list[int]:
        """The seed of each segment: the published code's for training and test, the draws after them for the others."""
        random = np.random.RandomState(self.data_seed)
        drawn = {}
        for name, low, high in (("train", 0, 2**31), ("test", 2**31, 2**32), ("validation", 2**31, 2**32)):
            drawn[name] = random.randint(low, high, size=len(self._segments(name)), dtype=np.int64).tolist()
        if self.test_lengths is not None:  # last, so that they change neither training nor validation
            drawn["test"] = random.randint(2**31, 2**32, size=len(self.test_lengths), dtype=np.int64).tolist()
        return drawn[split]


def _shapes(segments: tuple[Segment, ...]) -> set[tuple[int, int]]:
    return {segment.shape for segment in segments}


def _given(value: Any, preset: Any) -> Any:
    return preset if value is None else value


@register_data("mqar", config=MQARConfig)
class MQAR(Source[MQARConfig]):
    """Multi-query associative recall, in segments of one shape each; slices `seq_len` and `num_pairs`.

    Args:
        config: its settings.
    """

    def __init__(self, config: MQARConfig) -> None:
        self.config = config
        preset, train = config.base, config.segments("train")
        longest = max(segment.seq_len for segment in train)
        fitting = [size for limit, size in preset.batch_sizes.items() if longest <= limit]
        self.vocab_size = _given(config.vocab_size, preset.vocab_size)
        self.batch_size = _given(config.batch_size, fitting[0] if fitting else min(preset.batch_sizes.values()))
        self.eval_batch_size = _given(config.eval_batch_size, _given(preset.eval_batch_size, self.batch_size))
        self.shuffle = _given(config.shuffle, preset.shuffle)
        self.recipe = preset.recipe
        evaluated = config.segments("validation") + config.segments("test")
        self.slice_values = {
            name: sorted({getattr(segment, name) for segment in evaluated}) for name in ("seq_len", "num_pairs")
        }
        # Micro accuracy over the test labels, each example having num_pairs of them.
        test = config.segments("test")
        labels = sum(segment.num_examples * segment.num_pairs for segment in test)
        self.levels = {
            "chance": 1 / self.vocab_size,
            "plateau": sum(segment.num_examples for segment in test) / labels,
        }

    def load(self, split: str) -> list[datasets.Dataset]:
        """The segments of a split."""
        config = self.config
        inputs, targets = token_types(self.vocab_size)
        return [
            build(
                _rows,
                {
                    "inputs": (inputs, segment.seq_len),
                    "targets": (targets, segment.seq_len),
                    f"{SLICE_PREFIX}seq_len": ("int32", None),
                    f"{SLICE_PREFIX}num_pairs": ("int32", None),
                },
                num_examples=segment.num_examples,
                seq_len=segment.seq_len,
                num_pairs=segment.num_pairs,
                vocab_size=self.vocab_size,
                seed=seed,
                power_a=_given(config.power_a, config.base.power_a),
                random_fillers=_given(config.random_fillers, config.base.random_fillers),
                format=FORMAT,
                **({"split": split} if config.apart(segment) else {}),
            )
            for segment, seed in zip(config.segments(split), config.seeds(split), strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """The preset, and the seed of the examples."""
        return {"preset": self.config.preset, "data_seed": self.config.data_seed}


def _rows(format: int, **arguments: Any) -> Iterator[dict[str, Any]]:
    shape = {f"{SLICE_PREFIX}{name}": arguments[name] for name in ("seq_len", "num_pairs")}
    examples = generate_apart(**arguments) if "split" in arguments else generate(**arguments)
    for inputs, targets in zip(*examples, strict=True):
        yield {"inputs": inputs, "targets": targets} | shape
