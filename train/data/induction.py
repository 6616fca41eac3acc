"""`data=induction`: what followed the trigger (induction heads, as in arXiv 2312.00752, whose code is not released).

A row is random tokens with the trigger, token 0, at a random place and again at its end; the label there is the token
that followed the first one. The trigger stands exactly twice, so that this token is another.

Shape letters: N rows, L tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import DEPTHS, Draws, depth
from zoo.train.data.stream import ANSWERS, IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig
from zoo.train.recipe import Recipe

TRIGGER = 0


@dataclass(kw_only=True)
class InductionConfig(SyntheticConfig):
    """Settings of `data=induction`. The paper trains at 256 and tests from 64 to 2^20."""

    test_lengths: list[int] | None = setting(
        [64, 128, 256, 512, 1_024], "tokens per sequence in the test, one or several; null: seq_len"
    )
    vocab_size: int = setting(16, "token ids, the trigger among them", minimum=3)

    def shortest(self) -> int:
        """Trigger, answer, trigger."""
        return 3


def generate(rows: int, draws: Draws, *, seq_len: int, vocab_size: int) -> Examples:
    """Rows as the head of this file describes them; slice `depth` of the first trigger, mark `answers`."""
    row = np.arange(rows)
    inputs = 1 + draws.integers(vocab_size - 1, rows, seq_len)
    position = draws.integers(seq_len - 2, rows)
    inputs[row, position] = inputs[:, -1] = TRIGGER
    targets = np.full((rows, seq_len), IGNORE)
    targets[:, -1] = inputs[row, position + 1]
    return Examples(inputs, targets, {"depth": depth(position, seq_len - 3), ANSWERS: position[:, None] + 1})


@register_data("induction", config=InductionConfig)
class Induction(Synthetic[InductionConfig]):
    """Induction heads; slices `seq_len` and `depth`."""

    recipe = Recipe(max_steps=2_000, lr=1e-3)
    marks = (ANSWERS,)
    format = 2
    generate = staticmethod(generate)

    def __init__(self, config: InductionConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.slice_values["depth"] = list(range(DEPTHS))
        self.levels = {"chance": 1 / (config.vocab_size - 1)}
