"""Sizing an architecture to a budget."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.eval.compare import budget
from zoo.eval.compare.budget import TOLERANCE, fit, measure, quantity
from zoo.kernels.errors import ConfigError
from zoo.registry import architecture

LENGTH = 32
BASELINE = {"vocab_size": 64}


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(zoo.list_models()), st.sampled_from(["params", "flops"]), st.floats(-1.2, 1.2))
def test_every_architecture_meets_a_budget_near_the_baseline(name, by, scale):
    target = quantity(measure("transformer", BASELINE, LENGTH), by) * 2.0**scale
    found = fit(name, BASELINE, by, target, LENGTH)
    model = zoo.create_model(name, **BASELINE, **found.changes)
    counts = {"params": sum(p.numel() for p in model.parameters()), "flops": model.flops(LENGTH) // LENGTH}
    assert found.reached == counts[by]
    assert abs(counts[by] / target - 1) <= TOLERANCE
    assert model.config.n_layers == architecture(name).config.from_dict(BASELINE, name).n_layers, "the depth is its own"


@pytest.mark.parametrize("name", zoo.list_models())
def test_state_bytes_are_those_of_the_tensors_held(name):
    model = zoo.create_model(name, **BASELINE, d_model=16)
    with torch.no_grad():
        state = model(torch.zeros(1, LENGTH, dtype=torch.int64), model.init_state(1)).state
    held = sum(t.numel() * t.element_size() for t in budget._tensors(state))
    assert measure(name, {**BASELINE, "d_model": 16}, LENGTH).state_bytes == held


@pytest.mark.parametrize(("name", "target"), [("mamba", 40_000), ("transformer", 21_643), ("rwkv4", 9_000)])
def test_state_budgets(name, target):
    found = fit(name, BASELINE, "state", target, LENGTH)
    assert abs(measure(name, {**BASELINE, **found.changes}, LENGTH).state_bytes / target - 1) <= TOLERANCE


def test_settings_that_match_already_stay_as_they_are():
    size = measure("rwkv7", {**BASELINE, "d_model": 64}, LENGTH)
    assert fit("rwkv7", {**BASELINE, "d_model": 64}, "params", size.params, LENGTH).changes == {}


def test_what_is_given_stays():
    found = fit("mamba", {**BASELINE, "d_state": 32}, "params", 300_000, LENGTH)
    assert found.matches
    assert "d_state" not in found.changes
    wide = fit("transformer", {**BASELINE, "d_model": 64}, "params", 150_000, LENGTH)
    assert wide.changes.keys() == {"d_ff"}, "the width is given, so the feed-forward must do it"
    members = {"transformer": {"window": 8}}
    hybrid = fit("hybrid", {**BASELINE, "members": members}, "params", 400_000, LENGTH)
    assert hybrid.changes.get("members", members)["transformer"]["window"] == 8


def test_heads_keep_a_useful_width():
    for target in (137_000, 410_000, 1_100_000):
        config = zoo.create_model(
            "rwkv7", **BASELINE, **fit("rwkv7", BASELINE, "params", target, LENGTH).changes
        ).config
        assert config.d_model % 32 == 0


def test_depth_only_where_nothing_else_will_do():
    given = {**BASELINE, "d_model": 32, "d_state": 16}
    one = measure("mamba", {**given, "n_layers": 1}, LENGTH).params
    found = fit("mamba", given, "params", one, LENGTH)
    assert found.changes == {"n_layers": 1}


@pytest.mark.parametrize(
    ("name", "given", "by", "message"),
    [
        ("mamba", {"n_layers": 1}, "params", "10 parameters cannot be reached by mamba within 1%"),
        (
            "transformer",
            {"d_model": 64},
            "flops",
            "10 forward FLOPs per token .* leave out settings of arch.transformer",
        ),
    ],
)
def test_an_impossible_budget_is_one_line_with_the_nearest(name, given, by, message):
    with pytest.raises(ConfigError, match=message) as caught:
        fit(name, {**BASELINE, **given}, by, 10, LENGTH)
    assert "\n" not in str(caught.value)
    assert re.search(r"nearest: [\d,]+, with", str(caught.value))


def test_a_model_that_looks_both_ways_has_no_state_to_match():
    with pytest.raises(ConfigError, match="mamba has causal=false and so no state to match: compare with match=params"):
        fit("mamba", {**BASELINE, "causal": False}, "state", 1_000, LENGTH)
