"""Metrics against a plain computation by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.train.data.stream import IGNORE
from zoo.train.metrics import TokenMetrics


def one_hot_logits(predictions: list[list[int]], vocab: int) -> torch.Tensor:
    return 9.0 * F.one_hot(torch.tensor(predictions), vocab).float()


@pytest.fixture
def batch():
    """Three examples: all right, half right, no label."""
    targets = torch.tensor([[IGNORE, 1, 2], [3, 0, IGNORE], [IGNORE] * 3])
    logits = one_hot_logits([[0, 1, 2], [3, 1, 0], [0, 0, 0]], 4)
    return logits, targets, {"depth": torch.tensor([1, 2, 2])}


def test_values_by_hand(batch):
    logits, targets, _ = batch
    metric = TokenMetrics()
    metric.update(logits, targets)
    result = metric.compute()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert result["acc"] == 3 / 4
    assert result["exact"] == 1 / 2
    assert result["loss"] == pytest.approx(loss)
    assert result["perplexity"] == pytest.approx(math.exp(loss))
    assert "bits_per_byte" not in result


def test_slices_count_their_own_examples_only(batch):
    metric = TokenMetrics({"depth": [1, 2, 3]})
    metric.update(*batch)
    result = metric.compute()
    assert (result["acc/depth=1"], result["acc/depth=2"]) == (1.0, 0.5)
    assert (result["exact/depth=1"], result["exact/depth=2"]) == (1.0, 0.0)
    assert not any("depth=3" in name for name in result)


def test_joint_slices_count_examples_that_are_in_all_of_them(batch):
    logits, targets, slices = batch
    metric = TokenMetrics({"depth": [1, 2], "length": [8, 9]}, joint=[("length", "depth")])
    metric.update(logits, targets, slices | {"length": torch.tensor([8, 8, 9])})
    result = metric.compute()
    alone = TokenMetrics()
    alone.update(logits[1:2], targets[1:2])
    assert result["loss/length=8,depth=2"] == alone.compute()["loss"]
    assert result["acc/length=8,depth=1"] == result["acc/depth=1"]
    assert "acc/length=9,depth=1" not in result


def test_batches_add_up_as_one(batch):
    logits, targets, slices = batch
    whole, parts = TokenMetrics({"depth": [1, 2]}), TokenMetrics({"depth": [1, 2]})
    whole.update(logits, targets, slices)
    for rows in (slice(0, 1), slice(1, 3)):
        parts.update(logits[rows], targets[rows], {"depth": slices["depth"][rows]})
    assert parts.compute() == pytest.approx(whole.compute())


def test_processes_add_up_as_one(batch):
    """What torchmetrics does between processes: states are summed."""
    logits, targets, slices = batch
    whole = TokenMetrics({"depth": [1, 2]})
    whole.update(logits, targets, slices)
    gathered = TokenMetrics({"depth": [1, 2]})
    for rows in (slice(0, 2), slice(2, 3)):
        rank = TokenMetrics({"depth": [1, 2]})
        rank.update(logits[rows], targets[rows], {"depth": slices["depth"][rows]})
        gathered.sums += rank._reductions["sums"](rank.sums[None])
    gathered._update_count = 1
    assert gathered.compute() == pytest.approx(whole.compute())


@pytest.mark.parametrize(("bytes_per_label", "expected"), [(1.0, 8.0), (4.0, 2.0)])
def test_bits_per_byte_of_a_uniform_guess(bytes_per_label, expected):
    metric = TokenMetrics(bytes_per_label=bytes_per_label)
    metric.update(torch.zeros(2, 5, 256), torch.zeros(2, 5, dtype=torch.int64))
    assert metric.compute()["bits_per_byte"] == pytest.approx(expected)


def test_reset_forgets(batch):
    metric = TokenMetrics({"depth": [1, 2]})
    metric.update(*batch)
    metric.reset()
    metric.update(batch[0][:1], batch[1][:1], {"depth": batch[2]["depth"][:1]})
    assert metric.compute()["acc"] == 1.0


def test_a_hopeless_loss_is_an_infinite_perplexity():
    metric = TokenMetrics()
    metric.update(torch.tensor([[[0.0, 2_000.0]]]), torch.tensor([[0]]))
    assert metric.compute()["perplexity"] == math.inf
