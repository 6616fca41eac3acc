"""The selective scan on CPUs: the tensor side of the compiled loops in `numba_loops`.

Shape letters: B batch, T time, D channels, N state size, K chunks, R ranges of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import parallel
from zoo.kernels.arrays import flat, resets, rows
from zoo.kernels.checks import state_dtype
from zoo.kernels.selective_scan import numba_loops
from zoo.kernels.selective_scan.numba_loops import RANGE
from zoo.kernels.selective_scan.op import CHUNK
from zoo.kernels.simd import LANES


def _pad(lacking: int, *tensors: Tensor | None) -> list[Any]:
    """Adds `lacking` zero channels in the last dimension."""
    return [None if x is None else F.pad(x, (0, lacking)) for x in tensors]


def _pad_rows(lacking: int, *tensors: Tensor | None) -> list[Any]:
    """Adds `lacking` zero channels in the last dimension but one."""
    return [None if x is None else F.pad(x, (0, 0, 0, lacking)) for x in tensors]


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
    """Returns `(y, final_state, checkpoints)`; see the contract in `op`. A checkpoint is laid out as (N, D)."""
    n_batch, n_time, n_channels = u.shape
    n_state = A.shape[1]
    if lacking := -n_channels % LANES:
        u, dt, D, z, dt_bias = _pad(lacking, u, dt, D, z, dt_bias)
        A, initial_state = _pad_rows(lacking, A, initial_state)
        y, final_state, checkpoints = forward(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, save_checkpoints
        )
        if save_checkpoints:
            slabs = checkpoints.view(n_batch, -1, n_state, n_channels + lacking)[..., :n_channels]
            checkpoints = slabs.reshape(n_batch, -1, n_channels, n_state)
        return y[..., :n_channels].contiguous(), final_state[:, :n_channels].contiguous(), checkpoints

    dtype = state_dtype(u)
    y = torch.empty((n_batch, n_time, n_channels), dtype=dtype)
    final_state = torch.empty((n_batch, n_channels, n_state), dtype=dtype)
    chunks = (n_batch, -(-n_time // CHUNK), n_channels, n_state)
    checkpoints = torch.empty(chunks if save_checkpoints else (0,), dtype=dtype)
    parallel.run(
        numba_loops.forward,
        n_batch * -(-n_channels // (RANGE * LANES)),
        u.numel() * n_state,
        (n_time, n_channels, n_state),
        *rows(u, dtype),
        *rows(dt, dtype),
        flat(A, dtype),
        *rows(B, dtype),
        *rows(C, dtype),
        flat(D, dtype, n_channels),
        *rows(u if z is None else z, dtype),
        flat(dt_bias, dtype, n_channels),
        flat(initial_state, dtype),
        resets(segment_ids),
        (z is not None, dt_softplus, initial_state is not None, segment_ids is not None, save_checkpoints),
        y.view(-1).numpy(),
        final_state.view(-1).numpy(),
        checkpoints.view(-1).numpy(),
    )
    return y if y.dtype == u.dtype else y.to(u.dtype), final_state, checkpoints


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
) -> tuple[Any, ...]:
    """Returns the gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; see the contract in `op`."""
    n_batch, n_time, n_channels = u.shape
    n_state = A.shape[1]
    if lacking := -n_channels % LANES:
        dy, u, dt, D, z, dt_bias = _pad(lacking, dy, u, dt, D, z, dt_bias)
        A, dfinal_state = _pad_rows(lacking, A, dfinal_state)
        (checkpoints,) = _pad(lacking, checkpoints.view(n_batch, -1, n_state, n_channels))
        du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state = backward(
            dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, checkpoints
        )
        du, ddt, dD, dz, ddt_bias = (None if x is None else x[..., :n_channels] for x in (du, ddt, dD, dz, ddt_bias))
        return du, ddt, dA[:n_channels], dB, dC, dD, dz, ddt_bias, dinitial_state[:, :n_channels]

    n_ranges = -(-n_channels // (RANGE * LANES))
    dtype = state_dtype(u)
    du, ddt, dz = (torch.empty((n_batch, n_time, n_channels), dtype=dtype) for _ in range(3))
    dA, dinitial_state = (torch.empty((n_batch, n_channels, n_state), dtype=dtype) for _ in range(2))
    dB, dC = (torch.empty((n_batch, n_ranges, n_time, n_state), dtype=dtype) for _ in range(2))
    dD, ddt_bias = (torch.empty((n_batch, n_channels), dtype=dtype) for _ in range(2))
    parallel.run(
        numba_loops.backward,
        n_batch * n_ranges,
        2 * u.numel() * n_state,
        (n_time, n_channels, n_state),
        flat(dy, dtype),
        flat(dfinal_state, dtype),
        *rows(u, dtype),
        *rows(dt, dtype),
        flat(A, dtype),
        *rows(B, dtype),
        *rows(C, dtype),
        flat(D, dtype, n_channels),
        *rows(u if z is None else z, dtype),
        flat(dt_bias, dtype, n_channels),
        resets(segment_ids),
        (z is not None, dt_softplus, dfinal_state is not None, segment_ids is not None),
        checkpoints.view(-1).numpy(),
        *(x.view(-1).numpy() for x in (du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state)),
    )
    return (
        du,
        ddt,
        dA.sum(0),
        dB.sum(1),
        dC.sum(1),
        None if D is None else dD.sum(0),
        None if z is None else dz,
        None if dt_bias is None else ddt_bias.sum(0),
        dinitial_state,
    )
