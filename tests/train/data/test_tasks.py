"""Every generated task: what its rows are, that a solver which reads only the past finds each label, and its streams.

The solvers are in `solvers.py`; a task that is registered without one fails here.
"""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.kernels.errors import ConfigError
from zoo.train.data import IGNORE, SPLITS, DataModule, create_source, get_data, list_data
from zoo.train.data.draws import Draws
from zoo.train.data.synthetic import Synthetic, examples

from .solvers import PINNED, TASKS, answer

NAMES = [name for name in list_data() if issubclass(get_data(name).source, Synthetic)]


def source_of(task, **values):
    return create_source(get_data(task).config(**values))


def rows(source, split, count, table=0, data_seed=0):
    """The first rows of a table without the datasets cache: inputs, targets and slices."""
    arguments = source.arguments(split)[table]
    blocks = list(examples(source.name, split, count, data_seed, **arguments))
    slices = {name: np.concatenate([block.slices[name] for block in blocks]) for name in blocks[0].slices}
    return np.concatenate([b.inputs for b in blocks]), np.concatenate([b.targets for b in blocks]), slices


@pytest.mark.parametrize("task", NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_solver_that_reads_only_the_past_finds_every_label(task, data):
    source = source_of(task, **({"test_lengths": None} | data.draw(TASKS[task].settings)))
    for table, arguments in enumerate(source.arguments("test")):
        inputs, targets, slices = rows(source, "test", 20, table)
        assert inputs.shape == targets.shape == (20, inputs.shape[1])
        assert inputs.dtype == targets.dtype == np.int64
        assert inputs.min() >= 0
        assert max(inputs.max(), targets.max()) < source.vocab_size
        assert ((targets >= 0) | (targets == IGNORE)).all()
        assert (targets != IGNORE).any(1).all()
        for tokens, labels in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert answer(TASKS[task].solve(**arguments), tokens) == labels
        for name, allowed in source.slice_values.items():
            assert set(slices.get(name, [arguments.get(name)])) <= set(allowed), name


@pytest.mark.parametrize("task", NAMES)
def test_examples_of_this_format_are_pinned(task):
    # In every process the same. The cache is found by the formats: when a hash has to change, one of them has to.
    total = hashlib.sha256()
    for split in SPLITS:
        source = source_of(task)
        for table in range(len(source.arguments(split))):
            for array in rows(source, split, 20, table)[:2]:
                total.update(array.tobytes())
    assert total.hexdigest()[:16] == PINNED[task]


@pytest.mark.parametrize("task", NAMES)
def test_splits_and_seeds_have_rows_of_their_own(task):
    source = source_of(task)
    counts = {"train": 2_000, "validation": 200, "test": 200}
    seen = {split: {row.tobytes() for row in rows(source, split, count)[0]} for split, count in counts.items()}
    for split, other in itertools.combinations(SPLITS, 2):
        assert not seen[split] & seen[other]
    first, other = (rows(source, "test", 50, data_seed=seed)[0] for seed in (0, 1))
    assert (first != other).any()


@pytest.mark.parametrize("task", NAMES)
def test_the_first_rows_do_not_depend_on_how_many_there_are(task):
    source = source_of(task)
    for few, many in zip(rows(source, "train", 7)[:2], rows(source, "train", 300)[:2], strict=True):
        np.testing.assert_array_equal(few, many[:7])


@pytest.mark.parametrize("task", NAMES)
def test_chance_and_plateau_are_as_stated(task):
    config = get_data(task).config
    source = source_of(task, test_lengths=[config().seq_len], test_examples=1_000)
    inputs, targets, _ = rows(source, "test", 1_000)
    labels = [row[row != IGNORE].tolist() for row in targets]
    known = {label for row in labels for label in row}
    assert source.levels["chance"] == pytest.approx(1 / len(known))
    guesses = TASKS[task].half_right
    assert ("plateau" in source.levels) == (guesses is not None)
    if guesses is not None:
        arguments = source.arguments("test")[0]
        rates, certain = [], True
        for tokens, row in zip(inputs.tolist(), labels, strict=True):
            for among, label in zip(guesses(tokens, **arguments), row, strict=True):
                rates.append(among.count(label) / len(among))
                certain &= len(among) == 1
        # One guess for each label makes a level that was measured on these rows; the others are expectations.
        error = 0 if certain else 5 * np.std(rates) / len(rates) ** 0.5
        assert np.mean(rates) == pytest.approx(source.levels["plateau"], abs=error + 1e-9)


@pytest.mark.parametrize("task", NAMES)
def test_no_global_random_state_is_read_or_moved(task):
    before = np.random.get_state()[1].copy()  # noqa: NPY002  numpy's global generator is what must stay still
    rows(source_of(task), "train", 10)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("task", NAMES)
def test_loaded_rows_are_the_generated_ones_one_table_per_length(task):
    config = get_data(task).config(num_examples=9, validation_examples=4, test_examples=5, batch_size=3)
    data = DataModule(config, seed=0)
    source = data.source
    assert len(source.load("test")) == len(config.lengths("test"))
    for split, count in zip(SPLITS, (9, 4, 5), strict=True):
        for table, loaded in enumerate(source.load(split)):
            inputs, targets, slices = rows(source, split, count, table)
            found = loaded.with_format("numpy")[:]
            np.testing.assert_array_equal(found["inputs"], inputs)
            np.testing.assert_array_equal(found["targets"], targets)
            for name in (*source.slice_values, *source.marks):
                expected = slices[name] if name in slices else np.full(count, source.arguments(split)[table][name])
                np.testing.assert_array_equal(found[f"slice_{name}"], expected)
    assert data.train_dataloader().batch(0)["inputs"].shape[0] == 3


WITH_ANSWERS = [
    ("passkey", {"digits": 3}),
    ("needle", {"n_queries": 2, "n_values": 2, "digits": 2}),
    ("induction", {}),
    ("depth_curve", {}),
    ("ruler", {"family": "niah_multikey_3"}),
    ("ruler", {"family": "niah_multiquery", "test_lengths": [256, 512]}),
]


@pytest.mark.parametrize(("task", "values"), WITH_ANSWERS)
def test_each_label_stands_where_its_answer_is_said_to_stand(task, values):
    data = DataModule(get_data(task).config(num_examples=9, test_examples=9, **values), seed=0)
    for batch in data.test_dataloader():
        inputs, targets, positions = batch["inputs"], batch["targets"], data.source.answer_positions(batch)
        labels = targets != IGNORE
        assert ((positions >= 0) == labels).all()
        assert (inputs.gather(1, positions.clamp(min=0))[labels] == targets[labels]).all()
        assert positions[labels].max() < inputs.shape[1] - labels.sum(1).max(), "in the context, not in the question"


def test_all_tasks_that_know_where_their_answers_stand_are_looked_at():
    knowing = {name for name in NAMES if "answers" in source_of(name).marks}
    assert knowing == {name for name, _ in WITH_ANSWERS}


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test_lengths": []}, "different numbers, each at least 1"),
        ({"test_lengths": [64, 64]}, "different numbers"),
        ({"test_lengths": [0]}, "each at least 1"),
        ({"data_seed": -1}, "at least 0"),
        ({"num_examples": 0}, "at least 1"),
    ],
)
def test_common_settings_that_cannot_work_are_one_clear_line(task, values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        get_data(task).config(**values)
    assert str(caught.value).startswith("data.")
    assert "\n" not in str(caught.value)


def test_long_rows_come_in_small_batches():
    assert source_of("passkey", test_lengths=[128]).eval_batch_size == 512
    assert source_of("passkey", test_lengths=[128, 4_096]).eval_batch_size == 16
    assert source_of("passkey", test_lengths=[2**20]).eval_batch_size == 1
    assert source_of("passkey", test_lengths=[2**20], eval_batch_size=7).eval_batch_size == 7


def test_too_few_different_rows_are_one_clear_line():
    # There are two rows, and not every split has one of them.
    tiny = source_of("passkey", seq_len=5, filler_ids=1, key_ids=1, value_ids=2)
    with pytest.raises(ConfigError, match="longer sequences or more tokens to choose from"):
        [rows(tiny, split, 5) for split in SPLITS]


def test_draws_are_uniform_distinct_and_reproducible():
    draws = Draws("a", 1)
    drawn = draws.distinct(6, 30_000, 3)
    assert all(len(set(row)) == 3 for row in drawn[:1_000].tolist())
    for column in drawn.T:
        np.testing.assert_allclose(np.bincount(column, minlength=6) / len(drawn), 1 / 6, atol=0.012)
    pairs = np.bincount(drawn[:, 0] * 6 + drawn[:, 2], minlength=36).reshape(6, 6) / len(drawn)
    np.testing.assert_allclose(pairs + np.eye(6) / 30, 1 / 30, atol=0.006)
    assert np.sort(Draws("b").distinct(5, 100, 5), axis=1).tolist() == [[0, 1, 2, 3, 4]] * 100
    np.testing.assert_array_equal(Draws("a", 1).distinct(6, 30_000, 3), drawn)
    assert (Draws("a", 2).integers(100, 50) != Draws("a", 1).integers(100, 50)).any()
    assert Draws("c").events(0.25, 40_000).mean() == pytest.approx(0.25, abs=0.012)
    allowed = np.tile([True, False, True, True], (30_000, 1))
    shares = np.bincount(Draws("d").one_of(allowed), minlength=4) / 30_000
    np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.014)
