# ruff: noqa: NPY002  (the published examples come from numpy's legacy generator)
"""MQAR: equality with the published algorithm, what an example is, and the presets."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels.errors import ConfigError
from zoo.train.data import SPLITS, DataModule, MQARConfig, create_source
from zoo.train.data.mqar_examples import FORMAT, generate, generate_apart


def published(num_examples, seq_len, num_pairs, vocab_size, seed, power_a=0.01):
    """The algorithm as tasks describe it, step by step on numpy's global generator, nothing shared with the zoo."""
    state = np.random.get_state()
    np.random.seed(seed)
    keys = [np.random.choice(np.arange(1, vocab_size // 2), size=num_pairs, replace=False) for _ in range(num_examples)]
    values = [
        np.random.choice(np.arange(vocab_size // 2, vocab_size), size=num_pairs, replace=False)
        for _ in range(num_examples)
    ]
    space = (seq_len - 2 * num_pairs) // 2
    p = power_a * np.arange(1, space + 1) ** (power_a - 1)
    p = p / p.sum()
    gaps = [np.random.choice(np.arange(space), size=num_pairs, replace=False, p=p) for _ in range(num_examples)]
    np.random.set_state(state)
    examples = np.zeros((num_examples, seq_len + 1), dtype=np.int64)
    labels = np.full((num_examples, seq_len + 1), -100, dtype=np.int64)
    for n in range(num_examples):
        for j in range(num_pairs):
            examples[n, 2 * j], examples[n, 2 * j + 1] = keys[n][j], values[n][j]
            query = 2 * num_pairs + 2 * gaps[n][j]
            examples[n, query] = keys[n][j]
            labels[n, query + 1] = values[n][j]
    return examples[:, :-1], labels[:, 1:]


@pytest.mark.parametrize(
    ("num_examples", "seq_len", "num_pairs", "vocab_size", "seed", "power_a"),
    [
        (500, 32, 4, 64, 123, 0.01),
        (200, 64, 4, 8192, 0, 0.01),
        (50, 512, 64, 8192, 2**32 - 1, 0.01),
        (20, 1024, 256, 8192, 7, 0.01),
        (100, 64, 16, 65, 1, 0.01),  # as many pairs as fit; an odd vocabulary
        (100, 66, 3, 300, 5, 1.0),
        (100, 40, 2, 41, 5, 2.5),
        (50, 64, 16, 34, 2, 0.01),  # as few tokens as can be
        (1, 4, 1, 4, 9, 0.01),
    ],
)
def test_equals_the_published_algorithm_bit_for_bit(num_examples, seq_len, num_pairs, vocab_size, seed, power_a):
    inputs, targets = generate(num_examples, seq_len, num_pairs, vocab_size, seed, power_a)
    expected_inputs, expected_targets = published(num_examples, seq_len, num_pairs, vocab_size, seed, power_a)
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs, expected_inputs)
    np.testing.assert_array_equal(targets, expected_targets)


def test_examples_of_this_format_are_pinned():
    # The cache is found by FORMAT: when this hash has to change, FORMAT has to change with it.
    arrays = generate(100, 32, 4, 64, 123, random_fillers=True)
    hashed = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert (FORMAT, hashed[:16]) == (1, "e8315a1aa3d3180b")
    few = generate_apart("test", 50, 7, seq_len=8, num_pairs=2, vocab_size=16)
    assert hashlib.sha256(b"".join(array.tobytes() for array in few)).hexdigest()[:16] == "2de6b54f70e0cbb4"
    again = generate_apart("test", 20, 7, seq_len=8, num_pairs=2, vocab_size=16)
    np.testing.assert_array_equal(again[0], few[0][:20])


@pytest.mark.parametrize("random_fillers", [False, True])
def test_a_dictionary_that_reads_only_the_past_solves_it(random_fillers):
    num_pairs = 8
    inputs, targets = generate(1_000, 64, num_pairs, 128, 3, random_fillers=random_fillers)
    for row, labels in zip(inputs.tolist(), targets.tolist(), strict=True):
        seen: dict[int, int] = {}
        for i, (token, label) in enumerate(zip(row, labels, strict=True)):
            if i < 2 * num_pairs and i % 2:
                seen[row[i - 1]] = token
            if label != -100:
                assert seen[token] == label
        assert sum(label != -100 for label in labels) == num_pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 200), st.integers(0, 2**32 - 1), st.booleans())
def test_every_example_is_well_formed(num_pairs, extra, spare, seed, random_fillers):
    seq_len = 4 * num_pairs + 2 * extra
    vocab_size = 2 * num_pairs + 2 + spare
    inputs, targets = generate(5, seq_len, num_pairs, vocab_size, seed, random_fillers=random_fillers)
    assert inputs.min() >= 0
    assert inputs.max() < vocab_size
    context = inputs[:, : 2 * num_pairs]
    for row, labels, pairs in zip(inputs, targets, context, strict=True):
        keys, values = pairs[0::2], pairs[1::2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert 1 <= keys.min() <= keys.max() < vocab_size // 2 <= values.min()
        (queries,) = np.nonzero(labels != -100)
        assert queries.min() >= 2 * num_pairs
        assert (queries % 2 == 0).all()
        assert dict(zip(row[queries], labels[queries], strict=True)) == dict(zip(keys, values, strict=True))


def test_no_global_random_state_is_read_or_moved():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = generate(50, 32, 4, 64, 1, random_fillers=True)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(99)
    np.random.seed(99)
    for a, b in zip(first, generate(50, 32, 4, 64, 1, random_fillers=True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_fillers_replace_the_zeros_and_nothing_else():
    plain, targets = generate(2_000, 32, 4, 64, 5)
    filled, filled_targets = generate(2_000, 32, 4, 64, 5, random_fillers=True)
    np.testing.assert_array_equal(filled_targets, targets)
    np.testing.assert_array_equal(filled[plain != 0], plain[plain != 0])
    fillers = filled[plain == 0]
    share = np.bincount(fillers, minlength=64) / len(fillers)
    assert len(fillers) == 2_000 * (32 - 3 * 4)
    np.testing.assert_allclose(share, 1 / 64, rtol=0.2)  # 625 of each expected, five deviations
    other, _ = generate(2_000, 32, 4, 64, 6, random_fillers=True)
    assert (other != filled).any()


def test_early_query_slots_are_as_likely_as_stated():
    # The first pair's slot is drawn first: it is slot 0 with probability .25 at (64, 4), .18 at (256, 16).
    for seq_len, num_pairs, stated in ((64, 4, 0.25), (256, 16, 0.18)):
        inputs, _ = generate(6_000, seq_len, num_pairs, 512, 1)
        assert np.mean(inputs[:, 2 * num_pairs] == inputs[:, 0]) == pytest.approx(stated, abs=0.015)


def test_chance_and_plateau_are_as_stated():
    source = create_source(MQARConfig())
    inputs, targets = generate(5_000, 32, 4, source.vocab_size, 0)
    labelled = targets != -100
    guess = np.random.default_rng(0)
    anything = guess.integers(source.vocab_size, size=targets.shape)
    some_value = np.take_along_axis(inputs, 1 + 2 * guess.integers(4, size=targets.shape), axis=1)
    assert np.mean(anything[labelled] == targets[labelled]) == pytest.approx(source.levels["chance"], abs=0.005)
    assert np.mean(some_value[labelled] == targets[labelled]) == pytest.approx(source.levels["plateau"], abs=0.02)


def test_the_three_splits_share_no_example():
    source = create_source(MQARConfig(num_examples=10_000))
    rows = {split: {row.tobytes() for table in source.load(split) for row in _inputs(table)} for split in SPLITS}
    assert len(rows["train"]) > 25_000  # three segments; the shortest sequences meet now and then
    assert (len(rows["validation"]), len(rows["test"])) == (512, 2_048)
    for split, other in itertools.combinations(SPLITS, 2):
        assert not rows[split] & rows[other]


@pytest.mark.parametrize(("seq_len", "num_pairs", "vocab_size"), [(8, 1, 8), (8, 2, 16)])
def test_the_splits_of_small_shapes_share_no_example(seq_len, num_pairs, vocab_size):
    shape = {"seq_len": seq_len, "num_pairs": num_pairs, "vocab_size": vocab_size}
    source = create_source(MQARConfig(**shape, num_examples=2_000, validation_examples=100, test_examples=100))
    rows = {split: _inputs(source.load(split)[0]) for split in SPLITS}
    assert [len(rows[split]) for split in SPLITS] == [2_000, 100, 100]
    different = {split: {row.tobytes() for row in rows[split]} for split in SPLITS}
    for split, other in itertools.combinations(SPLITS, 2):
        assert not different[split] & different[other]
    assert len(different["train"]) > 3 * len(different["test"])
    for row, labels in zip(rows["test"], source.load("test")[0].with_format("numpy")["targets"], strict=True):
        facts = dict(zip(row[: 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2], strict=True))
        assert [facts[key] for key in row[labels != -100]] == labels[labels != -100].tolist()


def test_a_shape_with_too_few_examples_for_all_splits_is_one_clear_line():
    source = create_source(MQARConfig(seq_len=4, num_pairs=1, vocab_size=4, num_examples=9))  # of two examples
    with pytest.raises(ConfigError, match=r"too few different examples of data.seq_len=4 data.num_pairs=1"):
        [source.load(split) for split in SPLITS]


def test_the_test_may_have_other_lengths_and_pairs():
    config = MQARConfig(num_examples=50, test_examples=6, test_lengths=[32, 64, 64], test_pairs=[4, 4, 16])
    plain, source = MQARConfig(num_examples=50), create_source(config)
    assert [segment.shape for segment in config.segments("test")] == [(32, 4), (64, 4), (64, 16)]
    assert [segment.shape for segment in MQARConfig(test_lengths=[128]).segments("test")] == [(128, 4)]
    assert source.slice_values == {"seq_len": [32, 64], "num_pairs": [4, 16]}
    assert source.levels["plateau"] == pytest.approx(3 / 24)
    for split in ("train", "validation"):
        assert (config.segments(split), config.seeds(split)) == (plain.segments(split), plain.seeds(split))
    assert not set(config.seeds("test")) & set(plain.seeds("test") + plain.seeds("validation"))
    for table, segment, seed in zip(source.load("test"), config.segments("test"), config.seeds("test"), strict=True):
        np.testing.assert_array_equal(_inputs(table), generate(6, *segment.shape, 64, seed)[0])


def _inputs(table) -> np.ndarray:
    return table.with_format("numpy")[:]["inputs"]


def test_segment_seeds_are_the_published_ones():
    config = MQARConfig(preset="based_recall")
    state = np.random.get_state()
    np.random.seed(123)
    train = np.random.randint(0, 2**31, size=5)
    test = np.random.randint(2**31, 2**32, size=7)
    np.random.set_state(state)
    assert config.seeds("train") == train.tolist()
    assert config.seeds("test") == test.tolist()
    assert len(config.seeds("validation")) == 7
    assert not set(config.seeds("validation")) & set(test.tolist())


def test_loaded_rows_are_the_generated_ones():
    config = MQARConfig(preset="based_recall", num_examples=20, validation_examples=3, test_examples=5)
    source = create_source(config)
    tables = source.load("train")
    shapes = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    assert [table.with_format("numpy")[0]["slice_seq_len"] for table in tables] == [length for length, _ in shapes]
    for table, (seq_len, num_pairs), seed in zip(tables, shapes, config.seeds("train"), strict=True):
        inputs, targets = generate(20, seq_len, num_pairs, 8_192, seed, random_fillers=True)
        rows = table.with_format("numpy")[:]
        np.testing.assert_array_equal(rows["inputs"], inputs)
        np.testing.assert_array_equal(rows["targets"], targets)


def test_presets():
    based = create_source(MQARConfig(preset="based_recall"))
    assert (based.batch_size, based.eval_batch_size, based.shuffle, based.vocab_size) == (256, 32, False, 8_192)
    assert based.slice_values == {
        "seq_len": [64, 128, 256, 512, 1_024],
        "num_pairs": [4, 8, 16, 32, 64, 128, 256],
    }
    assert based.config.base.random_fillers
    for seq_len, num_pairs, batch_size in ((None, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)):
        figure = create_source(MQARConfig(preset="zoology_fig2", seq_len=seq_len))
        assert [(s.num_pairs, s.num_examples) for s in figure.config.segments("train")] == [(num_pairs, 100_000)]
        assert [(s.num_pairs, s.num_examples) for s in figure.config.segments("test")] == [(num_pairs, 3_000)]
        assert (figure.batch_size, figure.eval_batch_size) == (batch_size, batch_size)
        assert not figure.config.base.random_fillers
    nano = create_source(MQARConfig())
    assert {(s.seq_len, s.num_pairs) for s in nano.config.segments("validation") + nano.config.segments("test")} == {
        (32, 4)
    }
    assert (nano.vocab_size, nano.batch_size, nano.shuffle) == (64, 64, True)
    assert nano.slice_values == {"seq_len": [32], "num_pairs": [4]}
    assert nano.unit is None
    assert nano.codec is None
    assert nano.bytes_per_label("test") is None


def test_every_setting_of_a_preset_can_be_replaced():
    config = MQARConfig(
        seq_len=64,
        num_pairs=8,
        vocab_size=100,
        num_examples=70,
        validation_examples=6,
        test_examples=7,
        batch_size=10,
        eval_batch_size=4,
        shuffle=False,
        power_a=1.0,
        random_fillers=True,
        data_seed=5,
    )
    data = DataModule(config, seed=0)
    inputs, targets = generate(70, 64, 8, 100, config.seeds("train")[0], power_a=1.0, random_fillers=True)
    batch = data.train_dataloader().batch(0)
    np.testing.assert_array_equal(batch["inputs"], inputs[:10])
    np.testing.assert_array_equal(batch["targets"], targets[:10])
    assert [len(batch["inputs"]) for batch in data.val_dataloader()] == [4, 2]
    assert [len(batch["inputs"]) for batch in data.test_dataloader()] == [4, 3]
    assert batch["slices"]["num_pairs"].tolist() == [8] * 10
    assert config.seeds("train") != MQARConfig(seq_len=64).seeds("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "nanno"}, "did you mean 'nano'"),
        ({"seq_len": 33, "num_pairs": 4}, "even"),
        ({"seq_len": 14, "num_pairs": 4}, "at least 16"),
        ({"num_pairs": 9}, "at least 36"),
        ({"vocab_size": 9}, "at least 10"),
        ({"seq_len": 128}, "give data.num_pairs"),
        ({"preset": "zoology_fig2", "seq_len": 32}, "64 with 4 pairs"),
        ({"power_a": 0.0}, "more than 0"),
        ({"data_seed": -1}, "at least 0"),
        ({"num_examples": 0}, "at least 1"),
        ({"test_lengths": []}, "at least one length"),
        ({"test_lengths": [64], "test_pairs": [4, 8]}, "one number for each"),
        ({"test_pairs": [4]}, "one number for each"),
        ({"test_lengths": [64, 8]}, "too short"),
        ({"test_lengths": [8], "test_pairs": [2]}, "8 tokens with 2 pairs in training"),
        ({"seq_len": "abc"}, "an integer"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MQARConfig(**settings)
    assert "data." in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [(0, 32, 4, 64, 1), (5, 31, 4, 64, 1), (5, 32, 0, 64, 1), (5, 32, 4, 9, 1), (5, 32, 4, 64, -1)]
)
def test_generate_refuses_sizes_that_cannot_work(arguments):
    with pytest.raises(ConfigError):
        generate(*arguments)
