"""Parity and word problems: the groups, what an example is, and what keeps the splits apart."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels.errors import ConfigError
from zoo.train.data import SPLITS, DataModule, ParityConfig, WordConfig, create_source
from zoo.train.data.state_tracking import FORMAT, GROUPS, elements, generate, table

ORDERS = {"z2": 2, "z60": 60, "a4z5": 60, "a5": 60, "s5": 120}


def matrix(permutation):
    """The matrix that moves unit vector i to unit vector permutation[i]."""
    moved = np.zeros((len(permutation), len(permutation)), dtype=int)
    moved[list(permutation), range(len(permutation))] = 1
    return moved


def solve(group, words):
    """Labels from the inputs alone, as products of permutation matrices; nothing but the listing is shared."""
    listing = {matrix(p).tobytes(): i for i, p in enumerate(elements(group))}
    matrices = [matrix(p) for p in elements(group)]
    for word in words:
        product, labels = np.eye(len(matrices[0]), dtype=int), []
        for token in word:
            product = product @ matrices[token]
            labels.append(listing[product.tobytes()])
        yield labels


def test_the_elements_of_a5_stand_in_lexicographic_order():
    assert elements("a5")[:8] == (
        (0, 1, 2, 3, 4),
        (0, 1, 3, 4, 2),
        (0, 1, 4, 2, 3),
        (0, 2, 1, 4, 3),
        (0, 2, 3, 1, 4),
        (0, 2, 4, 3, 1),
        (0, 3, 1, 2, 4),
        (0, 3, 2, 4, 1),
    )
    assert elements("a5")[-1] == (4, 3, 2, 1, 0)


def test_products_by_hand():
    # p = (0 1 3 4 2), q = (0 2 1 4 3): p q = (p[0] p[2] p[1] p[4] p[3]) = (0 3 1 2 4), q p = (0 2 4 3 1).
    products = table("a5")
    assert (products[1, 1], products[1, 3], products[3, 1]) == (2, 6, 5)
    assert products[products[1, 3], 1] == 7
    assert table("s5")[1, 1] == 0  # a swap, twice
    assert table("z60")[59, 2] == 1
    assert table("a4z5")[5 * 3 + 4, 5 * 3 + 2] == 5 * 0 + 1  # (1 0 3 2) twice, and 4 + 2 mod 5
    np.testing.assert_array_equal(table("z2"), [[0, 1], [1, 0]])


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_groups(group):
    products, size = table(group), ORDERS[group]
    assert products.shape == (size, size)
    np.testing.assert_array_equal(products[0], np.arange(size))
    np.testing.assert_array_equal(products[:, 0], np.arange(size))
    for line in (*products, *products.T):  # every equation a x = b has one solution
        assert sorted(line) == list(range(size))
    a, b, c = np.random.default_rng(0).integers(size, size=(3, 500))
    np.testing.assert_array_equal(products[products[a, b], c], products[a, products[b, c]])


@pytest.mark.parametrize(
    ("group", "sizes"), [("z60", [60, 1]), ("a4z5", [60, 4, 1]), ("a5", [60, 60]), ("s5", [120, 60, 60])]
)
def test_a5_and_s5_are_the_ones_that_are_not_solvable(group, sizes):
    """Orders of the derived series: the group, what its commutators generate, and so on."""
    products = table(group)
    inverse = np.argmin(products, axis=1)  # the place of the identity
    current, orders = set(range(len(products))), []
    for _ in sizes:
        orders.append(len(current))
        commutators = {
            int(products[products[a, b], products[inverse[a], inverse[b]]])
            for a, b in itertools.product(current, current)
        }
        while len(larger := {int(products[a, b]) for a in commutators for b in commutators}) > len(commutators):
            commutators = larger
        current = commutators
    assert orders == sizes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("partition", [False, True])
def test_a_solver_that_multiplies_matrices_finds_every_label(group, partition):
    inputs, targets = generate(group, 1_000, 20, "test", 3, partition)
    assert inputs.shape == targets.shape == (1_000, 20)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0
    assert inputs.max() < ORDERS[group]
    np.testing.assert_array_equal(list(solve(group, inputs)), targets)


def test_parity_by_hand_and_by_counting():
    inputs, targets = generate("z2", 1_000, 40, "train", 0, False)
    np.testing.assert_array_equal(targets, inputs.cumsum(1) % 2)
    assert list(solve("z2", [[1, 1, 0, 1, 0, 0, 1]])) == [[1, 0, 0, 1, 1, 1, 0]]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(GROUPS)),
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(SPLITS),
    st.integers(0, 2**64),
)
def test_any_size(group, num_examples, seq_len, split, seed):
    inputs, targets = generate(group, num_examples, seq_len, split, seed, False)
    assert inputs.shape == (num_examples, seq_len)
    np.testing.assert_array_equal(list(solve(group, inputs)), targets)


@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize("group", ["z2", "a5"])
def test_tokens_and_labels_are_uniform_at_every_position(group, partition):
    size = ORDERS[group]
    for drawn in generate(group, 300 * size * 5, 12, "train", 1, partition):
        for column in drawn.T:
            # 1,500 of each expected: five deviations are 13 %
            np.testing.assert_allclose(np.bincount(column, minlength=size) / len(drawn) * size, 1, atol=0.13)


def test_neighbouring_tokens_are_independent():
    inputs, _ = generate("z2", 4_000, 20, "train", 1, True)
    centred = 2.0 * inputs - 1
    for distance in (1, 2, 5):
        products = centred[:, distance:] * centred[:, :-distance]
        assert abs(products.mean()) < 5 / np.sqrt(products.size)


def test_examples_of_this_format_are_pinned():
    # The cache is found by FORMAT: when this hash has to change, FORMAT has to change with it.
    arrays = [array for split in SPLITS for array in generate("a5", 100, 12, split, 7, True)]
    hashed = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert (FORMAT, hashed[:16]) == (1, "78204f1b8a283bd9")


def test_splits_and_seeds_have_streams_of_their_own():
    one, other = (generate("a5", 50, 12, split, 7, False)[0] for split in ("validation", "test"))
    assert not (one == other).all(1).any()
    assert not (one == generate("a5", 50, 12, "validation", 8, False)[0]).all(1).any()
    np.testing.assert_array_equal(one, generate("a5", 50, 12, "validation", 7, False)[0])


def test_no_global_random_state_is_read_or_moved():
    before = np.random.get_state()[1].copy()  # noqa: NPY002  numpy's global generator is what must stay still
    generate("a5", 50, 8, "train", 1, True)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def _rows(source, split):
    return {
        row.tobytes() for part in source.load(split) for row in part.with_format("numpy")[:]["inputs"].astype(np.int64)
    }


@pytest.mark.parametrize(
    "config",
    [
        ParityConfig(num_examples=20_000),
        # As many draws as there are sequences: without a partition most of the test would have been seen.
        ParityConfig(lengths=[10, 12], test_lengths=[12, 10], num_examples=5_000),
        WordConfig(lengths=[2, 3], test_lengths=[2, 5], num_examples=5_000),
    ],
    ids=["parity", "short parity", "short words"],
)
def test_the_three_splits_share_no_example(config):
    source = create_source(config)
    rows = {split: _rows(source, split) for split in SPLITS}
    for split, other in itertools.combinations(SPLITS, 2):
        assert not rows[split] & rows[other]


def test_the_shares_of_the_splits():
    words = np.array(list(itertools.product(range(2), repeat=14)))
    seen = {split: {row.tobytes() for row in generate("z2", 200_000, 14, split, 0, True)[0]} for split in SPLITS}
    assert sum(map(len, seen.values())) == len(words)  # every sequence belongs to a split
    assert len(seen["train"]) / len(words) == pytest.approx(0.8, abs=0.015)
    assert len(seen["validation"]) / len(words) == pytest.approx(0.1, abs=0.012)


def test_a_length_that_is_only_trained_on_has_all_sequences():
    source = create_source(WordConfig(lengths=[2], test_lengths=[4], num_examples=60_000))
    assert len(_rows(source, "train")) == 3_600


def test_chance_and_plateau_are_as_stated():
    source = create_source(WordConfig(test_lengths=[4, 10], test_examples=4_000))
    guess, right, chance, labels = np.random.default_rng(0), 0, 0, 0
    for part in source.load("test"):
        targets = part.with_format("numpy")[:]["targets"]
        guesses = guess.integers(60, size=targets.shape)
        chance += (guesses == targets).sum()
        guesses[:, :2] = targets[:, :2]
        right += (guesses == targets).sum()
        labels += targets.size
    assert chance / labels == pytest.approx(source.levels["chance"], abs=0.004)
    assert right / labels == pytest.approx(source.levels["plateau"], abs=0.005)
    assert create_source(ParityConfig()).levels["chance"] == 0.5


def test_loaded_rows_are_the_generated_ones():
    config = WordConfig(group="s5", lengths=[3, 8], test_lengths=[8, 16], num_examples=20, test_examples=5, data_seed=9)
    source = create_source(config)
    for split, parts in (("train", [(3, False), (8, True)]), ("test", [(8, True), (16, True)])):
        for loaded, (seq_len, partition) in zip(source.load(split), parts, strict=True):
            inputs, targets = generate("s5", 20 if split == "train" else 5, seq_len, split, 9, partition)
            rows = loaded.with_format("numpy")[:]
            np.testing.assert_array_equal(rows["inputs"], inputs)
            np.testing.assert_array_equal(rows["targets"], targets)
            assert set(rows["slice_seq_len"].tolist()) == {seq_len}


def test_what_the_trainer_is_told():
    parity, word = create_source(ParityConfig(test_lengths=[64, 40])), create_source(WordConfig(group="s5"))
    assert (parity.name, parity.vocab_size, parity.slice_values) == ("parity", 2, {"seq_len": [40, 64]})
    assert (word.name, word.vocab_size, word.slice_values) == ("word", 120, {"seq_len": [8, 12, 16, 32]})
    assert word.facts() == {"group": "s5", "lengths": "2 4 8 12", "data_seed": 0}
    assert parity.unit is parity.codec is parity.bytes_per_label("test") is None
    assert (word.batch_size, word.eval_batch_size, word.shuffle) == (64, 256, True)


def test_without_a_number_every_training_example_is_seen_once():
    config = ParityConfig(lengths=[4, 5, 6], test_lengths=[20])
    parts = create_source(config).load("train")
    recipe = create_source(config).recipe
    assert {len(part) for part in parts} == {-(-recipe.max_steps // 3) * 64}


def test_batches_of_one_length_each():
    config = WordConfig(
        lengths=[4, 6], num_examples=10, test_lengths=[8, 12], test_examples=3, batch_size=5, eval_batch_size=2
    )
    data = DataModule(config, seed=0)
    stream = data.train_dataloader()
    lengths = []
    for i in range(4):
        batch = stream.batch(i)
        lengths.append(batch["inputs"].shape[1])
        assert batch["slices"]["seq_len"].tolist() == [lengths[-1]] * 5
    assert sorted(lengths) == [4, 4, 6, 6]
    assert [tuple(batch["inputs"].shape) for batch in data.test_dataloader()] == [(2, 8), (1, 8), (2, 12), (1, 12)]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (WordConfig, {"group": "a6"}, "did you mean 'a5'"),
        (WordConfig, {"group": "z2"}, "data.group"),
        (WordConfig, {"lengths": []}, "different numbers, each at least 1"),
        (ParityConfig, {"test_lengths": [8, 8]}, "different numbers"),
        (ParityConfig, {"lengths": [0]}, "each at least 1"),
        (ParityConfig, {"test_lengths": [40, 9]}, "only 512 sequences have 9 tokens"),
        (ParityConfig, {"lengths": 8}, "a list"),
        (ParityConfig, {"data_seed": -1}, "at least 0"),
        (ParityConfig, {"num_examples": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line(config, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(**arguments)
    assert "data." in str(caught.value)
    assert "\n" not in str(caught.value)
