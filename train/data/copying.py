"""`data=copying`: repeat a string, or go on with it from some letters ("Repeat after me", arXiv 2402.01032).

Letters are the ids 0 to A - 1; then come START, SEPARATOR, END and PADDING. What is asked is written out at the end of
the row, each letter the label of the token before it. Training asks for an end sign too, validation and test do not:

- `copy`: START string SEPARATOR string
- `prefix_ngram`: START letters SEPARATOR string SEPARATOR what follows the letters in the string, where they stand once
- `suffix_ngram`: START string SEPARATOR letters, what follows them
- `duplicate_ngram`: as `copy`, but some letters of the string stand in it twice, so that looking back for what followed
  them finds two places; a test for models that have learnt to copy

The paper packs training examples one behind the other; here each has a row of its own, filled up with padding.

Shape letters: N rows, L tokens per row, M letters of the longest string, G letters to look up or to repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import Draws, squeeze
from zoo.train.data.stream import IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig
from zoo.train.recipe import Recipe

FORMS = ("copy", "prefix_ngram", "suffix_ngram", "duplicate_ngram")
_SPECIAL = 4


@dataclass(kw_only=True)
class CopyingConfig(SyntheticConfig):
    """Settings of `data=copying`. Strings of n letters take 2 n + 2 tokens, n-gram forms 2 n + 3."""

    seq_len: int = setting(34, "tokens per sequence in training and validation: twice the longest string", minimum=4)
    test_lengths: list[int] | None = setting(
        [34, 50, 66, 98, 130], "the same in the test, one or several, with strings as long as fit; null: seq_len"
    )
    form: str = setting("copy", "what is asked", choices=FORMS)
    min_letters: int = setting(4, "letters of the shortest string in training and validation", minimum=1)
    letters: int = setting(26, "different letters", minimum=2)
    ngram: int = setting(2, "letters to look up, or to repeat in duplicate_ngram", minimum=1)

    def check(self) -> None:
        """Refuses strings too short for what is done with them.

        Raises:
            ConfigError: They are.
        """
        least = {"copy": 1, "duplicate_ngram": 2 * self.ngram}.get(self.form, self.ngram + 1)
        if self.min_letters < least:
            self.fail("min_letters", f"data.form={self.form} with data.ngram={self.ngram} needs at least {least}")

    def shortest(self) -> int:
        """The shortest string, twice, and the signs."""
        return 2 * self.min_letters + _signs(self.form)

    def options(self, split: str) -> dict[str, Any]:
        """Training and validation have strings of all lengths, the test the longest that fit."""
        return super().options(split) | {"longest_only": split == "test", "label_end": split == "train"}


def _signs(form: str) -> int:
    return 3 if form in ("prefix_ngram", "suffix_ngram") else 2


def generate(
    rows: int,
    draws: Draws,
    *,
    seq_len: int,
    form: str,
    min_letters: int,
    letters: int,
    ngram: int,
    longest_only: bool,
    label_end: bool,
) -> Examples:
    """Rows as the head of this file describes them; mark `letters` of the string."""
    start, separator, end, padding = (np.full((rows, 1), letters + i) for i in range(_SPECIAL))
    longest = (seq_len - _signs(form)) // 2  # M
    sizes = np.full(rows, longest) if longest_only else min_letters + draws.integers(longest - min_letters + 1, rows)
    place = np.arange(longest)
    string = np.where(place < sizes[:, None], draws.integers(letters, rows, longest), -1)  # (N, M)
    valid = None
    if form == "duplicate_ngram":
        string = _repeat(string, sizes, ngram, draws)
    if form in ("copy", "duplicate_ngram"):
        before, asked = [start, string, separator], string
    else:
        first = draws.integers(sizes - ngram, rows)  # of the letters to look up; at least one follows them
        looked_up = np.take_along_axis(string, first[:, None] + np.arange(ngram), axis=1)  # (N, G)
        windows = np.lib.stride_tricks.sliding_window_view(string, ngram, axis=1)  # (N, M - G + 1, G)
        valid = (windows == looked_up[:, None]).all(2).sum(1) == 1
        asked = np.where(place >= first[:, None] + ngram, string, -1)
        before = [start, looked_up, separator, string, separator]
        if form == "suffix_ngram":
            before = [start, string, separator, looked_up]
    given = np.concatenate(before, axis=1)
    tokens = np.concatenate([given, asked, end, np.repeat(padding, seq_len, axis=1)], axis=1)
    labelled = np.arange(tokens.shape[1]) >= given.shape[1]
    labelled = labelled & ((tokens < letters) | ((tokens == end) & label_end))
    order = squeeze(tokens, seq_len + 1, left=True)
    tokens, labelled = np.take_along_axis(tokens, order, axis=1), np.take_along_axis(labelled, order, axis=1)
    targets = np.where(labelled, tokens, IGNORE)
    return Examples(tokens[:, :-1], targets[:, 1:], {"letters": sizes}, valid)


def _repeat(string: np.ndarray, sizes: np.ndarray, ngram: int, draws: Draws) -> np.ndarray:
    """Writes some G letters of each string over others behind them."""
    places = np.sort(draws.integers((sizes - 2 * ngram + 1)[:, None], len(string), 2), axis=1)
    source = places[:, :1] + np.arange(ngram)
    repeated = string.copy()
    np.put_along_axis(repeated, places[:, 1:] + ngram + np.arange(ngram), np.take_along_axis(string, source, 1), axis=1)
    return repeated


@register_data("copying", config=CopyingConfig)
class Copying(Synthetic[CopyingConfig]):
    """Strings repeated, or gone on with; slice `seq_len`."""

    recipe = Recipe(max_steps=2_000, lr=2e-3)
    marks = ("letters",)
    generate = staticmethod(generate)

    def __init__(self, config: CopyingConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.letters + _SPECIAL
        self.levels = {"chance": 1 / config.letters}
