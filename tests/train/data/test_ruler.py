"""RULER's families: what each is made of, at each length; the labels are checked in `test_tasks`."""

from collections import Counter

import numpy as np
import pytest

from zoo.kernels.errors import ConfigError
from zoo.train.data import IGNORE, RulerConfig, create_source
from zoo.train.data.draws import Draws
from zoo.train.data.ruler import FAMILIES, counts, generate, hops, niah

from .solvers import TASKS, answer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_solved_at_every_length(family):
    for seq_len in (256, 511, 512, 1_024, 2_048):
        arguments = {"family": family, "seq_len": seq_len, "chains": 2}
        inputs, targets, _, _ = generate(3, Draws(family), **arguments)
        assert inputs.max() < create_source(RulerConfig(family=family)).vocab_size
        for tokens, labels in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert answer(TASKS["ruler"].solve(**arguments), tokens) == labels


@pytest.mark.parametrize("family", FAMILIES)
def test_chance_and_plateau_are_as_stated(family):
    # The plateau: one of the answers that the row holds, at the place of the answer where values have several digits.
    config = RulerConfig(family=family, test_lengths=[256, 512], chains=2)
    rates, known = [], set()
    for seq_len in config.lengths("test"):
        inputs, targets, _, _ = generate(200, Draws(family, seq_len), family=family, seq_len=seq_len, chains=2)
        for tokens, labels in zip(inputs.tolist(), targets.tolist(), strict=True):
            asked = [label for label in labels if label != IGNORE]
            known |= set(asked)
            places = [i for i, token in enumerate(tokens) if token == 1]
            for i, label in enumerate(asked):
                if family.startswith("niah"):
                    form = niah(family, seq_len)
                    behind = 1 + form.get("key_digits", 1) + i % form["digits"]
                    among = [tokens[place + behind] for place in places]
                else:
                    among = [tokens[place + 1] for place in places] if family == "vt" else asked
                rates.append(among.count(label) / len(among))
    levels = create_source(config).levels
    assert levels["chance"] == pytest.approx(1 / len(known))
    error = 5 * np.std(rates) / len(rates) ** 0.5
    assert np.mean(rates) == pytest.approx(levels.get("plateau", 1.0), abs=error + 1e-9)


def test_the_sizes_follow_the_length():
    assert [hops(length) for length in (256, 512, 1_024, 4_096)] == [2, 3, 4, 4]
    assert [niah("niah_multiquery", length)["n_queries"] for length in (256, 512)] == [2, 4]
    assert niah("niah_multikey_2", 256)["n_needles"] == 27  # of nine tokens each, and eight for question and answer
    assert niah("niah_multikey_3", 1_024)["n_needles"] == 14
    assert niah("niah_multikey_2", 8_192)["n_needles"] == 512
    assert counts("cwe", 256) == ([42, 35, 28] + [7] * 17, 0, 3)
    for length, least, unit in ((512, 5, 7), (1_024, 6, 6), (2_048, 6, 13), (4_096, 10, 20)):
        often, first, last = counts("cwe", length)
        assert often == [unit * (least + last - 1 - rank) for rank in range(last)] + [unit] * (len(often) - last)
        assert (first, last, len(often)) == ((0, 5, 40) if length == 512 else (0, 10, 60))
    often, first, last = counts("fwe", 256)
    assert (often[:5], first, last) == ([174, 38, 17, 9, 6], 1, 4)  # 253 words, the first what is left
    for length in range(128, 2_000):
        for family in ("cwe", "fwe"):
            often, first, last = counts(family, length)
            asked = often[first : last + 1]
            assert sorted(set(asked), reverse=True) == asked
            used = sum(often) + last - first
            assert used <= length if family == "cwe" else used == length


@pytest.mark.parametrize("family", ["cwe", "fwe"])
def test_words_are_as_frequent_as_stated(family):
    often, _, _ = counts(family, 256)
    inputs, _, _, _ = generate(5, Draws("words"), family=family, seq_len=256, chains=1)
    for tokens in inputs.tolist():
        seen = Counter(tokens[: tokens.index(2)])
        padding = seen.pop(0, 0)
        assert sorted(seen.values(), reverse=True) == often
        assert tokens[:padding] == [0] * padding


def test_settings_that_cannot_work_are_one_clear_line():
    with pytest.raises(ConfigError, match="did you mean 'niah_single_1'"):
        RulerConfig(family="niah_single1")
    with pytest.raises(ConfigError, match=r"data\.seq_len=100 is not valid: expected at least 128"):
        RulerConfig(seq_len=100)
    with pytest.raises(ConfigError, match="at least 256"):
        RulerConfig(family="niah_multikey_3", seq_len=200)
