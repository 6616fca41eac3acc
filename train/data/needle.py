"""`data=passkey` and `data=needle`: find a fact in filler, by its key.

A fact is a needle, the tokens NEEDLE key value, somewhere in filler. At the end stand QUERY and a key; the label is the
value. There may be more needles, several needles of one key (their values are asked in the order in which they stand),
several keys in a question (answered in the order of the question), and keys and values of several tokens. An answer of
several tokens is written out behind the question, as far as its last token; each token is the label of the one before.

With one needle, `passkey`, a rule that reads no key is right: copy what follows the key behind the marker. Only from
two needles on does the key count. So a score on `passkey` says whether a model carries a fact over a distance, and one
on `needle`, the same with four, whether it finds the right one.

This is the zoo's own form, in tokens, of the passkey (arXiv 2305.16300) and of the needle in a haystack.

Shape letters: N rows, L tokens per row, C tokens of context, M needles, W tokens of a needle, Q keys in a question,
R needles of one key, E tokens of a key, D tokens of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.draws import DEPTHS, Draws, depth
from zoo.train.data.stream import ANSWERS, IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig, levels_of
from zoo.train.recipe import Recipe

PAD, NEEDLE, QUERY, FIRST_FILLER = range(4)
FILLERS = ("uniform", "cycle", "markov")
_STEPS = (1, 3, 4, 9)
_CYCLE = 16


@dataclass(kw_only=True)
class NeedleConfig(SyntheticConfig):
    """Settings of `data=needle`."""

    seq_len: int = setting(128, "tokens per sequence in training and validation", minimum=4)
    test_lengths: list[int] | None = setting(
        [128, 512, 2_048], "tokens per sequence in the test, one or several; null: seq_len"
    )
    n_needles: int = setting(4, "needles with different keys", minimum=1)
    n_queries: int = setting(1, "keys that the question asks for", minimum=1)
    n_values: int = setting(1, "needles of each key, all of which are the answer", minimum=1)
    digits: int = setting(1, "tokens of a value", minimum=1)
    filler: str = setting(
        "uniform", "what the needles lie in: random tokens, a cycle of 16, or a random walk on it", choices=FILLERS
    )
    filler_ids: int = setting(16, "different filler tokens", minimum=1)
    key_ids: int = setting(16, "different tokens for keys", minimum=1)
    value_ids: int = setting(30, "different tokens for values", minimum=2)

    def check(self) -> None:
        """Refuses more needles than keys, and more questions than needles.

        Raises:
            ConfigError: There are.
        """
        if self.n_needles > self.key_ids:
            self.fail("n_needles", f"data.key_ids={self.key_ids} has fewer different keys")
        if self.n_queries > self.n_needles:
            self.fail("n_queries", f"expected at most data.n_needles={self.n_needles}")

    def shortest(self) -> int:
        """Needles, question and answers without filler."""
        return shortest(**self.options("train"))


@dataclass(kw_only=True)
class PasskeyConfig(NeedleConfig):
    """Settings of `data=passkey`."""

    n_needles: int = setting(1, "needles with different keys; from 2 on the key has to be read", minimum=1)


def shortest(n_needles: int, n_queries: int, n_values: int, digits: int, key_digits: int = 1, **_: Any) -> int:
    """Tokens of the needles, the question and the answers but for their last."""
    needles = n_needles * n_values * (1 + key_digits + digits)
    return needles + n_queries * (key_digits + n_values * digits)


def fill(rows: int, draws: Draws, length: int, filler: str, filler_ids: int) -> np.ndarray:
    """Filler, (N, length): `uniform` tokens, the same `cycle` in every row, or a `markov` chain.

    The chain goes on from a token by one of four steps on the circle of all, each equally likely: all tokens are
    equally frequent, and each says something about the next.
    """
    if filler == "uniform":
        return FIRST_FILLER + draws.integers(filler_ids, rows, length)
    if filler == "cycle":
        return np.tile(FIRST_FILLER + np.arange(length) % min(filler_ids, _CYCLE), (rows, 1))
    steps = np.array(_STEPS)[draws.integers(len(_STEPS), rows, length)]
    steps[:, 0] = draws.integers(filler_ids, rows)
    return FIRST_FILLER + np.cumsum(steps, axis=1) % filler_ids


def generate(
    rows: int,
    draws: Draws,
    *,
    seq_len: int,
    n_needles: int,
    n_queries: int,
    n_values: int,
    digits: int,
    filler: str,
    filler_ids: int,
    key_ids: int,
    value_ids: int,
    key_digits: int = 1,
) -> Examples:
    """Rows as the head of this file describes them, slice `depth` of the first needle asked for, mark `answers`.

    Keys of several tokens are drawn one token at a time, from so many that no two needles of a row are alike.
    """
    needles, width = n_needles * n_values, 1 + key_digits + digits  # M, W
    answers = n_queries * n_values * digits
    context = seq_len - n_queries * key_digits - answers  # C
    first_key, first_value = FIRST_FILLER + filler_ids, FIRST_FILLER + filler_ids + key_ids
    if key_digits == 1:
        keys = first_key + draws.distinct(key_ids, rows, n_needles)[..., None]  # (N, M / R, E)
    else:
        keys = first_key + draws.integers(key_ids, rows, n_needles, key_digits)
    values = first_value + draws.integers(value_ids, rows, needles, digits)  # (N, M, D), as they stand
    owners = draws.orders(rows, needles) % n_needles  # (N, M): the key of each needle
    free = draws.distinct(context - needles * (width - 1), rows, needles)
    places = np.sort(free, axis=1) + np.arange(needles) * (width - 1)  # (N, M), each the first token of a needle
    asked = draws.distinct(n_needles, rows, n_queries)  # (N, Q)

    row = np.arange(rows)[:, None]
    markers = np.full((rows, needles, 1), NEEDLE)
    facts = np.concatenate([markers, keys[row, owners], values], axis=2)  # (N, M, W)
    inputs = np.full((rows, seq_len), PAD)
    inputs[:, :context] = fill(rows, draws, context, filler, filler_ids)
    inputs[row[..., None], places[..., None] + np.arange(width)] = facts
    others = owners[:, None] != asked[..., None]  # (N, Q, M)
    answering = np.argsort(others, axis=2, kind="stable")[..., :n_values]  # (N, Q, R) needles, as they stand
    answer = values[row[..., None], answering].reshape(rows, answers)
    inputs[:, context] = QUERY
    question = keys[row, asked].reshape(rows, -1)
    inputs[:, context + 1 :] = np.concatenate([question, answer[:, :-1]], axis=1)
    targets = np.full((rows, seq_len), IGNORE)
    targets[:, -answers:] = answer
    needle = places[row[..., None], answering]  # (N, Q, R)
    value = (needle[..., None] + np.arange(1 + key_digits, width)).reshape(rows, answers)
    return Examples(inputs, targets, {"depth": depth(needle[:, 0, 0], context - width), ANSWERS: value})


@register_data("needle", config=NeedleConfig)
class Needle(Synthetic[NeedleConfig]):
    """Facts in filler, one or some of which are asked for; slices `seq_len`, `depth`, these together, `n_needles`."""

    recipe = Recipe(max_steps=2_000, lr=1e-3)
    marks = (ANSWERS,)
    format = 2
    joint_slices = (("seq_len", "depth"),)
    generate = staticmethod(generate)

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__(config)
        self.vocab_size = FIRST_FILLER + config.filler_ids + config.key_ids + config.value_ids
        self.slice_values |= {"depth": list(range(DEPTHS)), "n_needles": [config.n_needles]}
        self.levels = levels_of(config.n_needles * config.n_values, config.value_ids)


@register_data("passkey", config=PasskeyConfig)
class Passkey(Needle):
    """One fact in filler; slices `seq_len`, `depth`, these together, `n_needles`."""

    recipe = Recipe(max_steps=600, lr=1e-3)
