"""The adapter to mamba-ssm against a stand-in with the package's signature and autograd behaviour, on the CPU."""

from __future__ import annotations

import importlib
import math
import sys
import types
from typing import Any

import pytest
import torch

from zoo.kernels import backends, ssd
from zoo.kernels.errors import BackendError
from zoo.kernels.ssd.steps import step_sizes


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit):  # type: ignore[no-untyped-def]
        torch_backend = importlib.import_module("zoo.kernels.ssd.torch_backend")
        ctx.options = (dt_softplus, dt_limit)
        y, final_state, checkpoints = torch_backend.forward(
            x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_states, seq_idx, True
        )
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, checkpoints)
        return y, final_state

    @staticmethod
    def backward(ctx, dy, dfinal_state):  # type: ignore[no-untyped-def]
        torch_backend = importlib.import_module("zoo.kernels.ssd.torch_backend")
        *inputs, initial_states, seq_idx, checkpoints = ctx.saved_tensors
        gradients = torch_backend.backward(
            dy, dfinal_state, *inputs, *ctx.options, initial_states, seq_idx, checkpoints
        )
        likes = (*inputs, initial_states)
        return *(g if like is not None else None for g, like in zip(gradients, likes, strict=True)), None, None, None


def mamba_chunk_scan_combined(  # type: ignore[no-untyped-def]
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """As in mamba-ssm 2.2, with what its kernels ask of their arguments."""
    assert chunk_size & (chunk_size - 1) == 0
    assert x.dtype == B.dtype == C.dtype
    assert all(value.stride(-1) == 1 for value in (x, B, C))
    assert all(value is None or value.dtype == torch.float32 for value in (A, D, dt_bias, initial_states))
    if seq_idx is not None:  # numbers, of which the first is the initial state's
        assert seq_idx.dtype == torch.int32
        assert (seq_idx[:, 0] == 0).all()
        assert (seq_idx.diff(dim=1) >= 0).all()
    y, state = _Scan.apply(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    return (y, state) if return_final_states else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_of_mamba_ssm(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any
) -> None:
    combined = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    combined.mamba_chunk_scan_combined = mamba_chunk_scan_combined  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, combined.__name__, combined)
    name = "zoo.kernels.ssd.cuda_backend"
    sys.modules.pop(name, None)
    modules = {"cuda": importlib.import_module(name), "torch": importlib.import_module("zoo.kernels.ssd.torch_backend")}
    del sys.modules[name]
    monkeypatch.setattr(backends, "load", lambda operator, backend: modules[backend])
    monkeypatch.setattr(backends, "resolve", lambda operator, requested, device, features: requested)

    B, T, H, P, G, N = 2, 70, 4, 6, 2, 5
    bare: dict[str, Any] = {
        "x": torch.randn(B, T, H, P, dtype=dtype), "dt": torch.rand(B, T, H, dtype=dtype), "A": -torch.rand(H),
        "B": torch.randn(B, T, N, G, dtype=dtype).mT, "C": torch.randn(B, T, G, N),
    }  # fmt: skip
    returning = torch.tensor([7] * 20 + [3] * 2 + [7] * 48).expand(B, T)
    full = {
        **bare, "D": torch.randn(H), "dt_bias": torch.randn(H, dtype=torch.float64), "dt_softplus": True,
        "dt_limit": (0.1, 2.0), "initial_state": torch.randn(B, H, P, N), "segment_ids": returning,
    }  # fmt: skip
    for inputs in (bare, full):
        expected = all_gradients(ssd, inputs, backend="torch")
        results = all_gradients(ssd, inputs, backend="cuda")
        # The package has one dtype for x, B and C, so that the gradient of a wider C comes back rounded.
        assert_close(results, expected, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("feature", ["float64", "d_state > 256"])
def test_says_what_it_does_not_take(feature: str) -> None:
    with pytest.raises(BackendError, match=f"mamba-ssm's mamba_chunk_scan_combined does not take {feature}"):
        backends.resolve("ssd", "cuda", "cuda", (feature,))


def test_step_sizes_have_a_gradient_only_between_the_limits() -> None:
    dt = torch.tensor([[[-1.0], [0.5], [3.0]]])
    assert step_sizes(dt, None, False, (0.0, math.inf), dt.dtype).flatten().tolist() == [0.0, 0.5, 3.0]
    inputs = {
        "x": torch.ones(1, 3, 1, 1),
        "A": -torch.ones(1),
        "B": torch.ones(1, 3, 1, 1),
        "C": torch.ones(1, 3, 1, 1),
    }
    for backend in ("reference", "torch", "numba"):
        leaf = dt.clone().requires_grad_()
        y, _ = ssd(dt=leaf, dt_limit=(0.0, 2.0), backend=backend, **inputs)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert (gradient.flatten() != 0).tolist() == [False, True, False], backend
