"""`data=listops`: nested operations on lists of digits (arXiv 1804.06028; the long form of arXiv 2011.04006).

An expression such as `[MAX 4 [SM 9 3 ] 1 ]` has one value, a digit. Its tokens are digits, opening operators and one
closer. A row ends in a read-out token, where the only label stands; padding before the expression is a document of its
own, without a label. So the same rows serve a causal model, which has read everything at the read-out token, and a
classifier that pools the document.

What a score means is told by two rules that evaluate nothing: to answer the most common value, and to answer the most
common value under the outermost operator. Both are measured on the data and stand among the levels.

The published splits depend on chance and cannot be made again; these come from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.kernels.errors import ConfigError
from zoo.settings import setting
from zoo.train.data.base import DataConfig, Source, register_data
from zoo.train.data.cache import build, token_types
from zoo.train.data.expressions import (
    DIGITS,
    FIRST_OPERATOR,
    FORMAT,
    OPERATORS,
    PADDING,
    READ_OUT,
    SYMBOLS,
    Grammar,
    generate,
)
from zoo.train.data.stream import IGNORE, SLICE_PREFIX
from zoo.train.recipe import Recipe

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Preset:
    """A published or proposed setting.

    Attributes:
        grammar: what is drawn.
        examples: by split.
        step: expressions whose lengths lie within so many tokens share a table, whose rows are as long as the longest.
        recipe: steps and learning rate.
    """

    grammar: Grammar
    examples: dict[str, int]
    step: int
    batch_size: int
    eval_batch_size: int
    recipe: Recipe


# Training examples for an epoch of the recipe's steps: seen several times, they would be learnt by heart.
_NANO_EXAMPLES = {"train": 200_000, "validation": 1_024, "test": 2_048}
PRESETS = {
    "nano": Preset(Grammar(5, 5, 9, 64), _NANO_EXAMPLES, 8, 64, 512, Recipe(max_steps=3_000, lr=2e-3)),
    "tiny": Preset(Grammar(4, 4, 5, 32), _NANO_EXAMPLES, 4, 64, 512, Recipe(max_steps=3_000, lr=2e-3)),
    # Long Range Arena: its sizes, lengths and number of steps; own splits, as the published ones depend on chance.
    "lra": Preset(
        Grammar(10, 10, 501, 1_999),
        {"train": 96_000, "validation": 2_000, "test": 2_000},
        250,
        32,
        32,
        Recipe(max_steps=5_000, lr=1e-3),
    ),
}


@dataclass(kw_only=True)
class ListOpsConfig(DataConfig):
    """Settings of `data=listops`. None takes the preset's value."""

    preset: str = setting("nano", "the setting to start from", choices=list(PRESETS))
    max_depth: int | None = setting(
        None, "levels of nesting, that of the digits counted: operators nest one less", minimum=2, maximum=30
    )
    max_arguments: int | None = setting(None, "arguments of an operator, from 2 on", minimum=2, maximum=100)
    min_length: int | None = setting(None, "tokens of the shortest expression", minimum=4)
    max_length: int | None = setting(None, "tokens of the longest; a row has one more, the read-out", minimum=4)
    operator_share: float | None = setting(
        None, "chance that an argument is an expression, not a digit", minimum=0, maximum=1
    )
    data_seed: int = setting(0, "makes the examples; the run's own seed only orders them", minimum=0)

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: A value is out of range, or no expression has the lengths asked for.
        """
        super().__post_init__()
        grammar = self.grammar
        if grammar.min_length > grammar.max_length:
            raise ConfigError(
                f"data.min_length={grammar.min_length} is above data.max_length={grammar.max_length}: no expression "
                f"has such a length"
            )
        if grammar.min_length > grammar.longest:
            raise ConfigError(
                f"data.min_length={grammar.min_length}: with data.max_depth={grammar.max_depth} and "
                f"data.max_arguments={grammar.max_arguments} an expression has at most {grammar.longest} tokens"
            )

    @property
    def grammar(self) -> Grammar:
        """The preset's grammar with what is set here."""
        base = PRESETS[self.preset].grammar
        names = ("max_depth", "max_arguments", "min_length", "max_length", "operator_share")
        return Grammar(*(getattr(base if getattr(self, name) is None else self, name) for name in names))


@register_data("listops", config=ListOpsConfig)
class ListOps(Source[ListOpsConfig]):
    """Nested operations on digits, one value each, in tables by length; slices `depth` and `root`.

    `depth` counts the operators nested in each other, `root` is the place of the outermost in `OPERATORS`.

    Args:
        config: its settings.
    """

    def __init__(self, config: ListOpsConfig) -> None:
        self.config = config
        preset = PRESETS[config.preset]
        self.vocab_size = len(SYMBOLS)
        self.batch_size = preset.batch_size if config.batch_size is None else config.batch_size
        self.eval_batch_size = preset.eval_batch_size if config.eval_batch_size is None else config.eval_batch_size
        self.shuffle = True if config.shuffle is None else config.shuffle
        self.recipe = preset.recipe
        self.slice_values = {
            "depth": list(range(1, config.grammar.max_depth)),
            "root": list(range(len(OPERATORS))),
        }

    def load(self, split: str) -> list[datasets.Dataset]:
        """One table per range of lengths that has expressions.

        Raises:
            ConfigError: there are fewer different expressions than asked for.
        """
        inputs, targets = token_types(self.vocab_size)
        lengths = self._outline(split)["length"].to_numpy()
        tables = []
        for shortest, longest in self._ranges():
            if not ((lengths >= shortest) & (lengths <= longest)).any():
                continue  # which `datasets` could not store
            row = longest + 1
            columns = {
                "inputs": (inputs, row),
                "targets": (targets, row),
                "segment_ids": ("uint8", row),
                f"{SLICE_PREFIX}depth": ("int32", None),
                f"{SLICE_PREFIX}root": ("int32", None),
            }
            tables.append(build(_rows, columns, lengths=(shortest, longest), **self._arguments(split)))
        generate.cache_clear()  # the expressions are on the disk now
        return tables

    @cached_property
    def levels(self) -> dict[str, float]:  # type: ignore[override]
        """Accuracy on the test data of two rules learnt from the training data: "majority" and "root" (operator)."""
        counts, tested = (_counts(self._outline(split)) for split in ("train", "test"))  # (4, 10) each
        majority = tested[:, counts.sum(0).argmax()].sum()
        root = tested[np.arange(len(OPERATORS)), counts.argmax(1)].sum()
        return {"majority": float(majority / tested.sum()), "root": float(root / tested.sum())}

    def _outline(self, split: str) -> Any:
        """Length, outermost operator and value of each expression, a `pyarrow.Table`."""
        columns = dict.fromkeys(("length", "root", "value"), ("int32", None))
        return build(_outlines, columns, **self._arguments(split))[:]

    def _arguments(self, split: str) -> dict[str, Any]:
        config = self.config
        return {
            "grammar": config.grammar,
            "num_examples": config.examples(split) or PRESETS[config.preset].examples[split],
            "split": split,
            "data_seed": config.data_seed,
            "format": FORMAT,
        }

    def _ranges(self) -> list[tuple[int, int]]:
        """The shortest and the longest expression of each table: cut at multiples of the preset's step."""
        grammar, step = self.config.grammar, PRESETS[self.config.preset].step
        longest = min(grammar.max_length, grammar.longest)
        ends = [*range(-(-grammar.min_length // step) * step, longest, step), longest]
        return list(zip([grammar.min_length, *(end + 1 for end in ends)], ends, strict=False))

    def facts(self) -> dict[str, Any]:
        """The preset, and the seed of the examples."""
        return {"preset": self.config.preset, "data_seed": self.config.data_seed}


def _counts(outline: Any) -> np.ndarray:
    """How many expressions have each outermost operator and value, (4, 10)."""
    pairs = outline["root"].to_numpy() * DIGITS + outline["value"].to_numpy()
    return np.bincount(pairs, minlength=len(OPERATORS) * DIGITS).reshape(-1, DIGITS)


def _outlines(format: int, **arguments: Any) -> Iterator[dict[str, Any]]:
    expressions = generate(**arguments)
    for tokens, value in zip(expressions.tokens, expressions.values, strict=True):
        yield {"length": len(tokens), "root": tokens[0] - FIRST_OPERATOR, "value": value}


def _rows(format: int, lengths: tuple[int, int], **arguments: Any) -> Iterator[dict[str, Any]]:
    """The rows of the expressions whose length lies in `lengths`, both ends included."""
    shortest, longest = lengths
    for tokens, value, depth in zip(*generate(**arguments), strict=True):
        if not shortest <= len(tokens) <= longest:
            continue
        padding = longest - len(tokens)
        yield {
            "inputs": np.concatenate([np.full(padding, PADDING), tokens, [READ_OUT]]),
            "targets": np.concatenate([np.full(longest, IGNORE), [value]]),
            "segment_ids": np.repeat([0, 1], [padding, len(tokens) + 1]),
            f"{SLICE_PREFIX}depth": depth,
            f"{SLICE_PREFIX}root": tokens[0] - FIRST_OPERATOR,
        }
