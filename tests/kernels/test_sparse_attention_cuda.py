"""The adapter to FlexAttention on the CPU, uncompiled: its masks, its blocks and its arguments; no GPU runs here.

FlexAttention has no backward on CPUs. Where gradients are tested, its forward written out in torch stands in for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from zoo.kernels import Pattern, backends, dense_weights, sparse_attention
from zoo.kernels.errors import BackendError

_spec = importlib.util.spec_from_file_location(
    "sparse_attention_cases", Path(__file__).with_name("test_sparse_attention.py")
)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = cases  # dataclasses look their module up
_spec.loader.exec_module(cases)
CASES = cases.CASES


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend, allowed to run on the CPU and without a compiler; nothing is remembered from another test."""
    module = importlib.import_module("zoo.kernels.sparse_attention.cuda_backend")
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(module, "_compiled", lambda: flex.flex_attention)
    resolve = backends.resolve
    monkeypatch.setattr(
        backends, "resolve", lambda *args: "cuda" if args[1] == "cuda" and args[2] == "cpu" else resolve(*args)
    )
    module._masks.clear()
    yield module
    module._masks.clear()


def wide(mask: Tensor, block: int, case: Any) -> Tensor:
    """Blocks as single queries and keys, for every row and head."""
    mask = mask.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return mask[..., : case.T, : case.S].expand(case.B, case.H, -1, -1)


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("name", CASES)
def test_blocks(name: str, block: int, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key that is seen is in a block of the list; in a whole block every key is seen once."""
    monkeypatch.setattr(adapter, "BLOCK", block)
    case = CASES[name]
    weights = dense_weights(case.pattern, case.H, case.S).expand(case.B, case.H, -1, -1)
    some, whole = adapter.blocks_seen(case.pattern, case.S)
    assert wide(some, block, case)[weights > 0].all()
    assert (weights[wide(whole, block, case)] == 1).all()
    assert not (whole & ~some).any()
    mask, _ = adapter.make_mask(case.pattern, case.H, case.S)
    assert mask.shape[-2:] == (case.T, case.S)
    assert (mask.to_dense().bool() == some).all()


def test_blocks_are_not_too_many(adapter: ModuleType) -> None:
    """Those of a window of 256 keys: three per row of blocks, of which one is whole; a far range adds its own."""
    T = 4096
    pattern = cases.window(T, 255)
    some, whole = adapter.blocks_seen(pattern, T)
    assert some.sum() == 3 * T // 128 - 3
    assert whole.sum() == T // 128 - 1
    far = torch.full((1, 1, T // 64, 2), -1)
    far[0, 0, 60, 0] = 100
    some_far, _ = adapter.blocks_seen(pattern._replace(far=far, far_length=64), T)
    assert (some_far & ~some).nonzero().tolist() == [[0, 0, 30, 0], [0, 0, 30, 1]]


@pytest.mark.parametrize(
    "name",
    [
        "windows of the rows", "dilated heads", "dilated behind a prefix", "one query with far keys", "counted ranges",
        "dilated with ranges over the window", "ranges alone", "global keys of documents", "blind queries", "all blind",
        "blocks, some of which see all", "odd sizes",
    ],
)  # fmt: skip
def test_forward(name: str, adapter: ModuleType) -> None:
    inputs, pattern = CASES[name].inputs(torch.float32)
    y = sparse_attention(**inputs, pattern=pattern, backend="cuda")
    torch.testing.assert_close(
        y, sparse_attention(**inputs, pattern=pattern, backend="reference"), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("name", ["counted ranges", "dilated heads"])
def test_forward_in_a_graph(name: str, adapter: ModuleType) -> None:
    torch._dynamo.reset()
    inputs, pattern = CASES[name].inputs(torch.float32)

    def function(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        return 2 * sparse_attention(q, k, v, pattern, backend="cuda")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs.values(), pattern), function(*inputs.values(), pattern))


def dense_flex(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor] | None, block_mask: Any, *, scale: float,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What `flex_attention` computes, differentiable on a CPU; refuses what it refuses."""
    assert q.dtype == k.dtype == v.dtype
    assert enable_gqa or q.shape[1] == k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (*q.shape[:3], k.shape[2])), indexing="ij")
    logits = scale * (q @ k.mT).float()
    if score_mod is not None:
        logits = score_mod(logits, b, h, i, j)
    seen = block_mask.mask_mod(b, h, i, j)
    blind = ~seen.any(-1, keepdim=True)
    shares = logits.masked_fill(~seen & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    return shares.to(v.dtype) @ v


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_compiled", lambda: dense_flex)
    inputs, pattern = CASES[name].inputs(torch.float32)
    expected = cases.run(inputs, pattern, backend="reference")
    cases.assert_near(cases.run(inputs, pattern, backend="cuda"), expected, 1e-5)


def test_gradients_in_bfloat16(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_compiled", lambda: dense_flex)
    inputs, pattern = CASES["counted ranges"].inputs(torch.bfloat16)
    results = cases.run(inputs, pattern, backend="cuda")
    assert all(x.dtype == torch.bfloat16 for x in results.values())
    # eps 4e-3, for the logits and shares as well, which the stand-in rounds
    cases.assert_near(results, cases.run(inputs, pattern, backend="reference"), 3e-2)
    inputs["k"] = inputs["k"].float()  # a key of another dtype gets its gradient in its own
    assert cases.run(inputs, pattern, backend="cuda")["dk"].dtype == torch.float32


def test_blocks_are_remembered_until_the_pattern_changes(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_compiled", lambda: dense_flex)
    made: list[Pattern] = []
    make = adapter.make_mask
    monkeypatch.setattr(adapter, "make_mask", lambda *args: made.append(args[0]) or make(*args))
    inputs, pattern = CASES["counted ranges"].inputs(torch.float32)
    for _ in range(2):
        cases.run(inputs, pattern, backend="cuda")
    assert len(made) == 1
    pattern.lo.clamp_(min=10)
    cases.assert_near(cases.run(inputs, pattern, backend="cuda"), cases.run(inputs, pattern, backend="reference"), 1e-5)
    assert len(made) == 2
    for left in range(2 * adapter.KEPT):
        cases.run(*cases.Case(1, 9, 9, 1, 1, 4, cases.window(9, left)).inputs(torch.float32), backend="cuda")
    assert len(adapter._masks) == adapter.KEPT
    with torch.inference_mode():
        inputs, pattern = cases.Case(1, 20, 20, 1, 1, 4, cases.window(20, 5)).inputs(torch.float32)
        pattern = cases.window(20, 5)
        y = sparse_attention(**inputs, pattern=pattern, backend="cuda")
        torch.testing.assert_close(y, sparse_attention(**inputs, pattern=pattern, backend="reference"))


def test_says_what_it_does_not_take() -> None:
    with pytest.raises(BackendError, match="'cuda' cannot run this: torch's flex_attention does not take float64"):
        backends.resolve("sparse_attention", "cuda", "cuda", ("float64",))
    with pytest.raises(BackendError, match="'cuda' cannot run this: needs a CUDA device, the tensors are on cpu"):
        backends.resolve("sparse_attention", "cuda", "cpu")
