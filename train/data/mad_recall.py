"""`data=mad_recall`, `mad_noisy` and `mad_fuzzy`: recall in the context, three tasks of MAD (arXiv 2403.17844).

Keys, drawn with replacement, each with the value it has kept since its first use. Training asks for every next token,
validation and test only for the values of keys that have been seen before. A row ends in such a key.

In `mad_noisy` two tokens of noise replace a pair now and then. In `mad_fuzzy` keys and values are of several different
tokens: those of a key vary in number in training and are as many as there can be in validation and test; the row is
filled up with padding from the left, and the pair asked for at its end stands at a random place of it.

Own draws, equal in distribution to those of the published generator. MAD's length counts the answer to the last key
too in the first two tasks, which have one token less here: seq_len=127 is its 128.

Shape letters: N rows, L tokens per row, P pairs, U pairs that `mad_fuzzy` draws, W tokens of the longest pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import Draws, first_equal, squeeze
from zoo.train.data.stream import IGNORE
from zoo.train.data.synthetic import Examples, NextTokenConfig, Recall
from zoo.train.recipe import Recipe


@dataclass(kw_only=True)
class MadRecallConfig(NextTokenConfig):
    """Settings of `data=mad_recall`. MAD has seq_len=127 vocab_size=16."""

    seq_len: int = setting(
        31, "tokens per sequence in training and validation, odd: the last value is asked", minimum=3
    )
    test_lengths: list[int] | None = setting([31, 63, 127], "the same in the test, one or several; null: seq_len")
    vocab_size: int = setting(8, "token ids: the lower half keys, the upper half values", minimum=2)

    def parity(self) -> int | None:
        """Odd lengths."""
        return 1

    def shortest(self) -> int:
        """A pair and its key again."""
        return 3


@dataclass(kw_only=True)
class MadNoisyConfig(MadRecallConfig):
    """Settings of `data=mad_noisy`. MAD has seq_len=127 vocab_size=16 noise_ids=16 noise_share=0.2."""

    vocab_size: int = setting(8, "token ids without noise: half keys, half values", minimum=2)
    noise_ids: int = setting(8, "token ids of noise", minimum=1)
    noise_share: float = setting(0.2, "chance that noise replaces a pair", minimum=0, maximum=1)


@dataclass(kw_only=True)
class MadFuzzyConfig(NextTokenConfig):
    """Settings of `data=mad_fuzzy`. MAD has seq_len=128 vocab_size=16 key_size=3 value_size=3."""

    seq_len: int = setting(48, "tokens per sequence in training and validation", minimum=3)
    test_lengths: list[int] | None = setting([48, 96, 192], "the same in the test, one or several; null: seq_len")
    vocab_size: int = setting(8, "token ids: keys, values and one for padding", minimum=3)
    key_size: int = setting(2, "most tokens of a key", minimum=1)
    value_size: int = setting(2, "most tokens of a value", minimum=1)

    def check(self) -> None:
        """Refuses keys and values of more tokens than there are different ones.

        Raises:
            ConfigError: They are.
        """
        keys = (self.vocab_size - 1) // 2
        for name, most in (("key_size", keys), ("value_size", self.vocab_size - 1 - keys)):
            if getattr(self, name) > most:
                self.fail(name, f"expected at most {most} with data.vocab_size={self.vocab_size}")

    def shortest(self) -> int:
        """A pair, twice, but for the last token."""
        return 2 * (self.key_size + self.value_size) - 1

    def options(self, split: str) -> dict[str, Any]:
        """Validation and test have keys of full size alone."""
        return super().options(split) | {"vary_keys": split == "train"}


def generate(
    rows: int,
    draws: Draws,
    *,
    seq_len: int,
    vocab_size: int,
    loss_on: str,
    noise_ids: int = 0,
    noise_share: float = 0.0,
) -> Examples:
    """Rows of `mad_recall` and `mad_noisy`; noise has the ids from `vocab_size` on."""
    size = vocab_size // 2
    row, body = np.arange(rows)[:, None], (seq_len - 1) // 2
    keys = draws.integers(size, rows, body)
    noise = draws.events(noise_share, rows, body)
    noise[row, draws.integers(body, rows, 1)] = False  # there has to be a key to ask for
    seen = np.zeros((rows, size), dtype=bool)
    seen[np.broadcast_to(row, noise.shape)[~noise], keys[~noise]] = True
    keys = np.concatenate([keys, draws.one_of(seen)[:, None]], axis=1)  # (N, P)
    noise = np.concatenate([noise, np.zeros((rows, 1), dtype=bool)], axis=1)
    place = np.arange(body + 1)
    first = first_equal(np.where(noise, -1 - place, keys))
    values = size + np.take_along_axis(draws.integers(vocab_size - size, rows, body + 1), first, axis=1)
    pairs = np.stack([keys, values], axis=2)  # (N, P, 2)
    if noise_ids:
        pairs = np.where(noise[..., None], vocab_size + draws.integers(noise_ids, rows, body + 1, 2), pairs)
    tokens = pairs.reshape(rows, -1)  # (N, L + 1)
    answers = np.zeros(pairs.shape, dtype=bool)
    answers[..., 1] = first < place
    return _next_tokens(tokens, answers.reshape(rows, -1) | (loss_on == "all"))


def generate_fuzzy(
    rows: int,
    draws: Draws,
    *,
    seq_len: int,
    vocab_size: int,
    key_size: int,
    value_size: int,
    loss_on: str,
    vary_keys: bool,
) -> Examples:
    """Rows of `mad_fuzzy`. Pair 0 is the one asked for; its tokens, like all, are -1 where there is none."""
    padding = vocab_size - 1
    first_value = padding // 2
    row, units = np.arange(rows)[:, None], (seq_len + 1) // 2  # U, as no pair is shorter than two tokens
    sizes = 1 + draws.integers(key_size, rows, units) if vary_keys else np.full((rows, units), key_size)
    keys = _motifs(draws, sizes, first_value, key_size)  # (N, U, key_size)
    codes = ((keys + 1) * (first_value + 1) ** np.arange(key_size)).sum(2)
    sizes = 1 + draws.integers(value_size, rows, units)
    values = _motifs(draws, sizes, padding - first_value, value_size)
    values = values[row, first_equal(codes)]
    pairs = np.concatenate([keys, np.where(values < 0, -1, first_value + values)], axis=2)  # (N, U, W)
    lengths = (pairs >= 0).sum(2)
    room = seq_len + 1 - 2 * lengths[:, :1]
    used = 1 + (np.cumsum(lengths[:, 1:], axis=1) <= room).sum(1, keepdims=True)
    # The pair asked for moves to a random place among those used, and stands at the end once more.
    place = np.arange(units)
    asked = draws.one_of(place < used)[:, None]
    order = np.where(place < asked, place + 1, np.where(place == asked, 0, place))
    order = np.concatenate([order, np.zeros((rows, 1), dtype=np.int64)], axis=1)  # (N, U + 1)
    left_out = np.concatenate([place >= used, np.zeros((rows, 1), dtype=bool)], axis=1)
    place = np.arange(units + 1)
    tokens = np.where(left_out[..., None], -1, pairs[row, order])  # (N, U + 1, W)
    seen = first_equal(np.where(left_out, -1 - place, codes[row, order])) < place
    answers = seen[..., None] & (np.arange(key_size + value_size) >= key_size)
    tokens, answers = tokens.reshape(rows, -1), np.broadcast_to(answers, tokens.shape).reshape(rows, -1)
    together = squeeze(tokens, seq_len + 1, left=False)
    tokens, answers = np.take_along_axis(tokens, together, axis=1), np.take_along_axis(answers, together, axis=1)
    asked = (answers | (loss_on == "all")) & (tokens >= 0)
    return _next_tokens(np.where(tokens < 0, padding, tokens), asked)


def _motifs(draws: Draws, sizes: np.ndarray, below: int, longest: int) -> np.ndarray:
    """Different tokens, as many as `sizes` (N, U) says and then -1, (N, U, longest)."""
    tokens = draws.distinct(below, sizes.size, longest).reshape(*sizes.shape, longest)
    return np.where(np.arange(longest) < sizes[..., None], tokens, -1)


def _next_tokens(tokens: np.ndarray, asked: np.ndarray) -> Examples:
    """Inputs and labels from whole rows, and which of their tokens are asked for, (N, L + 1)."""
    return Examples(tokens[:, :-1], np.where(asked[:, 1:], tokens[:, 1:], IGNORE))


class _Recall(Recall[Any]):
    """Recall of values by keys; slice `seq_len`."""

    recipe = Recipe(max_steps=3_000, lr=1e-3)


@register_data("mad_recall", config=MadRecallConfig)
class MadRecall(_Recall):
    """Values of keys seen before; slice `seq_len`."""

    generate = staticmethod(generate)

    def __init__(self, config: MadRecallConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.values = range(config.vocab_size // 2, config.vocab_size)


@register_data("mad_noisy", config=MadNoisyConfig)
class MadNoisy(MadRecall):
    """Values of keys seen before, in noise; slice `seq_len`."""

    def __init__(self, config: MadNoisyConfig) -> None:
        super().__init__(config)
        self.vocab_size += config.noise_ids


@register_data("mad_fuzzy", config=MadFuzzyConfig)
class MadFuzzy(_Recall):
    """Values of keys seen before, of several tokens each; slice `seq_len`."""

    generate = staticmethod(generate_fuzzy)

    def __init__(self, config: MadFuzzyConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.values = range((config.vocab_size - 1) // 2, config.vocab_size - 1)
        self.value_size = config.value_size
