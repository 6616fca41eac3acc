"""`data=assoc_recall`: one question about many pairs (H3, arXiv 2212.14052, as HazyResearch/safari has it).

Pairs of a key and its value, key after key drawn with replacement; then the prefix and a key that has occurred; the
label there is its value. Token 0 is never used, keys are the lower half of the ids from 1 to V - 2, values the upper
half, V - 1 is the prefix.

Shape letters: N rows, L tokens per row, P pairs, K different keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import Draws
from zoo.train.data.stream import IGNORE
from zoo.train.data.synthetic import Examples, NextTokenConfig, Recall
from zoo.train.recipe import Recipe


@dataclass(kw_only=True)
class AssocRecallConfig(NextTokenConfig):
    """Settings of `data=assoc_recall`. The published ones are seq_len=42 vocab_size=20."""

    seq_len: int = setting(34, "tokens per sequence in training and validation, even: the pairs and two", minimum=4)
    test_lengths: list[int] | None = setting([34, 66, 130], "the same in the test, one or several; null: seq_len")
    vocab_size: int = setting(12, "token ids: keys, values and two more", minimum=4)

    def parity(self) -> int | None:
        """Even lengths."""
        return 0

    def shortest(self) -> int:
        """A pair, the prefix and the key."""
        return 4


def generate(rows: int, draws: Draws, *, seq_len: int, vocab_size: int, loss_on: str) -> Examples:
    """Rows as the head of this file describes them."""
    size = _keys(vocab_size)  # K
    row = np.arange(rows)[:, None]
    values = 1 + size + draws.integers(vocab_size - 2 - size, rows, size)  # (N, K)
    keys = draws.integers(size, rows, seq_len // 2 - 1)  # (N, P)
    seen = np.zeros((rows, size), dtype=bool)
    seen[row, keys] = True
    asked = draws.one_of(seen)[:, None]  # (N, 1)
    pairs = np.stack([1 + keys, values[row, keys]], axis=2).reshape(rows, -1)
    prefix = np.full((rows, 1), vocab_size - 1)
    tokens = np.concatenate([pairs, prefix, 1 + asked, values[row, asked]], axis=1)  # (N, L + 1)
    targets = tokens[:, 1:].copy()
    if loss_on == "answer":
        targets[:, :-1] = IGNORE
    return Examples(tokens[:, :-1], targets)


def _keys(vocab_size: int) -> int:
    return (vocab_size - 2) // 2


@register_data("assoc_recall", config=AssocRecallConfig)
class AssocRecall(Recall[AssocRecallConfig]):
    """Associative recall with one question; slice `seq_len`."""

    recipe = Recipe(max_steps=2_000, lr=2e-3)
    generate = staticmethod(generate)

    def __init__(self, config: AssocRecallConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.values = range(1 + _keys(config.vocab_size), config.vocab_size - 1)
