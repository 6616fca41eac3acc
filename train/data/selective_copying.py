"""`data=selective_copying`: keep what counts and drop the noise between it (arXiv 2312.00752).

Some content tokens stand at random places in noise, token 0. Behind them come as many markers, the last token id; the
label at each is a content token, in order. The gaps differ from row to row, so that no fixed shift copies them.

Shape letters: N rows, L tokens per row, M content tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import Draws
from zoo.train.data.stream import IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig, levels_of
from zoo.train.recipe import Recipe

NOISE = 0


@dataclass(kw_only=True)
class SelectiveCopyingConfig(SyntheticConfig):
    """Settings of `data=selective_copying`. The paper has 4,096 tokens, 16 of them content."""

    seq_len: int = setting(80, "tokens per sequence in training and validation: noise and twice the content", minimum=3)
    test_lengths: list[int] | None = setting([80, 144, 272], "the same in the test, one or several; null: seq_len")
    n_tokens: int = setting(8, "content tokens", minimum=1)
    vocab_size: int = setting(16, "token ids: noise, content and the marker", minimum=4)

    def shortest(self) -> int:
        """Content, and a marker for each."""
        return 2 * self.n_tokens


def generate(rows: int, draws: Draws, *, seq_len: int, n_tokens: int, vocab_size: int) -> Examples:
    """Rows as the head of this file describes them."""
    content = 1 + draws.integers(vocab_size - 2, rows, n_tokens)
    inputs = np.full((rows, seq_len), NOISE)
    places = np.sort(draws.distinct(seq_len - n_tokens, rows, n_tokens), axis=1)
    np.put_along_axis(inputs, places, content, axis=1)
    inputs[:, -n_tokens:] = vocab_size - 1
    targets = np.full((rows, seq_len), IGNORE)
    targets[:, -n_tokens:] = content
    return Examples(inputs, targets)


@register_data("selective_copying", config=SelectiveCopyingConfig)
class SelectiveCopying(Synthetic[SelectiveCopyingConfig]):
    """Content out of noise, in order; slice `seq_len`."""

    recipe = Recipe(max_steps=2_000, lr=2e-3)
    generate = staticmethod(generate)

    def __init__(self, config: SelectiveCopyingConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.levels = levels_of(config.n_tokens, config.vocab_size - 2)
