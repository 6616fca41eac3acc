"""The draws of BigBird's random blocks: distinct, even, each for itself, and for ever the same."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.kernels.errors import DataError
from zoo.layers.random_blocks import draw_distinct, transformers_plan

sizes = st.tuples(st.integers(0, 10**9), st.integers(0, 9))  # (row, available)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(sizes, min_size=1, max_size=7), min_size=1, max_size=1),
    n_heads=st.integers(1, 5),
    n_random=st.integers(0, 6),
    seed=st.integers(0, 2**40),
    layer=st.integers(0, 99),
)
def test_draws_are_distinct_in_range_and_each_for_itself(rows, n_heads, n_random, seed, layer) -> None:
    numbers, available = torch.tensor(rows).unbind(-1)
    drawn = draw_distinct(numbers, available, n_heads, n_random, seed, layer)
    assert drawn.shape == (1, n_heads, len(rows[0]), n_random)
    for head, (place, (row, limit)) in itertools.product(range(n_heads), enumerate(rows[0])):
        found = [number for number in drawn[0, head, place].tolist() if number != -1]
        assert len(found) == len(set(found)) == min(limit, n_random)
        assert all(0 <= number < limit for number in found)
        alone = draw_distinct(torch.tensor([[row]]), torch.tensor([[limit]]), head + 1, n_random, seed, layer)
        assert torch.equal(alone[0, head, 0], drawn[0, head, place])


def table(seed: int = 0, layer: int = 0, n_heads: int = 2) -> Tensor:
    rows = torch.arange(50)[None]
    return draw_distinct(rows, torch.full_like(rows, 100), n_heads, 3, seed, layer)[0]


def test_heads_layers_and_seeds_have_draws_of_their_own() -> None:
    tables = [head for seed in (0, 1, 2) for layer in range(4) for head in table(seed, layer, 4)]
    for one, other in itertools.combinations(tables, 2):
        common = (one[:, :, None] == other[:, None]).any(-1).float().mean().item()
        assert common < 0.15, "of 100 numbers, three others have one of three in common 3% of the time"


def squares(counts: Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


# Bounds of chi-square that chance passes once in a thousand times; the draws are fixed, so these tests are too.
def test_all_numbers_are_drawn_as_often() -> None:
    rows = torch.arange(5000)[None]
    drawn = draw_distinct(rows, torch.full_like(rows, 20), 4, 3, seed=1, layer=2)
    # three distinct ones of 20 scatter less than independent ones, by (20 - 3) / (20 - 1)
    assert squares(torch.bincount(drawn.flatten(), minlength=20)) * 19 / 17 < 43.8


def test_all_pairs_are_drawn_as_often() -> None:
    rows = torch.arange(5000)[None]
    first, second = draw_distinct(rows, torch.full_like(rows, 6), 4, 2, seed=3, layer=0).unbind(-1)
    counts = torch.bincount((6 * first + second).flatten(), minlength=36).reshape(6, 6)
    assert squares(counts[torch.ones(6, 6).triu(1).bool()]) < 36.1
    assert counts.sum() == counts.triu(1).sum(), "in ascending order"


@pytest.mark.parametrize("neighbour", ["head", "row", "layer", "seed"])
def test_neighbours_draw_independently(neighbour: str) -> None:
    rows = torch.arange(8001)[None]

    def draws(seed: int = 5, layer: int = 3) -> Tensor:
        return draw_distinct(rows, torch.full_like(rows, 5), 2, 1, seed, layer)[0, :, :, 0]

    here = draws()
    there = {"head": here.flip(0), "row": here.roll(1, 1), "layer": draws(layer=4), "seed": draws(seed=6)}[neighbour]
    assert squares(torch.bincount((5 * here + there)[0, 1:], minlength=25)) < 51.2


def test_the_draws_are_those_of_earlier_versions() -> None:
    """A checkpoint keeps its pattern for ever: these numbers must not change."""
    rows = torch.tensor([[0, 1, 2, 5, 7]])
    assert draw_distinct(rows, 3 * rows, 2, 3, seed=0, layer=0).tolist() == [
        [
            [[-1, -1, -1], [0, 1, 2], [2, 3, 4], [3, 4, 9], [6, 12, 16]],
            [[-1, -1, -1], [0, 1, 2], [0, 2, 3], [6, 11, 14], [12, 17, 18]],
        ]
    ]
    far, many = torch.tensor([[10**6]]), torch.tensor([[999_999]])
    assert draw_distinct(far, many, 2, 3, seed=7, layer=5).flatten(1).tolist() == [
        [243343, 280998, 456340, 163482, 375984, 410251]
    ]


def test_a_plan_that_transformers_cannot_make_either_is_one_line() -> None:
    with pytest.raises(DataError, match="fewer than 1 random blocks of 256: set n_random_blocks or block_size lower"):
        transformers_plan(3072 // 256, 256, 1, 2, 0, 4096 // 256)
