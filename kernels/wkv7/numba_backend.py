"""RWKV-7's recurrence on CPUs: the tensor side of the compiled loops in `numba_loops`.

Shape letters: B batch, T time, H heads, K key channels, V value channels, C chunks, R tasks of one head.
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
from zoo.kernels.wkv7 import numba_loops
from zoo.kernels.wkv7.op import CHUNK, VALUES, checkpoint_shape

FEW_HEADS = 4
"""With fewer heads in the whole batch than this, a head's blocks of value channels are tasks of their own."""


def _parts(heads: int, values: int) -> int:
    """Into how many tasks a head is cut. Does not depend on the number of threads, so that no result does."""
    return 1 if heads >= FEW_HEADS else values // VALUES


def _pad(lacking: int, *tensors: Tensor | None) -> list[Any]:
    """Adds `lacking` zero value channels to (B, T, H, V)."""
    return [None if x is None else F.pad(x, (0, lacking)) for x in tensors]


def _pad_state(lacking: int, state: Tensor | None) -> Any:
    """Adds `lacking` zero value channels to (B, H, V, K)."""
    return None if state is None else F.pad(state, (0, 0, 0, lacking))


def forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, final_state, checkpoints)`; see the contract in `op`. A slab is laid out as (V' / 32, K, 32)."""
    n_batch, n_time, n_heads, n_keys = r.shape
    n_values = v.shape[3]
    if lacking := -n_values % VALUES:
        (v,), initial_state = _pad(lacking, v), _pad_state(lacking, initial_state)
        y, final_state, checkpoints = forward(r, w, k, v, a, b, initial_state, segment_ids, save_checkpoints)
        return y[..., :n_values].contiguous(), final_state[:, :, :n_values].contiguous(), checkpoints

    dtype = state_dtype(v)
    y = torch.empty((n_batch, n_time, n_heads, n_values), dtype=dtype)
    final_state = torch.empty((n_batch, n_heads, n_values, n_keys), dtype=dtype)
    checkpoints = torch.empty(checkpoint_shape(r, v, save_checkpoints), dtype=dtype)
    n_parts = _parts(n_batch * n_heads, n_values)
    parallel.run(
        numba_loops.forward,
        n_batch * n_heads * n_parts,
        v.numel() * n_keys,
        (n_time, n_heads, n_keys, n_values, n_parts, CHUNK),
        *rows(r, dtype),
        *rows(w.to(dtype).exp(), dtype),
        *rows(k, dtype),
        *rows(v, dtype),
        *rows(a, dtype),
        *rows(b, dtype),
        flat(initial_state, dtype),
        resets(segment_ids),
        (initial_state is not None, segment_ids is not None, save_checkpoints),
        y.view(-1).numpy(),
        final_state.view(-1).numpy(),
        checkpoints.view(-1).numpy(),
    )
    return y.to(v.dtype), final_state, checkpoints


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the gradients of r, w, k, v, a, b and the initial state; see the contract in `op`."""
    n_batch, n_time, n_heads, n_keys = r.shape
    n_values = v.shape[3]
    if lacking := -n_values % VALUES:
        (dy, v), dfinal_state = _pad(lacking, dy, v), _pad_state(lacking, dfinal_state)
        dr, dw, dk, dv, da, db, dinitial_state = backward(
            dy, dfinal_state, r, w, k, v, a, b, None, segment_ids, checkpoints
        )
        return dr, dw, dk, dv[..., :n_values], da, db, dinitial_state[:, :, :n_values]

    dtype = state_dtype(v)
    n_parts = _parts(n_batch * n_heads, n_values)
    padded = -(-n_keys // LANES) * LANES
    dr, dw, dk, da, db = (torch.empty((n_parts, n_batch, n_time, n_heads, padded), dtype=dtype) for _ in range(5))
    dv = torch.empty((n_batch, n_time, n_heads, n_values), dtype=dtype)
    dinitial_state = torch.empty((n_batch, n_heads, n_values, n_keys), dtype=dtype)
    parallel.run(
        numba_loops.backward,
        n_batch * n_heads * n_parts,
        3 * v.numel() * n_keys,
        (n_batch, n_time, n_heads, n_keys, n_values, n_parts, CHUNK),
        flat(dy, dtype),
        flat(dfinal_state, dtype),
        *rows(r, dtype),
        *rows(w.to(dtype).exp(), dtype),
        *rows(k, dtype),
        *rows(v, dtype),
        *rows(a, dtype),
        *rows(b, dtype),
        resets(segment_ids),
        (dfinal_state is not None, segment_ids is not None),
        checkpoints.view(-1).numpy(),
        *(x.view(-1).numpy() for x in (dr, dw, dk, dv, da, db, dinitial_state)),
    )
    dr, dw, dk, da, db = ((x[0] if n_parts == 1 else x.sum(0))[..., :n_keys] for x in (dr, dw, dk, da, db))
    return dr, dw, dk, dv, da, db, dinitial_state
