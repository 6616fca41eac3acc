"""Each backend of the short convolution against the reference loop, and the reference against torch's conv1d.

Shape letters: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import causal_conv1d, parallel
from zoo.kernels.errors import ZooError

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-12,  # eps 2e-16, sums over up to B T steps that may cancel
    torch.float32: 5e-6,  # eps 6e-8, the same sums
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}

BACKENDS = ["numba", "torch"]


def make(
    B: int,
    T: int,
    D: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    silu: bool = True,
    initial: bool = False,
    segments: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(B, T, D),
        "weight": normal(D, K, dtype=wide),
        "bias": normal(D, dtype=wide) if bias else None,
        "activation": "silu" if silu else None,
        "initial_state": normal(B, K - 1, D) if initial else None,
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.2).cumsum(1) if segments else None,
    }


def exact(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def check(backend: str, inputs: dict[str, Any], all_gradients: Any, assert_close: Any) -> None:
    expected = all_gradients(causal_conv1d, exact(inputs), backend="reference")
    results = all_gradients(causal_conv1d, inputs, backend=backend)
    dtype = inputs["x"].dtype
    assert results["y"].dtype == results["final_state"].dtype == dtype
    assert_close(results, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("K", [1, 2, 4, 7])
@pytest.mark.parametrize("D", [1, 16, 17, 40])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 33, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, T: int, D: int, K: int, all_gradients: Any, assert_close: Any) -> None:
    check(backend, make(2, T, D, K, initial=True, segments=True), all_gradients, assert_close)


OPTIONS = ("bias", "silu", "initial", "segments")


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_optionals(
    backend: str, options: tuple[bool, ...], all_gradients: Any, assert_close: Any
) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    check(backend, make(2, 21, 18, 4, dtype=torch.float32, **chosen), all_gradients, assert_close)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, all_gradients: Any, assert_close: Any) -> None:
    check(backend, make(2, 50, 160, 4, dtype=dtype), all_gradients, assert_close)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 150), st.integers(1, 6)),
    options=st.fixed_dictionaries({name: st.booleans() for name in OPTIONS}),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    sizes: tuple[int, ...], options: dict[str, bool], backend: str, seed: int, all_gradients: Any, assert_close: Any
) -> None:
    check(backend, make(*sizes, **options, seed=seed), all_gradients, assert_close)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_torch_conv1d(backend: str) -> None:
    inputs = make(2, 30, 20, 4, initial=True)
    history = torch.cat([inputs["initial_state"], inputs["x"]], dim=1).transpose(1, 2)
    expected = F.silu(F.conv1d(history, inputs["weight"][:, None], inputs["bias"], groups=20)).transpose(1, 2)
    y, final_state = causal_conv1d(**inputs, backend=backend)
    torch.testing.assert_close(y, expected)
    assert torch.equal(final_state, inputs["x"][:, -3:])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("split", [1, 2, 3, 4, 20])
def test_split_equals_whole(backend: str, split: int, all_gradients: Any, assert_close: Any) -> None:
    """Also where a document begins shortly before the split: the state then holds zeros for its predecessor."""
    inputs = make(2, 21, 17, 4, initial=True)
    inputs["segment_ids"] = torch.stack([torch.arange(21) >= split - 1, torch.arange(21) >= split - 2]).long()

    def in_two(**arguments: Any) -> tuple[Tensor, Tensor]:
        x, ids, state = (arguments.pop(name) for name in ("x", "segment_ids", "initial_state"))
        first, state = causal_conv1d(x[:, :split], segment_ids=ids[:, :split], initial_state=state, **arguments)
        second, state = causal_conv1d(x[:, split:], segment_ids=ids[:, split:], initial_state=state, **arguments)
        return torch.cat([first, second], dim=1), state

    whole = all_gradients(causal_conv1d, inputs, backend=backend)
    assert_close(all_gradients(in_two, inputs, backend=backend), whole, TOLERANCES[torch.float64])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_equals_separate(backend: str) -> None:
    lengths = [1, 2, 9, 3, 2]
    inputs = make(1, sum(lengths), 18, 4, initial=True)
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 7]), torch.tensor(lengths))[None]  # 7 comes back
    y, final_state = causal_conv1d(**{**inputs, "segment_ids": ids}, backend=backend)
    start, state = 0, inputs["initial_state"]
    for length in lengths:
        part = {**inputs, "x": inputs["x"][:, start : start + length], "initial_state": state}
        alone, last = causal_conv1d(**part, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], alone)
        start, state = start + length, None
    assert torch.equal(final_state, last)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    inputs = make(3, 40, 300, 4, dtype=torch.float32, segments=True)
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_gradients(causal_conv1d, inputs)
        torch.set_num_threads(3)
        together = all_gradients(causal_conv1d, inputs)
    finally:
        torch.set_num_threads(before)
    assert_close(together, alone, 0.0)


def test_views(all_gradients: Any, assert_close: Any) -> None:
    inputs = make(2, 20, 32, 4, dtype=torch.float32)
    expected = causal_conv1d(**inputs)[0]
    for view in (torch.cat([inputs["x"]] * 2, dim=-1)[..., 32:], inputs["x"].mT.contiguous().mT):
        torch.testing.assert_close(causal_conv1d(**{**inputs, "x": view})[0], expected, rtol=0, atol=0)


def test_state_does_not_share_memory() -> None:
    inputs = make(2, 20, 16, 4)
    final_state = causal_conv1d(**inputs)[1]
    assert final_state.untyped_storage().nbytes() == 2 * 3 * 16 * 8


def test_reference_gradcheck() -> None:
    inputs = make(1, 5, 2, 3, initial=True, segments=True)
    flags = {name: inputs.pop(name) for name in ("activation", "segment_ids")}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**dict(zip(inputs, values, strict=True)), **flags, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"][0]), r"x has shape \(5, 4\), expected \(B T D\)"),
        (lambda a: a.update(x=a["x"][:, :0]), r"x has shape \(2, 0, 4\): expected no empty dimension"),
        (lambda a: a.update(weight=a["weight"][:, None]), r"weight has shape \(4, 1, 3\), expected \(D K\)"),
        (lambda a: a.update(weight=a["weight"][:3]), r"weight has shape \(3, 3\), expected \(D=4, K=3\)"),
        (lambda a: a.update(bias=torch.zeros(3)), r"bias has shape \(3,\), expected \(D=4\)"),
        (lambda a: a.update(initial_state=torch.zeros(2, 3, 4)), r"initial_state .* \(B=2, K-1=2, D=4\)"),
        (lambda a: a.update(segment_ids=torch.zeros(2, 5)), r"segment_ids has dtype torch.float32"),
        (lambda a: a.update(activation="sillu"), r"activation='sillu': did you mean 'silu'\? \(known: None, silu\)"),
        (lambda a: a.update(backend="triton"), r"no backend is called 'triton': known: auto, cuda, numba"),
    ],
)
def test_bad_arguments(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arguments = make(2, 5, 4, 3, dtype=torch.float32)
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        causal_conv1d(**arguments)
    assert "\n" not in str(caught.value)
