"""For each generated task a solver, what may be asked of it, and the answers of a model that has not understood it.

A solver is a coroutine that is sent one token at a time and answers with the label at that token, -100 where nothing is
asked: it cannot read ahead. It knows the settings of the task and nothing of its code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hypothesis import strategies as st

IGNORE = -100
Solver = Iterator[int]


class Task(NamedTuple):
    """How a task is tested."""

    solve: Callable[..., Any]
    """Starts a solver from the arguments of a table."""
    settings: st.SearchStrategy[dict[str, Any]]
    """Settings that go together."""
    pinned: str
    """Hash of examples at the default settings, which changes with the task's format alone."""
    half_right: Callable[..., list[int]] | None = None
    """From the inputs of a row and the arguments, the answers that a model on the plateau guesses among."""


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
        for label in found:  # noqa: UP028  (a list takes no tokens)
            yield label


def _values_of_needles(tokens, **_):
    return [tokens[i + 2] for i, token in enumerate(tokens) if token == 1]


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


TASKS = {
    "passkey": Task(_solve_needle, _needles(), "89d5b5e1c0e73abd"),
    "needle": Task(_solve_needle, _needles(2), "3ce7f7e46e7702c5", _values_of_needles),
}
