"""Landmark attention on CPUs: the tensor side of the compiled loops in `numba_loops` and `numba_adjoint`.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
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
from zoo.kernels.landmark_attention import numba_adjoint, numba_loops
from zoo.kernels.landmark_attention.numba_tiles import measure
from zoo.kernels.matrix import TILE_ROWS
from zoo.kernels.simd import LANES, LOG2_E
from zoo.kernels.sparse_attention import numba_plan
from zoo.kernels.sparse_attention.numba_adjoint import reduce
from zoo.kernels.sparse_attention.numba_backend import BLOCK, PART_TILES, PARTS, RUNS

SPARE = TILE_ROWS - 1
"""Rows behind the keys: products come in multiples of TILE_ROWS, and read or add zeros to so many more."""


class _Work(NamedTuple):
    """What the loops need to know of a call."""

    tiles: np.ndarray
    groups: np.ndarray
    reach: np.ndarray
    sizes: tuple[int, ...]
    spans: tuple[Any, ...]


def _prepare(
    q: Tensor, n_groups: int, width: int, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int
) -> _Work:
    n_batch, n_queries, n_heads, _ = q.shape
    spans = [x.contiguous() for x in (slots, begins, ends) if x is not None]
    strides = tuple(x.expand(n_batch, n_queries).stride() for x in spans)
    strides += ((0, 0),) * (3 - len(spans))
    arrays = [x.view(-1).numpy() for x in spans] + [np.empty(0, np.int64)] * (3 - len(spans))
    tiles, groups = numba_plan.tiles(n_queries, n_heads, n_groups, (1,) * n_heads, 0)
    n_rows = max(x.shape[0] for x in spans)
    reach = np.empty((n_rows * len(tiles), 3), np.int64)
    measure(n_rows, tiles, *arrays, strides, reach)
    sizes = (n_queries, n_heads, n_groups, width, block + 1, len(tiles))
    return _Work(tiles, groups, reach, sizes, (*arrays, strides))


def _pad(x: Tensor, more_rows: int = 0) -> Tensor:
    """Fills the last vector of each head up with zeros, and adds rows of them."""
    lacking = -x.shape[-1] % LANES
    return F.pad(x, (0, lacking, 0, 0, 0, more_rows)) if lacking or more_rows else x


def forward(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`; see the contract in `op`."""
    n_batch, n_queries, n_heads, n_channels = q.shape
    dtype, padded = state_dtype(q), _pad(q)
    work = _prepare(q, k.shape[2], padded.shape[-1], slots, begins, ends, block)
    cuts, ranges = np.empty(RUNS + 1, np.int64), np.empty((RUNS, 2), np.int64)
    pairs = numba_plan.cut(work.reach, np.array([0, n_batch * len(work.tiles)]), RUNS, cuts, ranges)
    y = torch.empty(padded.shape, dtype=dtype)
    lse = torch.empty((n_batch, n_heads, n_queries), dtype=dtype)
    parallel.run(
        numba_loops.forward,
        RUNS,
        pairs * padded.shape[-1] // LANES,
        work.sizes,
        scale * LOG2_E,
        cuts,
        work.tiles,
        *rows(padded, dtype),
        *rows(_pad(k, SPARE), dtype),
        *rows(_pad(v, SPARE), dtype),
        *work.spans,
        y.view(-1).numpy(),
        lse.view(-1).numpy(),
    )
    return y[..., :n_channels].to(q.dtype).contiguous(), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor | None,
    block: int,
    scale: float,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; see the contract in `op`."""
    n_batch, _, _, n_channels = q.shape
    n_keys, n_groups = k.shape[1:3]
    dtype, padded = state_dtype(q), _pad(q)
    width = padded.shape[-1]
    work = _prepare(q, n_groups, width, slots, begins, ends, block)
    n_tiles = len(work.tiles)
    # From the sizes alone, not from the number of threads, so that the result does not depend on it either.
    n_lists = n_batch * n_groups
    n_parts = max(1, min(-(-PARTS // n_lists), n_tiles // n_groups // PART_TILES))
    lists = (np.arange(n_batch)[:, None] * n_tiles + work.groups[:-1]).reshape(-1)
    n_tasks = n_lists * n_parts
    cuts, ranges = np.empty(n_tasks + 1, np.int64), np.empty((n_tasks, 2), np.int64)
    pairs = numba_plan.cut(work.reach, np.append(lists, n_batch * n_tiles), n_parts, cuts, ranges)
    ends_of_parts = np.cumsum(ranges[:, 1] + SPARE)
    starts = (ends_of_parts - ranges[:, 1] - SPARE) * width
    parts_dk, parts_dv = (torch.empty(int(ends_of_parts[-1]) * width, dtype=dtype) for _ in range(2))
    dq = torch.empty(padded.shape, dtype=dtype)
    dk, dv = (torch.empty((n_batch, n_keys, n_groups, width), dtype=dtype) for _ in range(2))
    parallel.run(
        numba_adjoint.backward,
        n_tasks,
        pairs * width // LANES,
        work.sizes,
        scale,
        cuts,
        work.tiles,
        *rows(padded, dtype),
        *rows(_pad(k, SPARE), dtype),
        *rows(_pad(v, SPARE), dtype),
        *work.spans,
        _pad(y).to(dtype).contiguous().view(-1).numpy(),
        lse.contiguous().view(-1).numpy(),
        _pad(dy).to(dtype).contiguous().view(-1).numpy(),
        ranges,
        starts,
        width,
        *(gradient.view(-1).numpy() for gradient in (dq, parts_dk, parts_dv)),
    )
    for parts, out in ((parts_dk, dk), (parts_dv, dv)):
        parallel.run(
            reduce,
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
    return tuple(gradient[..., :n_channels] for gradient in (dq, dk, dv))  # type: ignore[return-value]
