"""Each backend of the token shift against the reference loop, and the operator as torch sees it.

Shape letters: B batch, T time, D channels, M mixes.
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
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import parallel, token_shift, token_shift_flops
from zoo.kernels.errors import ZooError

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-12,  # eps 2e-16, sums over up to B T steps that may cancel
    torch.float32: 5e-6,  # eps 6e-8, the same sums
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding the mixes and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding the mixes and the gradients to bf16
}

BACKENDS = ["numba", "torch"]


def make(
    B: int,
    T: int,
    D: int,
    M: int,
    *,
    dtype: torch.dtype = torch.float64,
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
        "mu": normal(M, D, dtype=wide),
        "initial_state": normal(B, D) if initial else None,
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.2).cumsum(1) if segments else None,
    }


def stacked(**arguments: Any) -> tuple[Tensor, Tensor]:
    mixes, final_state = token_shift(**arguments)
    assert all(mix.is_contiguous() for mix in mixes)
    return torch.stack(mixes), final_state


def check(backend: str, inputs: dict[str, Any], all_gradients: Any, assert_close: Any, exact: Any) -> None:
    expected = all_gradients(stacked, exact(inputs), backend="reference")
    results = all_gradients(stacked, inputs, backend=backend)
    dtype = inputs["x"].dtype
    assert results["y"].dtype == results["final_state"].dtype == dtype
    assert_close(results, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("M", [1, 3, 7])
@pytest.mark.parametrize("D", [1, 16, 17, 40])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 129])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, T: int, D: int, M: int, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    check(backend, make(2, T, D, M, initial=True, segments=True), all_gradients, assert_close, exact)


OPTIONS = ("initial", "segments")


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_optionals(
    backend: str, options: tuple[bool, ...], all_gradients: Any, assert_close: Any, exact: Any
) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    check(backend, make(2, 70, 18, 3, dtype=torch.float32, **chosen), all_gradients, assert_close, exact)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    inputs = make(2, 150, 48, 3, dtype=dtype, initial=True, segments=True)
    check(backend, inputs, all_gradients, assert_close, exact)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 50), st.integers(1, 6)),
    options=st.fixed_dictionaries({name: st.booleans() for name in OPTIONS}),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    sizes: tuple[int, ...],
    options: dict[str, bool],
    backend: str,
    seed: int,
    all_gradients: Any,
    assert_close: Any,
    exact: Any,
) -> None:
    check(backend, make(*sizes, **options, seed=seed), all_gradients, assert_close, exact)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_formula(backend: str) -> None:
    inputs = make(2, 70, 20, 2, initial=True)
    x = inputs["x"]
    before = torch.cat([inputs["initial_state"][:, None], x[:, :-1]], dim=1)
    mixes, final_state = token_shift(**inputs, backend=backend)
    for mix, mu in zip(mixes, inputs["mu"], strict=True):
        torch.testing.assert_close(mix, x * (1 - mu) + before * mu)
    assert torch.equal(final_state, x[:, -1])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("split", [1, 2, 64, 69])
def test_split_equals_whole(backend: str, split: int, all_gradients: Any, assert_close: Any) -> None:
    """Gradients flow through the carried state: every one of them equals that of the whole sequence."""
    inputs = make(2, 70, 17, 3, initial=True, segments=True)
    ids = inputs["segment_ids"]
    ids[:, split:] += ids[:, split - 1 : split] - ids[:, split : split + 1]  # the second call could not see a boundary

    def in_two(**arguments: Any) -> tuple[Tensor, Tensor]:
        x, ids, state = (arguments.pop(name) for name in ("x", "segment_ids", "initial_state"))
        first, state = stacked(x=x[:, :split], segment_ids=ids[:, :split], initial_state=state, **arguments)
        second, state = stacked(x=x[:, split:], segment_ids=ids[:, split:], initial_state=state, **arguments)
        return torch.cat([first, second], dim=2), state

    whole = all_gradients(stacked, inputs, backend=backend)
    assert_close(all_gradients(in_two, inputs, backend=backend), whole, TOLERANCES[torch.float64])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_equals_separate(backend: str) -> None:
    lengths = [1, 2, 61, 3, 2]
    inputs = make(1, sum(lengths), 18, 3, initial=True)
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 7]), torch.tensor(lengths))[None]  # 7 comes back
    y, final_state = stacked(**{**inputs, "segment_ids": ids}, backend=backend)
    start, state = 0, inputs["initial_state"]
    for length in lengths:
        part = {**inputs, "x": inputs["x"][:, start : start + length], "initial_state": state}
        alone, last = stacked(**part, backend=backend)
        torch.testing.assert_close(y[:, :, start : start + length], alone)
        start, state = start + length, None
    assert torch.equal(final_state, last)


@pytest.mark.parametrize("border", [4, 64])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_infinity_stays_in_its_document(backend: str, border: int) -> None:
    inputs = make(1, 70, 16, 2)
    inputs["segment_ids"] = (torch.arange(70) >= border)[None].long()
    dy = torch.ones(2, 1, 70, 16, dtype=torch.float64)
    x = inputs["x"].requires_grad_()
    y = stacked(**inputs, backend=backend)[0]
    dy[:, :, border] = torch.inf
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[:, :border].isfinite().all()
    assert not dx[:, border].isfinite().any()
    with torch.no_grad():
        x[0, border - 1] = torch.inf
    polluted = stacked(**inputs, backend=backend)[0]
    assert not polluted[:, :, border - 1].isfinite().any()
    assert torch.equal(polluted[:, :, border:], y[:, :, border:])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_mix_that_nobody_used_has_no_gradient(backend: str) -> None:
    inputs = make(2, 70, 16, 3)
    leaves = [inputs[name].requires_grad_() for name in ("x", "mu")]
    mixes, _ = token_shift(**inputs, backend=backend)
    dx, dmu = torch.autograd.grad(mixes[1].sin().sum(), leaves)
    alone, _ = token_shift(inputs["x"], inputs["mu"][1:2], backend=backend)
    expected = torch.autograd.grad(alone[0].sin().sum(), leaves)
    torch.testing.assert_close((dx, dmu), expected)
    assert not dmu[[0, 2]].any()


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    inputs = make(3, 300, 48, 3, dtype=torch.float32, segments=True)
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_gradients(stacked, inputs)
        torch.set_num_threads(3)
        together = all_gradients(stacked, inputs)
    finally:
        torch.set_num_threads(before)
    assert_close(together, alone, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_expanded_gradients(backend: str) -> None:
    inputs = make(2, 70, 32, 3, dtype=torch.float32)
    leaf = inputs["x"].requires_grad_()
    plain, _ = stacked(**inputs, backend=backend)
    gradient = torch.autograd.grad(plain.sum(), leaf)
    for view in (torch.cat([leaf] * 2, dim=-1)[..., 32:], leaf.mT.contiguous().mT, leaf[:1].expand(2, -1, -1)):
        mixes, _ = token_shift(**{**inputs, "x": view}, backend=backend)
        torch.testing.assert_close(torch.stack(mixes)[:, :1], plain[:, :1], rtol=0, atol=0)
        total = sum(mix[:1].sum() for mix in mixes)
        torch.testing.assert_close(torch.autograd.grad(total, leaf)[0][:1], gradient[0][:1])


def test_state_does_not_share_memory() -> None:
    final_state = token_shift(**make(2, 20, 16, 4))[1]
    assert final_state.untyped_storage().nbytes() == 2 * 16 * 8


def test_reference_gradcheck() -> None:
    inputs = make(1, 5, 2, 3, initial=True, segments=True)
    ids = inputs.pop("segment_ids")
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return stacked(**dict(zip(inputs, values, strict=True)), segment_ids=ids, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optionals", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, optionals: bool, dtype: torch.dtype) -> None:
    inputs = make(2, 37, 18, 3, dtype=dtype, initial=optionals, segments=optionals)
    leaves = [None if x is None else x.requires_grad_(x.is_floating_point()) for x in inputs.values()]
    torch.library.opcheck(torch.ops.zoo.token_shift_forward.default, (*leaves, backend))
    plain = [None if x is None else x.detach() for x in leaves]
    dmixes = [torch.randn(2, 37, 18).to(dtype) for _ in range(3)]
    torch.library.opcheck(torch.ops.zoo.token_shift_backward.default, (dmixes, *plain, backend))


@pytest.mark.parametrize("optionals", [False, True])
def test_compiles_to_one_graph(optionals: bool) -> None:
    torch._dynamo.reset()
    inputs = make(2, 37, 18, 3, dtype=torch.float32, initial=optionals, segments=optionals)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None and x.is_floating_point()]

    def run(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (a, b, _), state = token_shift(**inputs)  # the third mix has no gradient
        return (2 * a).sin() + b, state

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y, state = function(inputs)
        results.append([y, state, *torch.autograd.grad(y.sum() + state.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_meta_tensors_have_the_same_shapes() -> None:
    inputs = make(2, 37, 18, 3, dtype=torch.bfloat16, initial=True, segments=True)
    (real, state), (meta, meta_state) = (
        token_shift(**{name: x.to(device) for name, x in inputs.items()}) for device in ("cpu", "meta")
    )
    for x, y in zip((*meta, meta_state), (*real, state), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_flop_counter_agrees_with_the_formula() -> None:
    inputs = make(2, 37, 18, 3)
    inputs["x"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y, _ = stacked(**inputs)
    assert counter.get_total_flops() == token_shift_flops(2, 37, 18, 3) == 2 * 37 * 18 * 3 * 3
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == token_shift_flops(2, 37, 18, 3, backward=True) == 2 * 37 * 18 * (5 * 3 + 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"][0]), r"x has shape \(5, 4\), expected \(B T D\)"),
        (lambda a: a.update(x=a["x"][:, :0]), r"x has shape \(2, 0, 4\): expected no empty dimension"),
        (lambda a: a.update(mu=a["mu"][0]), r"mu has shape \(4,\), expected \(M D\)"),
        (lambda a: a.update(mu=a["mu"][:, :3]), r"mu has shape \(3, 3\), expected \(M=3, D=4\)"),
        (lambda a: a.update(mu=a["mu"][:0]), r"mu has shape \(0, 4\): expected no empty dimension"),
        (lambda a: a.update(initial_state=torch.zeros(2, 1, 4)), r"initial_state .* expected \(B=2, D=4\)"),
        (lambda a: a.update(segment_ids=torch.zeros(2, 5)), r"segment_ids has dtype torch.float32"),
        (lambda a: a.update(backend="triton"), r"no backend is called 'triton': known: auto, numba, reference, torch"),
    ],
)
def test_bad_arguments(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arguments = make(2, 5, 4, 3, dtype=torch.float32)
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        token_shift(**arguments)
    assert "\n" not in str(caught.value)
