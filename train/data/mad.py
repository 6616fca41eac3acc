"""`data=mad_memorize`, `mad_compress_causal` and `mad_selcopy`: the other three tasks of MAD (arXiv 2403.17844).

`mad_memorize` asks for facts that the weights have to hold: each key is followed by the insert token, where its value
is the label. The map from keys to values is the same for all rows, all splits and all seeds.

MAD's compression reads a sequence into one vector and takes it apart again with a decoder of its own. Here causal
models do the reading out, another task, so it has another name: `mad_compress_causal` is random tokens, the compress
token, and then placeholders, at each of which a token is the label, in order.

`mad_selcopy` is content tokens among blanks, the copy token, and as many blanks as there is content, where it is the
label. The token before the copy token is always content.

Own draws, equal in distribution to those of the published generator.

Shape letters: N rows, L tokens per row, M content tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import Draws
from zoo.train.data.stream import IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig, levels_of
from zoo.train.recipe import Recipe


@dataclass(kw_only=True)
class MadMemorizeConfig(SyntheticConfig):
    """Settings of `data=mad_memorize`. MAD has vocab_size=256."""

    num_examples: int | None = setting(None, "training examples; null: 256", minimum=1)
    seq_len: int = setting(32, "tokens per sequence in training and validation, even", minimum=2)
    vocab_size: int = setting(64, "token ids: keys, as many values or one more, and the insert token", minimum=3)

    def parity(self) -> int | None:
        """Even lengths."""
        return 0


@dataclass(kw_only=True)
class MadCompressCausalConfig(SyntheticConfig):
    """Settings of `data=mad_compress_causal`. MAD's length counts the tokens up to the compress token."""

    seq_len: int = setting(
        31, "tokens per sequence in training and validation, odd: the tokens twice and one", minimum=3
    )
    test_lengths: list[int] | None = setting([31, 63], "the same in the test, one or several; null: seq_len")
    vocab_size: int = setting(8, "token ids: those to be compressed and the compress token", minimum=3)

    def parity(self) -> int | None:
        """Odd lengths."""
        return 1


@dataclass(kw_only=True)
class MadSelcopyConfig(SyntheticConfig):
    """Settings of `data=mad_selcopy`. MAD has seq_len=256 n_tokens=16."""

    seq_len: int = setting(64, "tokens per sequence in training and validation: more than twice the content", minimum=3)
    test_lengths: list[int] | None = setting([64, 128, 256], "the same in the test, one or several; null: seq_len")
    n_tokens: int = setting(8, "content tokens", minimum=1)
    vocab_size: int = setting(16, "token ids: content, the blank and the copy token", minimum=4)

    def shortest(self) -> int:
        """Content, the copy token, and a blank for each."""
        return 2 * self.n_tokens + 1


def facts(vocab_size: int) -> np.ndarray:
    """The value of each key of `mad_memorize`, (keys,)."""
    keys = (vocab_size - 1) // 2
    return keys + Draws("mad_memorize", vocab_size).orders(1, vocab_size - 1 - keys)[0, :keys]


def generate_memorize(rows: int, draws: Draws, *, seq_len: int, vocab_size: int) -> Examples:
    """Rows of `mad_memorize`; keys are drawn with replacement."""
    values = facts(vocab_size)
    keys = draws.integers(len(values), rows, seq_len // 2)
    inputs = np.full((rows, seq_len), vocab_size - 1)
    targets = np.full((rows, seq_len), IGNORE)
    inputs[:, ::2], targets[:, 1::2] = keys, values[keys]
    return Examples(inputs, targets)


def generate_compress(rows: int, draws: Draws, *, seq_len: int, vocab_size: int) -> Examples:
    """Rows of `mad_compress_causal`; the placeholder has the id `vocab_size`."""
    size = seq_len // 2
    content = draws.integers(vocab_size - 1, rows, size)
    inputs = np.full((rows, seq_len), vocab_size)
    inputs[:, :size], inputs[:, size] = content, vocab_size - 1
    targets = np.full((rows, seq_len), IGNORE)
    targets[:, size + 1 :] = content
    return Examples(inputs, targets)


def generate_selcopy(rows: int, draws: Draws, *, seq_len: int, n_tokens: int, vocab_size: int) -> Examples:
    """Rows of `mad_selcopy`; each blank stands before a content token drawn for it."""
    blank, copy = vocab_size - 2, vocab_size - 1
    content = draws.integers(vocab_size - 2, rows, n_tokens)
    blanks = seq_len - 2 * n_tokens - 1
    places = np.concatenate(
        [2 * draws.integers(n_tokens, rows, blanks), np.tile(2 * np.arange(n_tokens) + 1, (rows, 1))], 1
    )
    tokens = np.concatenate([np.full((rows, blanks), blank), content], axis=1)
    inputs = np.full((rows, seq_len), blank)
    inputs[:, : blanks + n_tokens] = np.take_along_axis(tokens, np.argsort(places, axis=1, kind="stable"), axis=1)
    inputs[:, blanks + n_tokens] = copy
    targets = np.full((rows, seq_len), IGNORE)
    targets[:, -n_tokens:] = content
    return Examples(inputs, targets)


@register_data("mad_memorize", config=MadMemorizeConfig)
class MadMemorize(Synthetic[MadMemorizeConfig]):
    """Facts in the weights, from few training rows; slice `seq_len`."""

    recipe = Recipe(max_steps=500, lr=1e-3)
    default_examples: ClassVar[dict[str, int]] = {"train": 256, **Synthetic.default_examples}
    generate = staticmethod(generate_memorize)

    def __init__(self, config: MadMemorizeConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.levels = {"chance": 1 / len(facts(config.vocab_size))}


@register_data("mad_compress_causal", config=MadCompressCausalConfig)
class MadCompressCausal(Synthetic[MadCompressCausalConfig]):
    """A sequence given back from placeholders behind it; slice `seq_len`."""

    recipe = Recipe(max_steps=3_000, lr=2e-3)
    generate = staticmethod(generate_compress)

    def __init__(self, config: MadCompressCausalConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size + 1
        self.levels = {"chance": 1 / (config.vocab_size - 1)}


@register_data("mad_selcopy", config=MadSelcopyConfig)
class MadSelcopy(Synthetic[MadSelcopyConfig]):
    """Content out of blanks, in order; slice `seq_len`."""

    recipe = Recipe(max_steps=2_000, lr=2e-3)
    generate = staticmethod(generate_selcopy)

    def __init__(self, config: MadSelcopyConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.levels = levels_of(config.n_tokens, config.vocab_size - 2)
