"""The selective scan of the mamba-ssm package (github.com/state-spaces/mamba, Apache-2.0) behind our signature.

The package's kernels want time innermost and one dtype for u, dt, B, C and z; its public function is a torch autograd
function. Backward calls it again rather than keep its graph, because a torch operator cannot hand a graph on: one more
forward pass (about a quarter of the backward) for nothing but the inputs kept in memory.

Shape letters: B batch, T time, D channels, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from zoo.kernels import backends


def _package_arguments(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> list[Any]:
    """(B, T, .) -> (B, ., T) in u's dtype; parameters in float32."""

    def per_step(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(u.dtype).transpose(1, 2).contiguous()

    def parameter(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    return [
        per_step(u),
        per_step(dt),
        parameter(A),
        per_step(B),
        per_step(C),
        parameter(D),
        per_step(z),
        parameter(dt_bias),
    ]


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, final_state, empty)`; see the contract in `op`. initial_state and segment_ids are always None."""
    with torch.no_grad():
        arguments = _package_arguments(u, dt, A, B, C, D, z, dt_bias)
        y, final_state = selective_scan_fn(*arguments, dt_softplus, return_last_state=True)
    # The package returns the state as every other entry of its own checkpoints: the copy lets go of them.
    return y.transpose(1, 2).contiguous(), final_state.float().clone(), final_state.new_empty(0, dtype=torch.float32)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of u, dt, A, B, C, D, z, dt_bias; see the contract in `op`.

    The package drops a gradient that reaches the final state. Where there is one, the Triton kernels do this backward
    pass in its place, and `zoo.kernels.used()` says so.
    """
    if dfinal_state is not None:
        triton_backend = backends.load("selective_scan", "triton")
        backends.record("selective_scan", "triton")
        inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus)
        checkpoints = triton_backend.forward(*inputs, None, None, True)[2]
        return triton_backend.backward(dy, dfinal_state, *inputs, None, checkpoints)

    arguments = _package_arguments(u, dt, A, B, C, D, z, dt_bias)
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    with torch.enable_grad():
        y = selective_scan_fn(*leaves, dt_softplus)
    present = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(y, present, dy.to(u.dtype).transpose(1, 2).contiguous()))
    du, ddt, dA, dB, dC, dD, dz, ddt_bias = (None if x is None else next(gradients) for x in leaves)
    du, ddt, dB, dC, dz = (None if x is None else x.transpose(1, 2).contiguous() for x in (du, ddt, dB, dC, dz))
    return du, ddt, dA, dB, dC, dD, dz, ddt_bias, u.new_empty(0)
