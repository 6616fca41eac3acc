"""Sparse attention on CPUs: the tensor side of the compiled loops in `numba_loops` and `numba_adjoint`.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import parallel
from zoo.kernels.arrays import rows
from zoo.kernels.checks import state_dtype
from zoo.kernels.errors import ZooError
from zoo.kernels.simd import LANES, LOG2_E
from zoo.kernels.sparse_attention import numba_adjoint, numba_loops, numba_plan
from zoo.kernels.sparse_attention.pattern import Pattern

RUNS = 64
"""Tasks of the forward pass: as many as keep several cores busy to the end."""

PARTS = 16
"""Tasks of the backward pass at least; more tasks per key/value head take more memory and a longer sum."""

PART_TILES = 4
"""Tiles of queries of such a task at least, on average: fewer are not worth a sum of their own."""

BLOCK = 64
"""Keys of a task that adds up the gradients of the backward pass's tasks."""


class _Work(NamedTuple):
    """What the loops need to know of a call."""

    n_tiles: int
    groups: np.ndarray
    reach: np.ndarray
    pattern: tuple[Any, ...]
    tiles: np.ndarray


def _spread(x: Tensor | int, shape: tuple[int, ...]) -> tuple[np.ndarray, Any]:
    """Returns integers as a flat array, with their strides where they are stretched to `shape`."""
    x = torch.as_tensor(x, dtype=torch.int64).contiguous()
    return x.view(-1).numpy(), x.expand(shape).stride()


def _prepare(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
) -> _Work:
    lo, hi, dilation, far, tile, far_length, far_counts, first, last = pattern
    n_batch, n_queries, n_heads, _ = q.shape
    n_keys, n_groups = k.shape[1:3]
    dtype = state_dtype(q)
    if dtype == torch.float32 and n_keys > 1 << 24:
        raise ZooError(f"sparse_attention: {n_keys} keys, the masks of numba count to {1 << 24}: pass backend='torch'")
    dilations = tuple(dilation or (1,) * n_heads)
    edges = (lo, hi, 0 if first is None else first, n_keys if last is None else last)
    spans, span_at = zip(*(_spread(edge, (n_batch, n_queries)) for edge in edges), strict=True)
    far_, logs = np.empty(0, np.int64), torch.empty(0, dtype=dtype)
    far_sizes, far_at = (0, 1, 1), (0, 0, 0, 0)
    if far is None or far.shape[3] == 0:
        tile = 0
    else:
        far_sizes = (far.shape[3], far_length, tile)
        far_, far_at = _spread(far, (n_batch, n_heads, *far.shape[2:]))
        if far_counts is not None:
            logs = far_counts.contiguous().view(-1).to(dtype).log2()  # of the shape of far
    table, groups = numba_plan.tiles(n_queries, n_heads, n_groups, (1,) * n_heads if tile else dilations, tile)
    n_rows = max(1 if x is None else x.shape[0] for x in (lo, hi, far))
    reach = np.empty((n_rows * len(table), 3), np.int64)
    numba_plan.measure(
        n_rows, n_keys - n_queries, n_keys, table, *spans[:2], span_at[:2], far_, far_sizes, far_at, reach
    )
    flat = (spans, span_at, np.array(dilations), far_, far_sizes, far_at, logs.numpy())
    return _Work(len(table), groups, reach, flat, table)


def _pad(x: Tensor) -> Tensor:
    """Fills the last vector of each head up with zeros."""
    lacking = -x.shape[-1] % LANES
    return F.pad(x, (0, lacking)) if lacking else x


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`; see the contract in `op`."""
    n_batch, n_queries, n_heads, n_channels = q.shape
    dtype = state_dtype(q)
    work = _prepare(q, k, pattern)
    cuts, ranges = np.empty(RUNS + 1, np.int64), np.empty((RUNS, 2), np.int64)
    pairs = numba_plan.cut(work.reach, np.array([0, n_batch * work.n_tiles]), RUNS, cuts, ranges)
    padded = _pad(q)
    y = torch.empty(padded.shape, dtype=dtype)
    lse = torch.empty((n_batch, n_heads, n_queries), dtype=dtype)
    parallel.run(
        numba_loops.forward,
        RUNS,
        pairs * padded.shape[-1] // LANES,
        (n_queries, k.shape[1], n_heads, k.shape[2], padded.shape[-1], work.n_tiles),
        scale * LOG2_E,
        cuts,
        work.tiles,
        *rows(padded, dtype),
        *rows(_pad(k), dtype),
        *rows(_pad(v), dtype),
        *work.pattern,
        y.view(-1).numpy(),
        lse.view(-1).numpy(),
    )
    return y[..., :n_channels].to(q.dtype).contiguous(), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; see the contract in `op`."""
    n_batch, n_queries, n_heads, n_channels = q.shape
    n_keys, n_groups = k.shape[1:3]
    dtype = state_dtype(q)
    work = _prepare(q, k, pattern)
    # From the sizes alone, not from the number of threads, so that the result does not depend on it either.
    n_lists = n_batch * n_groups
    n_parts = max(1, min(-(-PARTS // n_lists), work.n_tiles // n_groups // PART_TILES))
    lists = (np.arange(n_batch)[:, None] * work.n_tiles + work.groups[:-1]).reshape(-1)
    n_tasks = n_lists * n_parts
    cuts, ranges = np.empty(n_tasks + 1, np.int64), np.empty((n_tasks, 2), np.int64)
    pairs = numba_plan.cut(work.reach, np.append(lists, n_batch * work.n_tiles), n_parts, cuts, ranges)
    padded = _pad(q)
    width = padded.shape[-1]
    dq = torch.empty(padded.shape, dtype=dtype)
    dk, dv = (torch.empty((n_batch, n_keys, n_groups, width), dtype=dtype) for _ in range(2))
    alone = n_parts == 1
    if alone:
        ranges[:] = 0, n_keys
        starts = ((np.arange(n_batch)[:, None] * n_keys * n_groups + np.arange(n_groups)) * width).reshape(-1)
        parts_dk, parts_dv, row = dk, dv, n_groups * width
    else:
        ends = np.cumsum(ranges[:, 1])
        starts, row = (ends - ranges[:, 1]) * width, width
        parts_dk, parts_dv = (torch.empty(int(ends[-1]) * width, dtype=dtype) for _ in range(2))
    parallel.run(
        numba_adjoint.backward,
        n_tasks,
        pairs * width // LANES,
        (n_queries, n_keys, n_heads, n_groups, width, work.n_tiles),
        scale,
        cuts,
        work.tiles,
        *rows(padded, dtype),
        *rows(_pad(k), dtype),
        *rows(_pad(v), dtype),
        *work.pattern,
        _pad(y).to(dtype).contiguous().view(-1).numpy(),
        lse.contiguous().view(-1).numpy(),
        _pad(dy).to(dtype).contiguous().view(-1).numpy(),
        ranges,
        starts,
        row,
        *(gradient.view(-1).numpy() for gradient in (dq, parts_dk, parts_dv)),
    )
    if not alone:
        for parts, out in ((parts_dk, dk), (parts_dv, dv)):
            parallel.run(
                numba_adjoint.reduce,
                n_batch * -(-n_keys // BLOCK),
                parts.numel(),
                (n_keys, n_groups, width),
                BLOCK,
                n_parts,
                ranges,
                starts,
                parts.numpy(),
                out.view(-1).numpy(),
            )
    return dq[..., :n_channels], dk[..., :n_channels], dv[..., :n_channels]
