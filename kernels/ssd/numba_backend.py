"""The recurrence of Mamba-2 on CPUs: the tensor side of the compiled loops in `numba_loops`.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size, K chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import parallel
from zoo.kernels.arrays import flat, rows
from zoo.kernels.checks import state_dtype
from zoo.kernels.simd import LOG2_E
from zoo.kernels.ssd import numba_adjoint, numba_loops
from zoo.kernels.ssd.op import CHUNK
from zoo.kernels.ssd.steps import step_gradients, step_sizes

MOST_HEADS = 4
"""Heads of one task: they share the scores C_t B_s, and dB and dC are summed over them in place."""

TASKS = 8
"""Tasks below which a task takes fewer heads: as many as keep several cores busy to the end."""


def _heads_per_task(n_batch: int, n_heads: int, n_groups: int) -> int:
    # From the sizes alone, not from the number of threads, so that the result does not depend on it either.
    most = min(MOST_HEADS, n_batch * n_heads // TASKS)
    return max(n for n in range(1, max(1, most) + 1) if n_heads // n_groups % n == 0)


def _steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step sizes, and the logarithms of the decays to base 2, -inf where the state is reset; (B, T, H) both."""
    delta = step_sizes(dt, dt_bias, dt_softplus, dt_limit, state_dtype(x)).contiguous()
    logs = delta * (A.to(delta.dtype) * LOG2_E)
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T-1)
        logs[:, 1:].masked_fill_(changes[..., None], -torch.inf)
    return delta, logs.contiguous()


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
    """Returns `(y, final_state, checkpoints)`; see the contract in `op`. A checkpoint is laid out as (N, P)."""
    n_batch, n_time, n_heads, n_channels = x.shape
    n_groups, n_state = B.shape[2:]
    n_range = _heads_per_task(n_batch, n_heads, n_groups)
    dtype = state_dtype(x)
    delta, logs = _steps(x, dt, A, dt_bias, dt_softplus, dt_limit, segment_ids)
    y = torch.empty(x.shape, dtype=dtype)
    slab = (n_heads, n_channels, n_state)
    final_state = torch.empty((n_batch, *slab), dtype=dtype)
    checkpoints = torch.empty((n_batch, -(-n_time // CHUNK), *slab) if save_checkpoints else (0,), dtype=dtype)
    parallel.run(
        numba_loops.forward,
        n_batch * n_heads // n_range,
        x.numel() * n_state // 4,
        (n_batch, n_time, n_heads, n_channels, n_groups, n_state, n_range),
        *rows(x, dtype),
        delta.view(-1).numpy(),
        logs.view(-1).numpy(),
        *rows(B, dtype),
        *rows(C, dtype),
        flat(D, dtype),
        flat(initial_state, dtype),
        (D is not None, initial_state is not None, save_checkpoints),
        y.view(-1).numpy(),
        final_state.view(-1).numpy(),
        checkpoints.view(-1).numpy(),
    )
    return y if y.dtype == x.dtype else y.to(x.dtype), final_state, checkpoints


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
) -> tuple[Any, ...]:
    """Returns the gradients of x, dt, A, B, C, D, dt_bias and the initial state; see the contract in `op`."""
    n_batch, n_time, n_heads, n_channels = x.shape
    n_groups, n_state = B.shape[2:]
    n_range = _heads_per_task(n_batch, n_heads, n_groups)
    dtype = state_dtype(x)
    delta, logs = _steps(x, dt, A, dt_bias, dt_softplus, dt_limit, segment_ids)
    dx = torch.empty(x.shape, dtype=dtype)
    ddelta, dlogs = torch.empty_like(delta), torch.empty_like(delta)
    dB, dC = (torch.empty((n_heads // n_groups // n_range, *B.shape), dtype=dtype) for _ in range(2))
    dD = torch.empty((n_batch, n_heads), dtype=dtype)
    dinitial_state = torch.empty((n_batch, n_heads, n_channels, n_state), dtype=dtype)
    parallel.run(
        numba_adjoint.backward,
        n_batch * n_heads // n_range,
        x.numel() * n_state // 2,
        (n_batch, n_time, n_heads, n_channels, n_groups, n_state, n_range),
        flat(dy, dtype),
        flat(dfinal_state, dtype),
        *rows(x, dtype),
        delta.view(-1).numpy(),
        logs.view(-1).numpy(),
        *rows(B, dtype),
        *rows(C, dtype),
        flat(D, dtype),
        (D is not None, dfinal_state is not None),
        checkpoints.view(-1).numpy(),
        *(value.view(-1).numpy() for value in (dx, ddelta, dlogs, dB, dC, dD, dinitial_state)),
    )
    ddt, ddt_bias = step_gradients(torch.addcmul(ddelta, dlogs, A.to(dtype)), dt, dt_bias, dt_softplus, dt_limit)
    return (
        dx,
        ddt,
        (dlogs * delta).sum((0, 1)),
        dB.sum(0),
        dC.sum(0),
        None if D is None else dD.sum(0),
        ddt_bias,
        dinitial_state,
    )
