"""What single generated tasks promise beyond their labels, which `test_tasks` checks."""

import numpy as np
import pytest

from zoo.kernels.errors import ConfigError
from zoo.train.data import (
    IGNORE,
    AssocRecallConfig,
    CopyingConfig,
    DepthCurveConfig,
    InductionConfig,
    MadCompressCausalConfig,
    MadFuzzyConfig,
    MadMemorizeConfig,
    MadNoisyConfig,
    MadRecallConfig,
    MadSelcopyConfig,
    SelectiveCopyingConfig,
    create_source,
)
from zoo.train.data.mad import facts

from .solvers import TASKS, answer
from .test_tasks import rows, source_of


@pytest.mark.parametrize("task", ["mad_recall", "mad_noisy", "mad_fuzzy", "assoc_recall"])
def test_training_asks_for_every_next_token_or_for_the_answers_alone(task):
    inputs, targets, _ = rows(source_of(task), "train", 50)
    asked = targets[:, :-1] != IGNORE
    np.testing.assert_array_equal(targets[:, :-1][asked], inputs[:, 1:][asked])
    padding = inputs[:, 1:] == 7 if task == "mad_fuzzy" else np.zeros_like(asked)
    np.testing.assert_array_equal(asked, ~padding)
    assert (targets[:, -1] != IGNORE).all()
    source = source_of(task, loss_on="answer")
    if task != "mad_fuzzy":  # its training rows have keys of all sizes, whose ends only the next token tells
        arguments = source.arguments("train")[0]
        for tokens, labels in zip(*map(np.ndarray.tolist, rows(source, "train", 50)[:2]), strict=True):
            assert answer(TASKS[task].solve(**arguments), tokens) == labels
    assert (rows(source, "train", 50)[1] == IGNORE).mean() > 0.3


def test_the_trigger_of_induction_stands_twice_and_anywhere():
    inputs, targets, slices = rows(source_of("induction", seq_len=12), "train", 10_000)
    assert ((inputs == 0).sum(1) == 2).all()
    assert (inputs[:, -1] == 0).all()
    position = (inputs == 0).argmax(1)
    np.testing.assert_array_equal(slices["answers"][:, 0], position + 1)
    np.testing.assert_allclose(np.bincount(position) / len(inputs), 1 / 10, atol=0.015)
    np.testing.assert_allclose(np.bincount(targets[:, -1])[1:] / len(inputs), 1 / 15, atol=0.013)


def test_strings_vary_in_training_and_are_the_longest_that_fit_in_the_test():
    source = source_of("copying", test_lengths=[34, 51])
    inputs, targets, slices = rows(source, "train", 3_000)
    sizes = slices["letters"]
    np.testing.assert_array_equal((inputs < 26).sum(1), 2 * sizes)
    np.testing.assert_allclose(np.bincount(sizes)[4:] / len(sizes), 1 / 13, atol=0.025)
    ends = targets == 28
    np.testing.assert_array_equal(ends.argmax(1), 2 * sizes + 1)
    assert (ends.sum(1) == 1).all()
    for table, letters in ((0, 16), (1, 24)):
        _, targets, slices = rows(source, "test", 20, table)
        assert set(slices["letters"]) == {letters}
        assert ((targets != IGNORE).sum(1) == letters).all()  # the end is not asked for


def test_what_is_looked_up_stands_once_and_what_is_repeated_twice():
    for form, times in (("prefix_ngram", 1), ("suffix_ngram", 1), ("duplicate_ngram", 2)):
        inputs, _, _ = rows(source_of("copying", form=form, letters=8), "train", 300)
        for tokens in inputs.tolist():
            parts = [[]]
            for token in tokens[1:]:
                parts.append([]) if token == 9 else parts[-1].append(token)
            string = parts[1] if form == "prefix_ngram" else parts[0]
            grams = [tuple(string[i : i + 2]) for i in range(len(string) - 1)]
            if form == "duplicate_ngram":
                assert max(map(grams.count, grams)) >= times
            else:
                looked_up = parts[0] if form == "prefix_ngram" else parts[1][:2]
                assert grams.count(tuple(looked_up)) == times


def test_noise_replaces_as_many_pairs_as_stated():
    inputs, _, _ = rows(source_of("mad_noisy", noise_share=0.4), "train", 4_000)
    noisy = inputs[:, :-1:2] >= 8
    np.testing.assert_array_equal(noisy, inputs[:, 1::2] >= 8)
    assert not noisy.all(1).any()
    assert noisy.mean() == pytest.approx(0.4 * 14 / 15, abs=0.01)  # one pair of fifteen is kept
    values = np.bincount(inputs[inputs >= 8] - 8) / (inputs >= 8).sum()
    np.testing.assert_allclose(values, 1 / 8, atol=0.01)


def test_fuzzy_keys_vary_in_training_alone_and_are_of_different_tokens():
    settings = {"vocab_size": 16, "key_size": 3, "value_size": 3, "seq_len": 64}
    sizes = {}
    for split in ("train", "validation"):
        inputs, _, _ = rows(source_of("mad_fuzzy", **settings), split, 300)
        found = sizes[split] = set()
        for tokens in inputs.tolist():
            runs = "".join("k" if token < 7 else "v" for token in tokens if token != 15)
            found |= {len(run) for run in runs.split("v") if run}
    assert sizes == {"train": {1, 2, 3}, "validation": {3}}


def test_the_facts_to_memorise_never_change():
    assert len(facts(256)) == 127
    assert sorted({*facts(64)}) == sorted(facts(64).tolist())
    assert facts(64).min() >= 31
    assert facts(64).max() < 63
    maps = []
    for split, seed in (("train", 0), ("test", 0), ("train", 5)):
        inputs, targets, _ = rows(source_of("mad_memorize"), split, 256, data_seed=seed)
        maps.append(dict(zip(inputs[:, ::2].ravel().tolist(), targets[:, 1::2].ravel().tolist(), strict=True)))
    assert maps[0] == maps[1] == maps[2]
    assert len(maps[0]) == 31
    assert [len(table) for table in source_of("mad_memorize").load("train")] == [256]


def test_blanks_stand_before_any_content_token():
    inputs, _, _ = rows(source_of("mad_selcopy"), "train", 3_000)
    content = np.nonzero(inputs < 14)[1].reshape(-1, 8)
    gaps = np.diff(content, axis=1, prepend=-1) - 1
    np.testing.assert_allclose(gaps.mean(0), 47 / 8, rtol=0.05)
    # A blank chooses its place by itself: the variance of a binomial count.
    np.testing.assert_allclose(gaps.var(0), 47 * 7 / 64, rtol=0.15)


def test_content_stands_anywhere_in_the_noise():
    inputs, _, _ = rows(source_of("selective_copying", seq_len=30), "train", 4_000)
    np.testing.assert_allclose((inputs[:, :22] > 0).mean(0), 8 / 22, atol=0.045)


def test_the_pair_asked_for_stands_anywhere_in_training_and_on_a_grid_in_the_test():
    source = source_of("depth_curve", seq_len=66, test_lengths=[34, 66])
    inputs, _, slices = rows(source, "train", 4_000)
    asked = (inputs[:, :-2:2] == inputs[:, -1:]).argmax(1)
    np.testing.assert_array_equal(2 * asked + 1, slices["answers"][:, 0])
    np.testing.assert_allclose(np.bincount(asked) / 4_000, 1 / 32, atol=0.014)
    for table, grid in ((0, [*range(16)]), (1, [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31])):
        inputs, _, slices = rows(source, "test", 300, table)
        np.testing.assert_array_equal(2 * np.array(grid)[slices["place"]] + 1, slices["answers"][:, 0])
        assert set(slices["place"].tolist()) == set(range(16))
        assert all(len(set(row)) == len(row) for row in inputs[:, 1:-2:2].tolist())


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (InductionConfig, {"seq_len": 2}, "data.seq_len=2 is not valid: expected at least 3"),
        (SelectiveCopyingConfig, {"n_tokens": 41}, "data.seq_len=80 is not valid: expected at least 82"),
        (CopyingConfig, {"form": "copi"}, "did you mean 'copy'"),
        (CopyingConfig, {"min_letters": 17}, "data.seq_len=34 is not valid: expected at least 36"),
        (CopyingConfig, {"form": "prefix_ngram", "min_letters": 2}, "data.ngram=2 needs at least 3"),
        (CopyingConfig, {"form": "duplicate_ngram", "ngram": 3}, "needs at least 6"),
        (AssocRecallConfig, {"seq_len": 35}, "data.seq_len=35 is not valid: expected even numbers"),
        (AssocRecallConfig, {"loss_on": "last"}, "data.loss_on"),
        (DepthCurveConfig, {"test_lengths": [34, 132]}, "expected at most 130"),
        (
            MadRecallConfig,
            {"test_lengths": [31, 64]},
            r"data.test_lengths=\[31, 64\] is not valid: expected odd numbers",
        ),
        (MadNoisyConfig, {"noise_share": 1.5}, "at most 1"),
        (MadFuzzyConfig, {"key_size": 4}, "data.key_size=4 is not valid: expected at most 3"),
        (MadFuzzyConfig, {"value_size": 5}, "expected at most 4"),
        (MadFuzzyConfig, {"seq_len": 6}, "at least 7"),
        (MadMemorizeConfig, {"seq_len": 31}, "even numbers"),
        (MadCompressCausalConfig, {"seq_len": 32}, "odd numbers"),
        (MadSelcopyConfig, {"n_tokens": 32}, "data.seq_len=64 is not valid: expected at least 65"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(config, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(**arguments)
    assert str(caught.value).startswith("data.")
    assert "\n" not in str(caught.value)
    assert create_source(config()).facts()["data_seed"] == 0
