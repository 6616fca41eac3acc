"""`data=depth_curve`: whether it matters where a fact stands (lost in the middle, arXiv 2307.03172, in tokens).

A row is pairs of a key and its value, all keys and all values different, then QUERY, token 0, and one of the keys; the
label there is its value. In training the pair asked for stands anywhere, each place equally likely: otherwise the curve
would show the training data. Validation and test have it at 16 places from first to last.

Shape letters: N rows, L tokens per row, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import Draws
from zoo.train.data.stream import ANSWERS, IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig
from zoo.train.recipe import Recipe

QUERY = 0
PLACES = 16


@dataclass(kw_only=True)
class DepthCurveConfig(SyntheticConfig):
    """Settings of `data=depth_curve`. P pairs take 2 P + 2 tokens."""

    seq_len: int = setting(34, "tokens per sequence in training and validation, even: the pairs and two", minimum=4)
    test_lengths: list[int] | None = setting([34, 66], "the same in the test, one or several; null: seq_len")
    key_ids: int = setting(64, "different keys", minimum=1)
    value_ids: int = setting(64, "different values", minimum=1)

    def parity(self) -> int | None:
        """Even lengths."""
        return 0

    def check(self) -> None:
        """Refuses more pairs than keys or values.

        Raises:
            ConfigError: There are.
        """
        most = 2 * min(self.key_ids, self.value_ids) + 2
        for name, split in (("seq_len", "train"), ("test_lengths", "test")):
            if max(self.lengths(split)) > most:
                self.fail(name, f"expected at most {most} with data.key_ids and data.value_ids as they are")

    def shortest(self) -> int:
        """A pair, QUERY and the key."""
        return 4

    def options(self, split: str) -> dict[str, Any]:
        """Training has the pair anywhere, validation and test on a grid."""
        return super().options(split) | {"grid": split != "train"}


def generate(rows: int, draws: Draws, *, seq_len: int, key_ids: int, value_ids: int, grid: bool) -> Examples:
    """Rows as the head of this file describes them; slice `place` of the pair, 0 to 15, mark `answers`."""
    pairs = seq_len // 2 - 1
    keys = 1 + draws.distinct(key_ids, rows, pairs)
    values = 1 + key_ids + draws.distinct(value_ids, rows, pairs)
    if grid:
        places = min(PLACES, pairs)
        place = draws.integers(places, rows)
        position = (2 * place * (pairs - 1) + places - 1) // (2 * max(places - 1, 1))  # rounded
    else:
        position = draws.integers(pairs, rows)
        place = position * min(PLACES, pairs) // pairs
    asked = keys[np.arange(rows), position]
    inputs = np.empty((rows, seq_len), dtype=np.int64)
    inputs[:, :-2:2], inputs[:, 1:-2:2], inputs[:, -2], inputs[:, -1] = keys, values, QUERY, asked
    targets = np.full((rows, seq_len), IGNORE)
    targets[:, -1] = values[np.arange(rows), position]
    return Examples(inputs, targets, {"place": place, ANSWERS: 2 * position[:, None] + 1})


@register_data("depth_curve", config=DepthCurveConfig)
class DepthCurve(Synthetic[DepthCurveConfig]):
    """One pair among many, by where it stands; slices `seq_len` and `place`."""

    recipe = Recipe(max_steps=4_000, lr=2e-3)
    marks = (ANSWERS,)
    format = 2
    generate = staticmethod(generate)

    def __init__(self, config: DepthCurveConfig) -> None:
        super().__init__(config)
        self.vocab_size = 1 + config.key_ids + config.value_ids
        self.slice_values["place"] = list(range(PLACES))
        lengths = config.lengths("test")
        plateau = sum(1 / (length // 2 - 1) for length in lengths) / len(lengths)
        self.levels = {"chance": 1 / config.value_ids, "plateau": plateau}
