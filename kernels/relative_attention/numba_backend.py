"""Relative attention on CPUs: the tensor side of the compiled loops in `numba_loops` and `numba_adjoint`.

Shape letters: B batch, N segments, Q queries of a segment, H query heads, G key/value heads, K head width, M slots of
memory, R runs of slots, S distances, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import parallel
from zoo.kernels.arrays import rows
from zoo.kernels.checks import state_dtype
from zoo.kernels.relative_attention import numba_adjoint, numba_loops
from zoo.kernels.relative_attention.numba_tiles import BEFORE, BEHIND, QUERIES, fours
from zoo.kernels.relative_attention.segments import Segments, visible_pairs
from zoo.kernels.simd import LANES, LOG2_E

PARTS = 8
"""Tasks of the backward pass at least, where there are segments enough; each has sums of its own for all memory."""


def _pad(x: Tensor) -> Tensor:
    """Fills the last vector of each head up with zeros."""
    lacking = -x.shape[-1] % LANES
    return F.pad(x, (0, lacking)) if lacking else x


def _positions(r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions from the farthest on between zeros: a column for each, (G, K, some), and a row, (G, fewer, K)."""
    in_rows = F.pad(_pad(r).to(dtype).flip(0).transpose(0, 1), (0, 0, BEFORE, BEHIND))
    count = -(-in_rows.shape[1] // LANES)
    count += 1 - count % 2  # an odd number of vectors, or the rows of a product would share lines of the cache
    columns = F.pad(in_rows.transpose(1, 2), (0, count * LANES - in_rows.shape[1]))
    return columns.contiguous(), in_rows.contiguous()


def _arguments(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Any]:
    return [part for x in inputs for part in rows(_pad(x), dtype)]


def _pattern(segments: Segments, batch: int) -> tuple[Any, ...]:
    """The segments as flat arrays, and whether each row of the batch has its own."""
    alike = all(x.shape[0] == 1 for x in segments)
    if not alike:
        segments = Segments(*(x.expand(batch, *x.shape[1:]) for x in segments))
    return *(x.contiguous().view(-1).numpy() for x in segments), 0 if alike else 1


def _work(segments: Segments, q: Tensor) -> int:
    """Inner-loop elements of one product."""
    return (
        visible_pairs(segments) * (q.shape[0] // max(x.shape[0] for x in segments)) * q.shape[3] * q.shape[4] // LANES
    )


def _sizes(q: Tensor, k: Tensor, r: Tensor, segments: Segments, width: int) -> tuple[int, ...]:
    return *q.shape[1:4], k.shape[3], width, segments.starts.shape[-1], r.shape[0]


def forward(
    q: Tensor,
    p: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    r: Tensor,
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`; see the contract in `op`."""
    dtype, n_channels = state_dtype(q), q.shape[-1]
    columns, _ = _positions(r, dtype)
    width = columns.shape[1]
    y = torch.empty((*q.shape[:-1], width), dtype=dtype)
    lse = torch.empty(q.shape[:-1], dtype=dtype)
    n_blocks = -(-q.shape[2] // QUERIES)
    parallel.run(
        numba_loops.forward,
        q.shape[0] * q.shape[1] * q.shape[3] * n_blocks,
        _work(segments, q),
        _sizes(q, k, r, segments, width),
        scale * LOG2_E,
        *_arguments((q, p, k, v, memory_k, memory_v), dtype),
        columns.view(-1).numpy(),
        *_pattern(segments, q.shape[0]),
        y.view(-1).numpy(),
        lse.view(-1).numpy(),
    )
    return y[..., :n_channels].to(q.dtype).contiguous(), lse


def backward(
    q: Tensor,
    p: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    r: Tensor,
    segments: Segments,
    scale: float,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
) -> tuple[Tensor, ...]:
    """Returns the gradients of the first seven; see the contract in `op`."""
    dtype, n_channels = state_dtype(q), q.shape[-1]
    batch, n_segments, n_queries, _, _ = q.shape
    n_groups, n_slots, n_distances = k.shape[3], memory_k.shape[1], r.shape[0]
    columns, in_rows = _positions(r, dtype)
    width = columns.shape[1]
    # From the sizes alone, not from the number of threads, so that the result does not depend on it either.
    n_parts = max(1, min(n_segments, PARTS // (batch * n_groups)))
    dq, dp = (torch.zeros((*q.shape[:-1], width), dtype=dtype) for _ in range(2))
    # Products come in rows of four: room for the last ones. Without a need for it nothing is copied below.
    own_rows = fours(n_queries)
    past_rows = n_slots if bool((segments.lengths % 4 == 0).all()) else n_slots + 4
    dk, dv = (torch.zeros((batch, n_segments, own_rows, n_groups, width), dtype=dtype) for _ in range(2))
    past_dk, past_dv = (torch.zeros((batch, n_parts, past_rows, n_groups, width), dtype=dtype) for _ in range(2))
    dr = torch.zeros((batch, n_parts, in_rows.shape[1], n_groups, width), dtype=dtype)
    parallel.run(
        numba_adjoint.backward,
        batch * n_groups * n_parts,
        _work(segments, q),
        _sizes(q, k, r, segments, width),
        scale,
        n_parts,
        past_rows,
        own_rows,
        *_arguments((q, p, k, v, memory_k, memory_v), dtype),
        columns.view(-1).numpy(),
        in_rows.view(-1).numpy(),
        *_pattern(segments, batch),
        _pad(y).to(dtype).contiguous().view(-1).numpy(),
        lse.contiguous().view(-1).numpy(),
        _pad(dy).to(dtype).contiguous().view(-1).numpy(),
        *(gradient.view(-1).numpy() for gradient in (dq, dp, dk, dv, past_dk, past_dv, dr)),
    )
    dk, dv = dk[:, :, :n_queries], dv[:, :, :n_queries]
    past_dk, past_dv = (_summed(x)[:, :n_slots] for x in (past_dk, past_dv))
    dr = dr[:, :, BEFORE : BEFORE + n_distances].sum((0, 1)).flip(0)
    return tuple(gradient[..., :n_channels] for gradient in (dq, dp, dk, dv, past_dk, past_dv, dr))


def _summed(parts: Tensor) -> Tensor:
    """The sum over the parts, (B, P, ...)."""
    return parts[:, 0] if parts.shape[1] == 1 else parts.sum(1)
