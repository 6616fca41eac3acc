"""The chunked scan of the mamba-ssm package (github.com/state-spaces/mamba, Apache-2.0) behind our signature.

The package's public function is a torch autograd function. Backward calls it again rather than keep its graph, because
a torch operator cannot hand a graph on: one more forward pass for nothing but the inputs kept in memory.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from zoo.kernels.ssd.steps import segment_numbers

PACKAGE_CHUNK = 256
"""Steps of a chunk inside the package."""


def _package_arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor | None]:
    """B and C in x's dtype, parameters and states in float32."""

    def rows(x: Tensor) -> Tensor:
        return x if x.stride(-1) == 1 else x.contiguous()

    def parameter(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    return [
        rows(x),
        dt.contiguous(),
        parameter(A),
        rows(B.to(x.dtype)),
        rows(C.to(x.dtype)),
        parameter(D),
        parameter(dt_bias),
        parameter(initial_state),
    ]


def _scan(
    arguments: list[Tensor | None], dt_softplus: bool, dt_limit: tuple[float, float], segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, dt_bias, initial_state = arguments
    return mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        PACKAGE_CHUNK,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_state,
        # The package gives the initial state to segment 0, and compares numbers: one that came back would see itself.
        seq_idx=segment_numbers(segment_ids),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=True,
    )


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, final_state, empty)`; see the contract in `op`."""
    with torch.no_grad():
        arguments = _package_arguments(x, dt, A, B, C, D, dt_bias, initial_state)
        y, final_state = _scan(arguments, dt_softplus, dt_limit, segment_ids)
    return y.contiguous(), final_state.float().contiguous(), final_state.new_empty(0, dtype=torch.float32)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, dt, A, B, C, D, dt_bias and the initial state; see the contract in `op`."""
    arguments = _package_arguments(x, dt, A, B, C, D, dt_bias, initial_state)
    leaves = [None if argument is None else argument.detach().requires_grad_() for argument in arguments]
    with torch.enable_grad():
        y, final_state = _scan(leaves, dt_softplus, dt_limit, segment_ids)
    outputs: tuple[Any, ...] = (y,) if dfinal_state is None else (y, final_state)
    sent = (dy,) if dfinal_state is None else (dy, dfinal_state.to(final_state.dtype))
    gradients = iter(torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], sent))
    return tuple(None if leaf is None else next(gradients) for leaf in leaves)
