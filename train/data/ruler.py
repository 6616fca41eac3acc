"""`data=ruler`: the families of RULER (arXiv 2404.06654) in tokens instead of words, from 128 tokens on.

Retrieval, built on `data=needle`; a number is a value of 7 digits, a uuid has 32:

- `niah_single_1`: one needle, a number, in a cycle of filler; `_2`: in a random walk of filler; `_3`: a uuid there
- `niah_multikey_1`: several needles, one of them asked for; `_2`: nothing but needles; `_3`: uuids for both, likewise
- `niah_multivalue`: one key with several values, asked in the order in which they stand
- `niah_multiquery`: several needles, all asked for

Tracing, `vt`: a chain of assignments, ASSIGN name value and then ASSIGN name name ..., in filler; QUERY and the value
ask for all names that have it, in order. With one chain, RULER's default, these are all names that there are.

Counting: `cwe`, a few common words among others; QUERY asks for the common ones, most frequent first. `fwe`, words with
frequencies of a zeta distribution; the most frequent is noise, the next three are asked for. Counts never tie.

How many needles, hops and words there are follows from the length. RULER's two families of questions on outside text
have no form in tokens.

Shape letters: N rows, L tokens per row, C tokens of context, H assignments of a chain, K chains, W words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.settings import setting
from zoo.train.data import needle
from zoo.train.data.base import register_data
from zoo.train.data.draws import DEPTHS, Draws
from zoo.train.data.needle import FIRST_FILLER, PAD, QUERY, fill
from zoo.train.data.stream import ANSWERS, IGNORE
from zoo.train.data.synthetic import Examples, Synthetic, SyntheticConfig, levels_of
from zoo.train.recipe import Recipe

ASSIGN = DUMMY = 1  # the place of NEEDLE, which these families do not have
FILLER_IDS = 16
NAMES = VALUES = WORDS = 64
NUMBER: dict[str, Any] = {"digits": 7, "value_ids": 10}
UUID: dict[str, Any] = {"digits": 32, "value_ids": 16}
_NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": NUMBER | {"filler": "cycle"},
    "niah_single_2": NUMBER,
    "niah_single_3": UUID,
    "niah_multikey_1": NUMBER,
    "niah_multikey_2": NUMBER | {"key_ids": 512},
    "niah_multikey_3": UUID | {"key_ids": 16, "key_digits": 32},
    "niah_multivalue": NUMBER,
    "niah_multiquery": NUMBER,
}
FAMILIES = (*_NEEDLES, "vt", "cwe", "fwe")
_ASKED_OF_FWE = 3


@dataclass(kw_only=True)
class RulerConfig(SyntheticConfig):
    """Settings of `data=ruler`."""

    family: str = setting("niah_single_1", "the task", choices=FAMILIES)
    seq_len: int = setting(256, "tokens per sequence in training and validation", minimum=1)
    test_lengths: list[int] | None = setting(
        [256, 512, 1_024], "tokens per sequence in the test, one or several; null: seq_len"
    )
    chains: int = setting(1, "chains of vt: with two or more, a name's chain has to be traced", minimum=1, maximum=8)

    def shortest(self) -> int:
        """Room for two needles of whatever kind, and for counts that do not tie."""
        return 256 if self.family == "niah_multikey_3" else 128


def niah(family: str, seq_len: int) -> dict[str, Any]:
    """The arguments of `needle.generate` beside the length."""
    several = 4 if seq_len >= 512 else 2
    form: dict[str, Any] = {
        "n_needles": 1,
        "n_queries": 1,
        "n_values": 1,
        "filler": "markov",
        "filler_ids": FILLER_IDS,
        "key_ids": 64,
    }
    form |= _NEEDLES[family]
    if family in ("niah_multikey_1", "niah_multiquery"):
        form["n_needles"] = several
    if family == "niah_multiquery":
        form["n_queries"] = several
    if family == "niah_multivalue":
        form["n_values"] = several
    if family in ("niah_multikey_2", "niah_multikey_3"):
        question = needle.shortest(**form) - _width(form)
        fitting = (seq_len - question) // _width(form)
        form["n_needles"] = fitting if "key_digits" in form else min(fitting, form["key_ids"])
    return form


def _width(form: dict[str, Any]) -> int:
    return 1 + form.get("key_digits", 1) + form["digits"]


def hops(seq_len: int) -> int:
    """Assignments of a chain behind its first."""
    return 2 if seq_len < 512 else 3 if seq_len < 1_024 else 4


def counts(family: str, seq_len: int) -> tuple[list[int], int, int]:
    """How often each word of `cwe` or `fwe` stands in a row, most frequent first, and which are asked for: from, to."""
    if family == "cwe":
        # How often a common word stands for each time that another does: 6 below 4,096 tokens and 10 from there on, as
        # in RULER; fewer words below 1,024.
        common, repeats, others = (10, 10 if seq_len >= 4_096 else 6, 50)
        if seq_len < 1_024:
            common, repeats, others = (3, 4, 17) if seq_len < 512 else (5, 5, 35)
        shares = [repeats + common - 1 - rank for rank in range(common)] + [1] * others
        unit = (seq_len - common) // sum(shares)
        return [unit * share for share in shares], 0, common
    words = (
        8 if seq_len < 512 else 12 if seq_len < 1_024 else 20 if seq_len < 2_048 else min((seq_len - 50) // 50, WORDS)
    )
    size = seq_len - _ASKED_OF_FWE
    zeta = math.pi**2 / 6
    often = [int(size / (zeta * rank**2)) for rank in range(1, words + 1)]
    return [size - sum(often[1:]), *(count for count in often[1:] if count)], 1, 1 + _ASKED_OF_FWE


def generate(rows: int, draws: Draws, *, family: str, seq_len: int, chains: int) -> Examples:
    """Rows as the head of this file describes them; retrieval has slice `depth` and mark `answers`."""
    if family in _NEEDLES:
        return needle.generate(rows, draws, seq_len=seq_len, **niah(family, seq_len))
    if family == "vt":
        return _trace(rows, draws, seq_len, hops(seq_len) + 1, chains)
    return _count(rows, draws, family, seq_len)


def _trace(rows: int, draws: Draws, seq_len: int, assignments: int, chains: int) -> Examples:
    """`vt`: the statements of all chains, each in its order, at random places."""
    row = np.arange(rows)[:, None]
    statements = assignments * chains
    first_name = FIRST_FILLER + FILLER_IDS
    names = first_name + draws.distinct(NAMES, rows, statements).reshape(rows, chains, assignments)
    values = first_name + NAMES + draws.distinct(VALUES, rows, chains)  # (N, K)
    owners = draws.orders(rows, statements) % chains  # the chain of each statement, as they stand
    # The how-manieth of its chain each statement is.
    order = np.argsort(owners, axis=1, kind="stable")
    turn = np.empty_like(order)
    np.put_along_axis(turn, order, np.tile(np.arange(statements) % assignments, (rows, 1)), axis=1)
    sources = np.concatenate([values[..., None], names[..., :-1]], axis=2)  # (N, K, H): what is assigned
    said = np.stack([np.full_like(owners, ASSIGN), names[row, owners, turn], sources[row, owners, turn]], axis=2)
    context = seq_len - assignments - 1  # C
    places = np.sort(draws.distinct(context - 2 * statements, rows, statements), axis=1) + 2 * np.arange(statements)
    inputs = np.empty((rows, seq_len), dtype=np.int64)
    inputs[:, :context] = fill(rows, draws, context, "cycle", FILLER_IDS)
    inputs[row[..., None], places[..., None] + np.arange(3)] = said
    asked = draws.integers(chains, rows)
    answer = names[row[:, 0], asked]  # (N, H)
    inputs[:, context], inputs[:, context + 1] = QUERY, values[row[:, 0], asked]
    inputs[:, context + 2 :] = answer[:, :-1]
    return _asking(inputs, answer)


def _count(rows: int, draws: Draws, family: str, seq_len: int) -> Examples:
    """`cwe` and `fwe`: words in random order; padding before them where their counts leave places."""
    often, first, last = counts(family, seq_len)
    words = FIRST_FILLER + draws.distinct(WORDS, rows, len(often))  # (N, W), most frequent first
    if family == "fwe":
        words[:, 0] = DUMMY
    ranks = np.repeat(np.arange(len(often)), often)[draws.orders(rows, sum(often))]
    answer = words[:, first:last]
    question = np.concatenate([np.full((rows, 1), QUERY), answer[:, :-1]], axis=1)
    inputs = np.full((rows, seq_len), PAD)
    inputs[:, seq_len - question.shape[1] - ranks.shape[1] :] = np.concatenate(
        [np.take_along_axis(words, ranks, axis=1), question], axis=1
    )
    return _asking(inputs, answer)


def _asking(inputs: np.ndarray, answer: np.ndarray) -> Examples:
    """Rows whose last labels are the answer."""
    targets = np.full(inputs.shape, IGNORE)
    targets[:, -answer.shape[1] :] = answer
    return Examples(inputs, targets)


@register_data("ruler", config=RulerConfig)
class Ruler(Synthetic[RulerConfig]):
    """RULER's families in tokens; slice `seq_len`, and `depth` where needles are looked for."""

    recipe = Recipe(max_steps=1_500, lr=1e-3)
    format = 3
    generate = staticmethod(generate)

    def __init__(self, config: RulerConfig) -> None:
        super().__init__(config)
        if config.family in _NEEDLES:
            form = niah(config.family, config.seq_len)
            self.slice_values["depth"] = list(range(DEPTHS))
            self.marks = (ANSWERS,)
            self.vocab_size = FIRST_FILLER + FILLER_IDS + form["key_ids"] + form["value_ids"]
        else:
            self.vocab_size = FIRST_FILLER + (FILLER_IDS + NAMES + VALUES if config.family == "vt" else WORDS)
        asked = [_asked(config, length) for length in config.lengths("test")]
        labels = sum(count for count, _ in asked)
        self.levels = {name: sum(count * levels[name] for count, levels in asked) / labels for name in asked[0][1]}


def _asked(config: RulerConfig, seq_len: int) -> tuple[int, dict[str, float]]:
    """The labels of a row, and what guesses score on them: any answer, or one of those shown in the row."""
    if config.family in _NEEDLES:
        form = niah(config.family, seq_len)
        labels = form["n_queries"] * form["n_values"] * form["digits"]
        return labels, levels_of(form["n_needles"] * form["n_values"], form["value_ids"])
    if config.family == "vt":
        labels = hops(seq_len) + 1
        return labels, {"chance": 1 / NAMES, "plateau": 1 / (labels * config.chains)}
    _, first, last = counts(config.family, seq_len)
    return last - first, {"chance": 1 / WORDS, "plateau": 1 / (last - first)}
