"""Each backend of sparse attention against the dense reference, and the reference against torch's dense attention.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import Pattern, dense_weights, parallel, sparse_attention, sparse_attention_flops, visible_pairs
from zoo.kernels.backends import operators
from zoo.kernels.errors import ZooError
from zoo.kernels.sparse_attention.pattern import batch_of

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-12,  # eps 2e-16
    torch.float32: 1e-5,  # eps 6e-8, times the logits (up to 10) and a sum over a few hundred keys
    torch.float16: 1.5e-3,  # computed in float32; eps 5e-4 in rounding y, which backward reads again, and the gradients
    torch.bfloat16: 1.2e-2,  # computed in float32; eps 4e-3, likewise
}

ON_CPU = ["torch", "numba"]
BACKENDS = ON_CPU + ["cuda"] * torch.cuda.is_available()


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@dataclass(frozen=True)
class Case:
    """The sizes of a call and its pattern."""

    B: int
    T: int
    S: int
    H: int
    G: int
    K: int
    pattern: Pattern

    def inputs(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
    ) -> tuple[dict[str, Tensor], Pattern]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        q = normal(self.B, self.T, self.H, self.K)
        k, v = (normal(self.B, self.S, self.G, self.K) for _ in range(2))
        return {"q": q, "k": k, "v": v}, on(self.pattern, device)


def on(pattern: Pattern, device: str) -> Pattern:
    return Pattern(*(x.to(device) if isinstance(x, Tensor) else x for x in pattern))


def window(T: int, left: int, right: int = 0, S: int | None = None) -> Pattern:
    """Each query sees `left` keys before it and `right` after it; the queries are the last T of the S keys."""
    S = T if S is None else S
    at = torch.arange(S - T, S)[None]
    return Pattern((at - left).clamp(min=0), (at + right + 1).clamp(max=S))


def documents(T: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First key of each query's document, and one past its last; (1, T) each."""
    assert sum(lengths) == T
    ends = torch.tensor(lengths).cumsum(0)
    index = torch.repeat_interleave(torch.tensor(lengths))
    return (ends - torch.tensor(lengths))[index][None], ends[index][None]


def packed(T: int, left: int, lengths: Sequence[int]) -> Pattern:
    first, last = documents(T, lengths)
    pattern = window(T, left)
    return pattern._replace(lo=torch.maximum(pattern.lo, first), hi=torch.minimum(pattern.hi, last))


def ranges(seed: int, *shape: int, S: int, absent: float = 0.3) -> Tensor:
    """Random far ranges, a share of them absent."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.randint(0, S, shape, generator=generator)
    return far.masked_fill(torch.rand(shape, generator=generator) < absent, -1)


def counts(seed: int, *shape: int) -> Tensor:
    return torch.tensor([0.0, 1.0, 2.0, 3.5])[torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))]


def blocks(T: int, block: int) -> Pattern:
    """BigBird: first and last block see and are seen by all, three blocks of window, one random block per head."""
    N = -(-T // block)
    tile = torch.arange(T) // block
    outer = (tile == 0) | (tile == N - 1)
    lo = torch.where(outer, 0, (tile - 1) * block).clamp(min=0)[None]
    hi = torch.where(outer, T, (tile + 2) * block).clamp(max=T)[None]
    shared = torch.tensor([0, (N - 1) * block]).expand(1, 3, N, 2)
    drawn = ranges(5, 1, 3, N, 1, S=N, absent=0.0) * block
    return Pattern(lo, hi, far=torch.cat([shared, drawn], -1), tile=block, far_length=block)


def uneven(T: int) -> Pattern:
    """Every length of interval from none to all, in no order."""
    generator = torch.Generator().manual_seed(3)
    edges = torch.randint(0, T + 1, (2, T, 2), generator=generator)
    return Pattern(edges[..., 0], edges[..., 1])


def globals_of_documents(T: int, left: int, lengths: Sequence[int]) -> Pattern:
    """Longformer, causal: the first 3 keys of its document and a window; a tile may hold several documents."""
    tile = 16
    first, _ = documents(T, lengths)
    N = -(-T // tile)
    far = torch.full((1, 1, N, 6), -1)
    for n in range(N):
        starts = first[0, n * tile : (n + 1) * tile].unique()
        at = (starts[:, None] + torch.arange(3)).flatten()[:6]
        far[0, 0, n, : len(at)] = at
    far = far.clamp(max=T - 1)
    last = torch.arange(1, T + 1)[None]
    return packed(T, left, lengths)._replace(far=far, tile=tile, first=first, last=last)


def rows_of(*patterns: Pattern) -> Pattern:
    return Pattern(torch.cat([p.lo for p in patterns]), torch.cat([p.hi for p in patterns]))


BLIND = window(90, 20)._replace(hi=window(90, 20).hi * (torch.arange(90) % 5 > 1))

CASES = {
    "causal window": Case(2, 130, 130, 4, 4, 16, window(130, 31)),
    "all that came before": Case(1, 100, 100, 2, 2, 8, window(100, 100)),
    "everything": Case(1, 70, 70, 2, 1, 8, window(70, 70, 70)),
    "window to both sides": Case(2, 97, 97, 2, 2, 8, window(97, 12, 9)),
    "only itself": Case(1, 40, 40, 1, 1, 4, window(40, 0)),
    "windows of the rows": Case(2, 75, 75, 2, 2, 8, rows_of(window(75, 5), window(75, 70, 3))),
    "dilated heads": Case(2, 150, 150, 4, 2, 8, window(150, 30)._replace(dilation=(1, 2, 3, 2))),
    "dilated to both sides": Case(1, 83, 83, 2, 2, 8, window(83, 24, 16)._replace(dilation=(4, 8))),
    "one dilation for all": Case(1, 121, 121, 2, 1, 8, window(121, 50)._replace(dilation=(5, 5))),
    "dilated behind a prefix": Case(1, 31, 94, 2, 2, 8, window(31, 40, S=94)._replace(dilation=(3, 2))),
    "dilated documents": Case(1, 100, 100, 2, 2, 8, packed(100, 24, [37, 1, 62])._replace(dilation=(1, 3))),
    "documents": Case(1, 129, 129, 2, 2, 8, packed(129, 129, [1, 60, 2, 64, 2])),
    "documents in windows": Case(2, 129, 129, 2, 1, 8, packed(129, 20, [70, 3, 56])),
    "prefix": Case(2, 37, 101, 2, 2, 8, window(37, 30, S=101)),
    "one query": Case(2, 1, 300, 4, 2, 16, window(1, 300, S=300)),
    "one query, one key": Case(1, 1, 1, 1, 1, 1, window(1, 0)),
    "one query with far keys": Case(
        2, 1, 200, 2, 2, 8, window(1, 20, S=200)._replace(far=torch.tensor([[[[0, 3, -1, 150]]]]), far_length=7)
    ),
    "far keys": Case(2, 130, 130, 2, 2, 8, window(130, 10)._replace(far=ranges(0, 1, 1, 3, 4, S=130))),
    "far ranges of heads": Case(
        2, 130, 130, 4, 2, 8, window(130, 10, 4)._replace(far=ranges(1, 1, 4, 5, 3, S=130), tile=32, far_length=16)
    ),
    "far ranges of rows": Case(
        3, 66, 66, 2, 2, 8, window(66, 10)._replace(far=ranges(2, 3, 1, 5, 3, S=66), tile=16, far_length=8)
    ),
    "counted ranges": Case(
        2, 100, 100, 2, 1, 8,
        window(100, 10)._replace(
            far=ranges(3, 2, 2, 4, 5, S=100), tile=32, far_length=9, far_counts=counts(3, 2, 2, 4, 5)
        ),
    ),
    "a range listed twice": Case(
        1, 64, 64, 1, 1, 8, window(64, 4)._replace(far=torch.tensor([0, 0, 5]).expand(1, 1, 1, 3), far_length=8)
    ),
    "ranges over the window": Case(
        1, 96, 96, 2, 2, 8,
        window(96, 20)._replace(far=torch.tensor([0, 12, 30]).expand(1, 1, 3, 3), tile=32, far_length=40),
    ),
    "dilated with ranges over the window": Case(
        1, 96, 96, 2, 2, 8,
        window(96, 20)._replace(
            dilation=(2, 3), far=torch.tensor([0, 12, 30]).expand(1, 1, 3, 3), tile=32, far_length=40
        ),
    ),
    "ranges alone": Case(
        1, 50, 50, 2, 2, 8,
        Pattern(
            torch.zeros(1, 50).long(), torch.zeros(1, 50).long(), far=ranges(4, 1, 2, 4, 2, S=50), tile=13, far_length=5
        ),
    ),
    "no room for ranges": Case(1, 40, 40, 1, 1, 4, window(40, 5)._replace(far=torch.zeros(1, 1, 1, 0).long())),
    "global keys of documents": Case(2, 110, 110, 2, 2, 8, globals_of_documents(110, 12, [33, 5, 9, 63])),
    "far keys up to a last one": Case(
        2, 64, 64, 2, 2, 8,
        window(64, 3)._replace(
            far=ranges(6, 1, 1, 4, 3, S=64), tile=16, far_length=12, last=torch.arange(1, 65).expand(2, 64)
        ),
    ),
    "blocks, some of which see all": Case(1, 16 * 9 - 5, 16 * 9 - 5, 3, 3, 8, blocks(16 * 9 - 5, 16)),
    "uneven": Case(2, 140, 140, 2, 2, 8, uneven(140)),
    "blind queries": Case(1, 90, 90, 2, 2, 8, BLIND),
    "all blind": Case(1, 20, 20, 2, 2, 8, Pattern(torch.full((1, 20), 7), torch.full((1, 20), 7))),
    "odd sizes": Case(3, 67, 67, 6, 3, 5, window(67, 17)),
    "width 1": Case(1, 33, 33, 3, 1, 1, window(33, 9)),
    "wide heads": Case(1, 70, 70, 2, 1, 100, window(70, 33)),
}  # fmt: skip


Results = dict[str, Tensor]


def run(inputs: dict[str, Tensor], pattern: Pattern, **options: Any) -> Results:
    """The output and every gradient, for a random gradient of the output that is the same for every backend."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    y = sparse_attention(*leaves, pattern, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def refusal(backend: str, device: str) -> str | None:
    (operator,) = (o for o in operators() if o.name == "sparse_attention")
    (entry,) = (b for b in operator.backends if b.name == backend)
    return entry.why_not(device, ())


def assert_near(results: Results, expected: Results, tolerance: float) -> None:
    """Compares every entry by its root mean square error, relative to its own size or a tenth of the inputs'.

    The size alone would not do: where a query sees one key, the gradients of q and k are rounding errors around 0.
    """
    assert results.keys() == expected.keys()
    for name, truth in expected.items():
        assert results[name].shape == truth.shape, name
        error, size = (x.double().square().mean().sqrt().item() for x in (results[name].double() - truth, truth))
        error /= max(size, 0.1)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def check(
    backend: str, inputs: dict[str, Tensor], pattern: Pattern, tolerance: float | None = None, **options: Any
) -> None:
    """Compares the output and every gradient with the reference in float64."""
    dtype = inputs["q"].dtype
    if reason := refusal(backend, inputs["q"].device.type):
        pytest.skip(reason)
    exact = {name: x.cpu().double() for name, x in inputs.items()}
    expected = run(exact, on(pattern, "cpu"), backend="reference", **options)
    results = run(inputs, pattern, backend=backend, **options)
    for name, x in results.items():
        assert x.dtype == dtype, name
        assert x.isfinite().all(), name
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    assert_near({name: x.cpu() for name, x in results.items()}, expected, tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend: str, name: str) -> None:
    dtype = torch.float64 if backend in ON_CPU else torch.float32
    check(backend, *CASES[name].inputs(dtype, device_of(backend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["causal window", "counted ranges", "dilated heads", "blocks, some of which see all", "one query"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, name: str, dtype: torch.dtype) -> None:
    check(backend, *CASES[name].inputs(dtype, device_of(backend)))


@pytest.mark.parametrize("backend", ON_CPU)
def test_scale(backend: str) -> None:
    check(backend, *CASES["counted ranges"].inputs(), scale=0.7)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits(backend: str, size: float) -> None:
    """Logits of which a softmax without its maximum would overflow."""
    inputs, pattern = CASES["counted ranges"].inputs(torch.float32)
    inputs["q"] = inputs["q"] * size
    check(backend, inputs, pattern, tolerance=1e-6 * size)  # eps 6e-8 of a logit moves its exp by as much


@pytest.mark.parametrize("backend", ON_CPU)
def test_longer_than_any_block(backend: str) -> None:
    check(backend, *Case(1, 1500, 1500, 2, 1, 16, window(1500, 300)).inputs())
    check(backend, *Case(1, 700, 1300, 1, 1, 8, blocks(1300, 64)._replace(lo=uneven(1400).lo[:1, :700].clamp(max=1300),
          hi=uneven(1400).hi[:1, :700].clamp(max=1300), far=ranges(0, 1, 1, 11, 3, S=1300))).inputs())  # fmt: skip


@st.composite
def any_case(draw: Any) -> Case:
    B, G, shared, K = (draw(st.integers(1, most)) for most in (3, 2, 3, 20))
    T = draw(st.integers(1, 90))
    S = draw(st.one_of(st.just(T), st.integers(1, 120)))
    H = G * shared
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = draw(st.sampled_from([1, B]))
    if draw(st.booleans()):
        at = torch.arange(S - T, S)[None]
        left, right = draw(st.integers(0, S)), draw(st.integers(0, S))
        lo, hi = (at - left).clamp(0, S), (at + right + 1).clamp(0, S)
    else:
        lo, hi = whole(0, S + 1, rows, T), whole(0, S + 1, rows, T)
    dilation = tuple(draw(st.integers(1, 5)) for _ in range(H)) if draw(st.booleans()) else None
    pattern = Pattern(lo, hi, dilation)
    if draw(st.booleans()):
        tile = draw(st.sampled_from([1, 5, 16, 64]))
        shape = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), -(-T // tile), draw(st.integers(0, 4)))
        length = draw(st.integers(1, 2 * S))
        pattern = pattern._replace(far=whole(-1, S, *shape), tile=tile, far_length=length)
        if draw(st.booleans()):
            pattern = pattern._replace(far_counts=whole(0, 4, *shape) / 2)
        if draw(st.booleans()):
            pattern = pattern._replace(first=whole(0, S + 1, rows, T))
        if draw(st.booleans()):
            pattern = pattern._replace(last=whole(0, S + 1, rows, T))
    return Case(B, T, S, H, G, K, pattern)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=any_case(), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("backend", ON_CPU)
def test_any_pattern(backend: str, case: Case, seed: int) -> None:
    check(backend, *case.inputs(seed=seed))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_same_as_dense_attention(backend: str, name: str) -> None:
    """torch's own attention, with the logarithm of the weights as its additive mask and its own grouped heads."""
    case = CASES[name]
    inputs, pattern = case.inputs()
    weights = dense_weights(pattern, case.H, case.S, torch.float64)
    blind = (weights == 0).all(-1).expand(case.B, case.H, -1).transpose(1, 2)  # (B, T, H)
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    mask = weights.log().masked_fill((weights == 0).all(-1, keepdim=True), 0.0)
    y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=case.G != case.H).transpose(1, 2)
    y = y.masked_fill(blind[..., None], 0.0)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = ("dq", "dk", "dv")
    expected = {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))}
    assert_near(run(inputs, pattern, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_causal_window_is_torch_causal_attention(backend: str) -> None:
    inputs, pattern = CASES["all that came before"].inputs()
    q, k, v = (x.transpose(1, 2) for x in inputs.values())
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(sparse_attention(**inputs, pattern=pattern, backend=backend), expected)


def test_weights_by_hand() -> None:
    """One tile of three queries, the last of five keys; dilation 2; key 0 far and counted twice, keys 3, 4 far."""
    pattern = Pattern(
        lo=torch.tensor([[1, 1, 4]]), hi=torch.tensor([[3, 4, 5]]), dilation=(1, 2),
        far=torch.tensor([[[[0, 3, -1]]]]), far_length=1, far_counts=torch.tensor([[[[2.0, 1.0, 9.0]]]]),
        last=torch.tensor([[3, 4, 5]]),
    )  # fmt: skip
    expected = [
        [[2, 1, 1, 0, 0], [2, 1, 1, 1, 0], [2, 0, 0, 1, 1]],
        [[2, 0, 1, 0, 0], [2, 1, 0, 1, 0], [2, 0, 0, 1, 1]],
    ]
    assert dense_weights(pattern, 2, 5)[0].tolist() == expected
    assert visible_pairs(pattern, 2, 5) == 10 + 8


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_blind_queries_get_nothing_and_send_nothing(backend: str) -> None:
    inputs, pattern = CASES["blind queries"].inputs()
    results = run(inputs, pattern, backend=backend)
    blind = torch.arange(90) % 5 <= 1
    assert (results["y"][:, blind] == 0).all()
    assert (results["dq"][:, blind] == 0).all()
    assert (results["y"][:, ~blind] != 0).all()
    inputs, pattern = CASES["all blind"].inputs()
    assert all((x == 0).all() for x in run(inputs, pattern, backend=backend).values())


@pytest.mark.parametrize("backend", ON_CPU)
def test_log_sum_exp(backend: str) -> None:
    for name in ("counted ranges", "blind queries"):
        inputs, pattern = CASES[name].inputs()
        arguments = (*inputs.values(), *pattern, 0.5, backend)
        _, lse = torch.ops.zoo.sparse_attention_forward(*arguments)
        k = inputs["k"].repeat_interleave(CASES[name].H // CASES[name].G, 2)
        logits = 0.5 * torch.einsum("bthk,bshk->bhts", inputs["q"], k)
        weights = dense_weights(pattern, CASES[name].H, CASES[name].S, torch.float64)
        torch.testing.assert_close(lse, (logits + weights.log()).logsumexp(-1))


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_and_expanded_gradients(backend: str) -> None:
    """As in a model: q, k and v are views into one projection, or lie head by head; `sum()` gives an expanded dy."""
    inputs, pattern = CASES["counted ranges"].inputs(torch.float32)
    expected = run(inputs, pattern, backend=backend)
    joined = torch.cat([x.flatten(2) for x in inputs.values()], dim=-1)
    parts = joined.split([x.shape[2] * x.shape[3] for x in inputs.values()], -1)
    views = {n: part.unflatten(2, x.shape[2:]) for (n, x), part in zip(inputs.items(), parts, strict=True)}
    turned = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    strided = {n: x.repeat_interleave(2, -1)[..., ::2] for n, x in inputs.items()}
    for same in (views, turned, strided):
        torch.testing.assert_close(run(same, pattern, backend=backend), expected, rtol=0, atol=0)
    expanded = pattern._replace(lo=pattern.lo.expand(2, -1), hi=pattern.hi.int().expand(2, -1), far=pattern.far.int())
    torch.testing.assert_close(run(inputs, expanded, backend=backend), expected, rtol=0, atol=0)
    gradients = []
    for other in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        gradients.append(torch.autograd.grad(sparse_attention(*leaves, pattern, backend=other).sum(), leaves))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_twice_the_same_bits(backend: str) -> None:
    inputs, pattern = CASES["counted ranges"].inputs(torch.float32)
    torch.testing.assert_close(*(run(inputs, pattern, backend=backend) for _ in range(2)), rtol=0, atol=0)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    for name in ("counted ranges", "blocks, some of which see all", "dilated heads", "one query"):
        inputs, pattern = CASES[name].inputs(torch.float32)
        results = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(run(inputs, pattern, backend="numba"))
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["counted ranges", "dilated heads", "blind queries"])
def test_reference_gradcheck(name: str) -> None:
    case = CASES[name]
    T = 7
    pattern = case.pattern._replace(lo=case.pattern.lo[:, :T], hi=case.pattern.hi[:, :T])
    if pattern.far is not None:
        pattern = pattern._replace(far=pattern.far[:, :, :1] % T, far_counts=pattern.far_counts[:, :, :1])
    pattern = pattern._replace(hi=pattern.hi.clamp(max=T), lo=pattern.lo.clamp(max=T))
    inputs, _ = replace(case, T=T, S=T, K=2).inputs()
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(*leaves: Tensor) -> Tensor:
        return sparse_attention(*leaves, pattern, backend="reference")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal window", "counted ranges", "dilated documents", "global keys of documents"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs, pattern = CASES[name].inputs(dtype)
    arguments = (*(x.requires_grad_() for x in inputs.values()), *pattern, 0.5)
    torch.library.opcheck(torch.ops.zoo.sparse_attention_forward.default, (*arguments, backend))
    with torch.no_grad():
        y, lse = torch.ops.zoo.sparse_attention_forward(*arguments, backend)
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    backward = (*arguments, y, lse, torch.randn_like(y), backend)
    torch.library.opcheck(torch.ops.zoo.sparse_attention_backward.default, backward)


@pytest.mark.parametrize("name", ["causal window", "counted ranges", "dilated heads"])
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    inputs, pattern = CASES[name].inputs(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        return (2 * sparse_attention(q, k, v, pattern)).sin()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = call(*leaves, pattern)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    torch.testing.assert_close(*results)


def test_meta_tensors_have_the_same_shapes() -> None:
    inputs, pattern = CASES["counted ranges"].inputs(torch.bfloat16)
    meta = sparse_attention(*(x.to("meta") for x in inputs.values()), on(pattern, "meta"))
    real = sparse_attention(*inputs.values(), pattern)
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def brute_force_pairs(case: Case) -> int:
    weights = dense_weights(case.pattern, case.H, case.S)
    return int((weights > 0).expand(batch_of(case.pattern), case.H, -1, -1).sum())


@pytest.mark.parametrize("name", CASES)
def test_visible_pairs(name: str) -> None:
    case = CASES[name]
    assert visible_pairs(case.pattern, case.H, case.S) == brute_force_pairs(case)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=any_case())
def test_visible_pairs_of_any_pattern(case: Case) -> None:
    assert visible_pairs(case.pattern, case.H, case.S) == brute_force_pairs(case)


@pytest.mark.parametrize("name", ["causal window", "windows of the rows", "counted ranges", "dilated heads"])
def test_flops(name: str) -> None:
    case = CASES[name]
    inputs, pattern = case.inputs()
    pairs = int((dense_weights(pattern, case.H, case.S) > 0).expand(case.B, case.H, -1, -1).sum())
    arguments = (pattern, case.B, case.H, case.S, case.K)
    assert sparse_attention_flops(*arguments) == 4 * case.K * pairs
    assert sparse_attention_flops(*arguments, backward=True) == 10 * case.K * pairs
    inputs["q"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = sparse_attention(**inputs, pattern=pattern).sum()
    assert counter.get_total_flops() == sparse_attention_flops(*arguments)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == sparse_attention_flops(*arguments, backward=True)


def test_flops_of_meta_tensors_cannot_be_counted() -> None:
    inputs, pattern = CASES["causal window"].inputs()
    with FlopCounterMode(display=False), pytest.raises(ZooError, match="count a call with real tensors"):
        sparse_attention(*(x.to("meta") for x in inputs.values()), on(pattern, "meta"))


HOSTILE = """
import torch
from zoo.kernels import Pattern, parallel, sparse_attention
parallel.SMALL = 0
torch.set_num_threads(2)
torch.manual_seed(0)
leaves = [torch.randn(2, 150, h, 17).requires_grad_() for h in (4, 2, 2)]
at = torch.arange(150)[None]
far = torch.randint(-1, 150, (2, 4, 5, 3))
pattern = Pattern((at - 40).clamp(min=0), at + 1, (1, 2, 1, 3), far, 32, 9, torch.rand(far.shape), last=at + 1)

def run(backend):
    y = sparse_attention(*leaves, pattern, backend=backend)
    return y, *torch.autograd.grad(y.square().sum(), leaves)

torch.testing.assert_close(run("numba"), run("reference"), rtol=1e-4, atol=1e-5)
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills new memory on Linux alone")
def test_scratch_memory() -> None:
    """Scratch inside the kernels is filled with 0xFE (-1.7e38) by the allocator: none of it may be read."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE],
        env={**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("backend", ON_CPU)
def test_memory_is_linear_in_time(backend: str) -> None:
    """Nothing of the size of T x S is allocated by torch, in neither pass."""
    T = 16384
    inputs, pattern = Case(1, T, T, 1, 1, 4, window(T, 16)).inputs(torch.float32)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal biggest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    biggest = max(biggest, x.untyped_storage().nbytes())
            return result

    with Watch():
        run(inputs, pattern, backend=backend)
    assert biggest < T * T // 8


def test_a_wide_block_does_not_make_the_others_pay() -> None:
    """The logits that the torch backend computes: at most a quarter more than those of each block's own hull."""
    torch_backend = importlib.import_module("zoo.kernels.sparse_attention.torch_backend")
    T = 4096
    pattern = blocks(T, 64)._replace(far=None)
    q = torch.zeros(1, T, 1, 1)
    computed = sum(chunk.bias.numel() for chunk in torch_backend._Blocks(pattern, q, q).chunks())
    assert visible_pairs(pattern, 1, T) <= computed <= 1.25 * visible_pairs(pattern, 1, T)


def bad(change: Callable[[dict[str, Any]], Any], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


def with_pattern(**changes: Callable[[Pattern], Any]) -> Callable[[dict[str, Any]], Any]:
    def change(arguments: dict[str, Any]) -> None:
        pattern = arguments["pattern"]
        arguments["pattern"] = pattern._replace(**{name: new(pattern) for name, new in changes.items()})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(lambda a: a.update(q=a["q"][0]), r"q has shape \(20, 4, 3\), expected \(B T H K\)"),
        bad(lambda a: a.update(q=a["q"][:, :0]), r"q has shape \(2, 0, 4, 3\): expected no empty dimension"),
        bad(lambda a: a.update(k=[1.0]), r"k is a list: pass a torch.Tensor"),
        bad(lambda a: a.update(k=a["k"][..., :2]), r"k has shape \(2, 20, 2, 2\), expected \(B=2, S=20, G=2, K=3\)"),
        bad(lambda a: a.update(v=a["v"][:, 1:]), r"v has shape \(2, 19, 2, 3\), expected \(B=2, S=20, G=2, K=3\)"),
        bad(lambda a: a.update(v=a["v"].long()), r"v has dtype torch.int64, expected a real floating dtype"),
        bad(lambda a: a.update(q=a["q"][:, :, :3]), r"3 query heads do not divide into 2 key/value heads"),
        bad(lambda a: a.update(pattern=None), r"pattern is a NoneType: pass a zoo.kernels.Pattern"),
        bad(with_pattern(lo=lambda p: None), r"lo is a NoneType: pass a torch.Tensor"),
        bad(with_pattern(lo=lambda p: p.lo[:, 1:]), r"lo has shape \(1, 19\), expected \(B=1, T=20\): reshape lo"),
        bad(with_pattern(hi=lambda p: p.hi.expand(3, 20)), r"hi has shape \(3, 20\), expected \(B=2, T=20\)"),
        bad(with_pattern(hi=lambda p: p.hi.float()), r"hi has dtype torch.float32, expected an integer dtype"),
        bad(with_pattern(lo=lambda p: p.lo - 1), r"lo runs from -1 to 14, expected 0 to 20 for 20 keys: clamp lo"),
        bad(with_pattern(hi=lambda p: p.hi + 1), r"hi runs from 2 to 21, expected 0 to 20 for 20 keys: clamp hi"),
        bad(with_pattern(dilation=lambda p: (1, 2)), r"dilation is \(1, 2\), expected one number for each of the 4"),
        bad(with_pattern(dilation=lambda p: 2), r"dilation is 2, expected one number for each of the 4 query heads"),
        bad(with_pattern(dilation=lambda p: (1, 0, 1, 1)), r"dilation is \(1, 0, 1, 1\), expected whole numbers from"),
        bad(with_pattern(tile=lambda p: 0), r"tile is 0, expected a whole number from 1: change tile"),
        bad(with_pattern(tile=lambda p: 4), r"far has shape \(1, 1, 3, 2\), expected \(B=1, H=1, N=5, M=2\)"),
        bad(with_pattern(far_length=lambda p: 1.5), r"far_length is 1.5, expected a whole number"),
        bad(with_pattern(far=lambda p: p.far[0]), r"far has shape \(1, 3, 2\), expected \(B\|1 H\|1 N M\)"),
        bad(with_pattern(far=lambda p: p.far.expand(1, 3, 3, 2)), r"far has shape .*, expected \(B=1, H=4, N=3, M=2\)"),
        bad(with_pattern(far=lambda p: p.far.double()), r"far has dtype torch.float64, expected an integer dtype"),
        bad(with_pattern(far=lambda p: p.far + 20), r"far runs from 20 to 20, expected -1 to 19 for 20 keys"),
        bad(with_pattern(far=lambda p: p.far - 2), r"far runs from -2 to -2, expected -1 to 19 for 20 keys"),
        bad(with_pattern(far=lambda p: None), r"far_counts without far"),
        bad(with_pattern(far_counts=lambda p: p.far), r"far_counts has dtype torch.int64, expected a real floating"),
        bad(with_pattern(far_counts=lambda p: p.far_counts.expand(1, 4, 3, 2)), r"far_counts has shape .*: give both"),
        bad(with_pattern(far_counts=lambda p: p.far_counts - 2), r"far_counts has a negative or infinite entry"),
        bad(with_pattern(far_counts=lambda p: p.far_counts * math.nan), r"far_counts has a negative or infinite"),
        bad(with_pattern(first=lambda p: p.lo[0]), r"first has shape \(20,\), expected \(B=2, T=20\)"),
        bad(with_pattern(last=lambda p: 5), r"last is a int: pass a torch.Tensor"),
        bad(lambda a: a.update(backend="numbs"), r"no backend is called 'numbs': did you mean 'numba'\?"),
        bad(lambda a: a.update(backend="cuda"), r"'cuda' cannot run this: needs a CUDA device"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_arguments(backend: str, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    far = torch.zeros(1, 1, 3, 2).long()
    pattern = window(20, 4)._replace(far=far, tile=8, far_counts=torch.ones(far.shape))
    arguments = {**Case(2, 20, 20, 4, 2, 3, pattern).inputs()[0], "pattern": pattern, "backend": backend}
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        sparse_attention(**arguments)
    assert "\n" not in str(caught.value)
