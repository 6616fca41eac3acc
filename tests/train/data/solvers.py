"""For each generated task a solver, what may be asked of it, and the answers of a model that has not understood it.

A solver is a coroutine that is sent one token at a time and answers with the label at that token, -100 where nothing is
asked: it cannot read ahead. It knows the settings of the task and nothing of its code.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from hypothesis import strategies as st

from zoo.train.data import MadMemorizeConfig, create_source
from zoo.train.data.ruler import FAMILIES, counts, niah
from zoo.train.data.synthetic import examples

IGNORE = -100
Solver = Iterator[int]


class Task(NamedTuple):
    """How a task is tested."""

    solve: Callable[..., Any]
    """Starts a solver from the arguments of a table."""
    settings: st.SearchStrategy[dict[str, Any]]
    """Settings that go together."""
    half_right: Callable[..., list[list[int]]] | None = None
    """From the inputs of a row and the arguments, for each label the answers that a model on the plateau guesses among.
    """


def answer(solver: Any, tokens: list[int]) -> list[int]:
    """The solver's label at each token."""
    next(solver)
    return [solver.send(token) for token in tokens]


def _solve_needle(n_queries, n_values, digits, key_digits=1, **_):
    facts = defaultdict(list)
    token = yield
    while token != 2:
        if token == 1:
            key, value = [], []
            for part, size in ((key, key_digits), (value, digits)):
                for _ in range(size):
                    part.append((yield IGNORE))
            facts[tuple(key)] += value
        token = yield IGNORE
    question = []
    for _ in range(n_queries * key_digits):
        question.append((yield IGNORE))
    for i in range(0, len(question), key_digits):
        found = facts[tuple(question[i : i + key_digits])]
        assert len(found) == n_values * digits
        for label in found:  # noqa: UP028
            yield label


def _values_of_needles(tokens, n_queries, n_values, digits, key_digits=1, **_):
    starts = [i + 1 + key_digits for i, token in enumerate(tokens) if token == 1]
    return [[tokens[i + digit] for i in starts] for digit in range(digits)] * (n_queries * n_values)


@st.composite
def _needles(draw, least=1):
    settings = {
        "n_needles": draw(st.integers(least, 6)),
        "n_values": draw(st.integers(1, 3)),
        "digits": draw(st.integers(1, 3)),
        "filler": draw(st.sampled_from(["uniform", "cycle", "markov"])),
        "filler_ids": draw(st.integers(1, 40)),
        "value_ids": draw(st.integers(2, 40)),
    }
    settings["key_ids"] = settings["n_needles"] + draw(st.integers(0, 20))
    settings["n_queries"] = draw(st.integers(1, settings["n_needles"]))
    needle = settings["n_needles"] * settings["n_values"] * (2 + settings["digits"])
    asked = settings["n_queries"] * (1 + settings["n_values"] * settings["digits"])
    return settings | {"seq_len": needle + asked + draw(st.integers(6, 40))}


def _solve_induction(**_):
    token = yield
    while token != 0:
        token = yield IGNORE
    followed = yield IGNORE
    token = yield IGNORE
    while token != 0:
        token = yield IGNORE
    yield followed


def _solve_selective_copying(vocab_size, **_):
    content = []
    token = yield
    while token != vocab_size - 1:
        content += [token] if token else []
        token = yield IGNORE
    for label in content:  # noqa: UP028
        yield label


def _content(tokens, vocab_size, n_tokens, **_):
    return [[token for token in tokens if 0 < token < vocab_size - 1]] * n_tokens


def _solve_copying(form, letters, ngram, **_):
    start, separator = letters, letters + 1
    assert (yield) == start
    parts = [[]]
    while len(parts) < (3 if form == "prefix_ngram" else 2):
        token = yield IGNORE
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    asked, string = parts[0], parts[-2]
    if form == "suffix_ngram":
        asked = []
        for _ in range(ngram):
            asked.append((yield IGNORE))
    begin = 0
    if form.endswith("fix_ngram"):
        (begin,) = (i + ngram for i in range(len(string)) if string[i : i + ngram] == asked)
    for label in string[begin:]:  # noqa: UP028
        yield label
    while True:
        yield IGNORE


def _solve_assoc_recall(vocab_size, **_):
    facts = {}
    key = yield
    while key != vocab_size - 1:
        facts[key] = yield IGNORE
        key = yield IGNORE
    key = yield IGNORE
    yield facts[key]


def _solve_depth_curve(**_):
    facts = {}
    key = yield
    while key != 0:
        facts[key] = yield IGNORE
        key = yield IGNORE
    key = yield IGNORE
    yield facts[key]


def _values_of_pairs(tokens, **_):
    return [tokens[1:-2:2]]


def _solve_mad_recall(vocab_size, **_):
    facts = {}
    key = yield
    while True:
        value = yield facts.get(key, IGNORE)
        if key < vocab_size:  # else it is noise
            facts[key] = value
        key = yield IGNORE


def _solve_mad_fuzzy(vocab_size, key_size, **_):
    padding, first_value = vocab_size - 1, (vocab_size - 1) // 2
    facts = {}
    token = yield
    while token == padding:
        token = yield IGNORE
    while True:
        key = [token]
        while len(key) < key_size:
            key.append((yield IGNORE))
        assert len(set(key)) == key_size
        if tuple(key) in facts:
            for label in facts[tuple(key)]:
                token = yield label
            token = yield IGNORE
        else:
            value = facts[tuple(key)] = []
            token = yield IGNORE
            while token >= first_value:
                value.append(token)
                token = yield IGNORE


def _commonest_values(solve, values):
    """Guesses the value that has stood most often before each label, of the values of several tokens each by itself."""

    def guesses(tokens, **arguments):
        first, end = values(**arguments)
        found, counts, best, place = [], Counter(), {}, 0
        for token, label in zip(tokens, answer(solve(**arguments), tokens), strict=True):
            if first <= token < end:
                counts[place, token] += 1
                if place not in best or counts[place, token] > counts[place, best[place]]:
                    best[place] = token
                place += 1
            else:
                place = 0
            if label != IGNORE:
                found.append([best.get(place, -1)])
        return found

    return guesses


@lru_cache
def _learnt_facts(vocab_size):
    """What the training rows of `mad_memorize` say."""
    source = create_source(MadMemorizeConfig(vocab_size=vocab_size))
    facts = {}
    for block in examples("mad_memorize", "train", 256, 0, **source.arguments("train")[0]):
        facts |= dict(zip(block.inputs[:, ::2].ravel().tolist(), block.targets[:, 1::2].ravel().tolist(), strict=True))
    return facts


def _solve_mad_memorize(vocab_size, **_):
    facts = _learnt_facts(vocab_size)
    key = yield
    while True:
        assert (yield IGNORE) == vocab_size - 1
        key = yield facts[key]


def _solve_mad_compress(vocab_size, **_):
    content = []
    token = yield
    while token != vocab_size - 1:
        content.append(token)
        token = yield IGNORE
    yield IGNORE
    for label in content:  # noqa: UP028
        yield label


def _solve_mad_selcopy(vocab_size, **_):
    content = []
    token = yield
    while token != vocab_size - 1:
        before, content = token, content + ([token] if token < vocab_size - 2 else [])
        token = yield IGNORE
    assert before == content[-1]
    yield IGNORE
    for label in content:  # noqa: UP028
        yield label


def _mad_content(tokens, vocab_size, n_tokens, **_):
    return [[token for token in tokens if token < vocab_size - 2]] * n_tokens


def _solve_vt(**_):
    assigned = {}
    token = yield
    while token != 2:
        if token == 1:
            name = yield IGNORE
            assigned[(yield IGNORE)] = name
        token = yield IGNORE
    holder = yield IGNORE
    while True:
        holder = assigned[holder]
        yield holder


def _solve_counting(family, seq_len, **_):
    seen = Counter()
    token = yield
    while token != 2:
        seen[token] += token > 1  # neither padding nor what fwe has for noise
        token = yield IGNORE
    _, first, last = counts(family, seq_len)
    ordered = seen.most_common(last - first + 1)
    assert len({count for _, count in ordered}) == len(ordered)
    for label, _ in ordered[:-1]:
        yield label


def _solve_ruler(family, seq_len, **arguments):
    if family.startswith("niah"):
        return _solve_needle(**niah(family, seq_len))
    return (_solve_vt if family == "vt" else _solve_counting)(family=family, seq_len=seq_len)


@st.composite
def _copyings(draw):
    form = draw(st.sampled_from(["copy", "prefix_ngram", "suffix_ngram", "duplicate_ngram"]))
    ngram, letters = draw(st.integers(1, 3)), draw(st.integers(8, 40))
    shortest = 2 * ngram + draw(st.integers(2, 5))  # fewer letters make too few different strings
    seq_len = 2 * shortest + 3 + draw(st.integers(0, 20))
    return {"form": form, "ngram": ngram, "letters": letters, "min_letters": shortest, "seq_len": seq_len}


@st.composite
def _with_content(draw):
    n_tokens = draw(st.integers(3, 12))
    seq_len = 2 * n_tokens + 1 + draw(st.integers(8, 60))
    return {"n_tokens": n_tokens, "seq_len": seq_len, "vocab_size": draw(st.integers(6, 30))}


@st.composite
def _fuzzies(draw):
    key_size, value_size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seq_len = 2 * (key_size + value_size) + draw(st.integers(10, 80))
    vocab_size = draw(st.integers(7, 30))
    return {"key_size": key_size, "value_size": value_size, "seq_len": seq_len, "vocab_size": vocab_size}


def _some(**values):
    return st.fixed_dictionaries(values)


_pairs = st.integers(8, 30)
TASKS = {
    "passkey": Task(_solve_needle, _needles()),
    "needle": Task(_solve_needle, _needles(2), _values_of_needles),
    "induction": Task(_solve_induction, _some(seq_len=st.integers(12, 90), vocab_size=st.integers(3, 40))),
    "ruler": Task(
        _solve_ruler,
        _some(
            family=st.sampled_from(FAMILIES), seq_len=st.sampled_from([256, 400, 512, 1_024]), chains=st.integers(1, 4)
        ),
    ),
    "selective_copying": Task(_solve_selective_copying, _with_content(), _content),
    "copying": Task(_solve_copying, _copyings()),
    "assoc_recall": Task(
        _solve_assoc_recall,
        _some(seq_len=_pairs.map(lambda p: 2 * p + 2), vocab_size=st.integers(6, 40)),
        _commonest_values(_solve_assoc_recall, lambda vocab_size, **_: (1 + (vocab_size - 2) // 2, vocab_size - 1)),
    ),
    "depth_curve": Task(_solve_depth_curve, _some(seq_len=_pairs.map(lambda p: 2 * p + 2)), _values_of_pairs),
    "mad_recall": Task(
        _solve_mad_recall,
        _some(seq_len=_pairs.map(lambda p: 2 * p + 1), vocab_size=st.integers(4, 40)),
        _commonest_values(_solve_mad_recall, lambda vocab_size, **_: (vocab_size // 2, vocab_size)),
    ),
    "mad_noisy": Task(
        _solve_mad_recall,
        _some(seq_len=_pairs.map(lambda p: 2 * p + 1), noise_ids=st.integers(1, 20), noise_share=st.floats(0, 1)),
        _commonest_values(_solve_mad_recall, lambda vocab_size, **_: (vocab_size // 2, vocab_size)),
    ),
    "mad_fuzzy": Task(
        _solve_mad_fuzzy,
        _fuzzies(),
        _commonest_values(_solve_mad_fuzzy, lambda vocab_size, **_: ((vocab_size - 1) // 2, vocab_size - 1)),
    ),
    "mad_memorize": Task(
        _solve_mad_memorize, _some(seq_len=_pairs.map(lambda p: 2 * p), vocab_size=st.integers(10, 200))
    ),
    "mad_compress_causal": Task(
        _solve_mad_compress, _some(seq_len=_pairs.map(lambda p: 2 * p + 1), vocab_size=st.integers(4, 40))
    ),
    "mad_selcopy": Task(_solve_mad_selcopy, _with_content(), _mad_content),
}

# Hashes of examples at the default settings: each changes with the task's format alone.
PINNED = {
    "passkey": "89d5b5e1c0e73abd",
    "needle": "3ce7f7e46e7702c5",
    "selective_copying": "6aff3c1858b80352",
    "copying": "39898ad8f1044260",
    "mad_fuzzy": "600f0c542ec52a78",
    "mad_selcopy": "91ed499ce31423cb",
    "induction": "b2bf79fa397e7755",
    "assoc_recall": "f104957a99714da8",
    "depth_curve": "84a5e2bd3a0c969e",
    "mad_recall": "f38cb151b083a69d",
    "mad_noisy": "209895334252d5b1",
    "mad_memorize": "2060e3845f31f48a",
    "mad_compress_causal": "81f5b9b892d8c730",
    "ruler": "31d3f595498314f6",
}
