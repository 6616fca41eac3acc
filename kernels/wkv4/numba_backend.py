"""The WKV operator of RWKV-4 on CPUs: the tensor side of the compiled loops in `numba_loops`.

Shape letters: B batch, T time, D channels, K chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import parallel
from zoo.kernels.arrays import flat, resets, rows
from zoo.kernels.checks import state_dtype
from zoo.kernels.simd import LANES
from zoo.kernels.wkv4 import numba_loops
from zoo.kernels.wkv4.op import CHUNK

WORK = 4
"""Inner-loop elements, in the measure of `parallel.run`, that a token and channel stands for; twice that backward."""


def _pad(lacking: int, *tensors: Tensor | None) -> list[Any]:
    """Adds `lacking` zero channels in the last dimension."""
    return [None if x is None else F.pad(x, (0, lacking)) for x in tensors]


def forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, final_state, checkpoints)`; see the contract in `op`."""
    n_batch, n_time, n_channels = k.shape
    if lacking := -n_channels % LANES:
        w, u, k, v, initial_state = _pad(lacking, w, u, k, v, initial_state)
        results = forward(w, u, k, v, initial_state, segment_ids, save_checkpoints)
        y, final_state, checkpoints = (x[..., :n_channels].contiguous() for x in results)
        return y, final_state, checkpoints

    dtype = state_dtype(v)
    y = torch.empty((n_batch, n_time, n_channels), dtype=dtype)
    final_state = torch.empty((n_batch, 3, n_channels), dtype=dtype)
    chunks = (n_batch, -(-n_time // CHUNK), 4, n_channels)
    checkpoints = torch.empty(chunks if save_checkpoints else (0,), dtype=dtype)
    parallel.run(
        numba_loops.forward,
        n_batch * (n_channels // LANES),
        WORK * k.numel(),
        (n_time, n_channels),
        flat(w, dtype),
        flat(u, dtype),
        *rows(k, dtype),
        *rows(v, dtype),
        flat(initial_state, dtype),
        resets(segment_ids),
        (initial_state is not None, segment_ids is not None, save_checkpoints),
        y.view(-1).numpy(),
        final_state.view(-1).numpy(),
        checkpoints.view(-1).numpy(),
    )
    return y if y.dtype == v.dtype else y.to(v.dtype), final_state, checkpoints


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the gradients of w, u, k, v and the initial state; see the contract in `op`."""
    n_batch, n_time, n_channels = k.shape
    if lacking := -n_channels % LANES:
        dy, dfinal_state, w, u, k, v, checkpoints = _pad(lacking, dy, dfinal_state, w, u, k, v, checkpoints)
        results = backward(dy, dfinal_state, w, u, k, v, segment_ids, checkpoints)
        return tuple(x[..., :n_channels] for x in results)

    dtype = state_dtype(v)
    dk, dv = (torch.empty((n_batch, n_time, n_channels), dtype=dtype) for _ in range(2))
    dw, du = (torch.empty((n_batch, n_channels), dtype=dtype) for _ in range(2))
    dinitial_state = torch.empty((n_batch, 3, n_channels), dtype=dtype)
    parallel.run(
        numba_loops.backward,
        n_batch * (n_channels // LANES),
        2 * WORK * k.numel(),
        (n_time, n_channels),
        flat(dy, dtype),
        flat(dfinal_state, dtype),
        flat(w, dtype),
        flat(u, dtype),
        *rows(k, dtype),
        *rows(v, dtype),
        resets(segment_ids),
        (dfinal_state is not None, segment_ids is not None),
        checkpoints.view(-1).numpy(),
        *(x.view(-1).numpy() for x in (dw, du, dk, dv, dinitial_state)),
    )
    return dw.sum(0), du.sum(0), dk, dv, dinitial_state
