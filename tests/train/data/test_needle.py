"""Needles: where they lie, what they lie in, and which settings go together. `test_tasks` checks the labels."""

import numpy as np
import pytest

from zoo.kernels.errors import ConfigError
from zoo.train.data import IGNORE, NeedleConfig, PasskeyConfig
from zoo.train.data.draws import DEPTHS, Draws
from zoo.train.data.needle import FIRST_FILLER, NEEDLE, QUERY, fill, generate


def test_one_needle_is_as_defined():
    form = PasskeyConfig(seq_len=50).options("train")
    inputs, targets, slices, _ = generate(20_000, Draws("rows"), seq_len=50, **form)
    assert (inputs[:, -2] == QUERY).all()
    assert ((inputs == NEEDLE).sum(1) == 1).all()
    position = (inputs == NEEDLE).argmax(1)
    np.testing.assert_array_equal(slices["answers"][:, 0], position + 2)
    assert (position.min(), position.max()) == (0, 50 - 5)
    np.testing.assert_allclose(np.bincount(position) / len(inputs), 1 / 46, atol=0.006)
    assert (targets[:, :-1] == IGNORE).all()
    assert (slices["depth"][position == 0] == 0).all()
    assert (slices["depth"][position == 45] == DEPTHS - 1).all()
    np.testing.assert_allclose(np.bincount(slices["depth"]) / len(inputs), 0.1, atol=0.02)


def test_the_needle_asked_for_lies_anywhere_among_the_others():
    form = NeedleConfig().options("train")
    inputs, _, slices, _ = generate(5_000, Draws("rows"), seq_len=128, **form)
    position = slices["answers"][:, 0] - 2
    before = (np.cumsum(inputs == NEEDLE, axis=1) - 1)[np.arange(5_000), position]
    np.testing.assert_allclose(np.bincount(before) / 5_000, 0.25, atol=0.03)
    keys = inputs[np.arange(5_000), position + 1]
    np.testing.assert_array_equal(keys, inputs[:, -1])


def test_the_values_of_one_key_are_asked_in_the_order_in_which_they_stand():
    form = NeedleConfig(n_needles=2, n_values=3, seq_len=40).options("train")
    inputs, targets, slices, _ = generate(200, Draws("rows"), seq_len=40, **form)
    for tokens, labels, answers in zip(inputs.tolist(), targets.tolist(), slices["answers"].tolist(), strict=True):
        question = tokens.index(QUERY)
        places = [i for i in range(question) if tokens[i] == NEEDLE and tokens[i + 1] == tokens[question + 1]]
        values = [tokens[i + 2] for i in places]
        assert labels[-3:] == values
        assert answers == [i + 2 for i in places]
        assert tokens[-2:] == values[:-1]


def test_fillers():
    uniform = fill(2_000, Draws("u"), 50, "uniform", 8)
    np.testing.assert_allclose(np.bincount(uniform.ravel() - FIRST_FILLER) / uniform.size, 1 / 8, atol=0.006)
    cycle = fill(2, Draws("c"), 20, "cycle", 40)
    assert cycle[0].tolist() == cycle[1].tolist() == [FIRST_FILLER + i % 16 for i in range(20)]
    chain = fill(2_000, Draws("m"), 50, "markov", 8) - FIRST_FILLER
    np.testing.assert_allclose(np.bincount(chain.ravel()) / chain.size, 1 / 8, atol=0.006)
    steps = (np.diff(chain, axis=1) % 8).ravel()
    # 9 is 1 on a circle of eight.
    np.testing.assert_allclose(
        np.bincount(steps, minlength=8) / len(steps), [0, 0.5, 0, 0.25, 0.25, 0, 0, 0], atol=0.01
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_needles": 17}, r"data\.n_needles=17 is not valid: data.key_ids=16 has fewer"),
        ({"n_queries": 5}, r"data\.n_queries=5 is not valid: expected at most data.n_needles=4"),
        ({"seq_len": 13}, r"data\.seq_len=13 is not valid: expected at least 14"),
        ({"test_lengths": [128, 9]}, r"data\.test_lengths=\[128, 9\] is not valid: expected at least 14"),
        ({"filler": "essay"}, r"data\.filler"),
        ({"digits": 0}, r"at least 1"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        NeedleConfig(**values)
    assert "\n" not in str(caught.value)
    assert NeedleConfig(seq_len=14, test_lengths=[14]).lengths("test") == [14]
