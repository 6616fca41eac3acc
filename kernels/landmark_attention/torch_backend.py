"""Landmark attention with batched matrix products, on any device: some queries of one document at a time.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, U = H / G, K head width. Of a chunk: R
rows, Q queries, C blocks of N = block + 1 keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.checks import state_dtype

LOGITS = 1 << 22
"""Logits of a chunk at most: what its memory is made of, wherever a chunk of one query has fewer."""


class _Chunk(NamedTuple):
    """Some queries of one document.

    Attributes:
        rows: Of the batch.
        queries: Range of T.
        keys: Range of S.
        own: Which block each query is in, (Q, C) bool.
        others: Which blocks it reaches through their landmarks, (Q, C) bool.
        seen: Which tokens it sees, (Q, C, N) bool.
        marks: Where in a block its landmark stands, (C,).
    """

    rows: slice
    queries: slice
    keys: slice
    own: Tensor
    others: Tensor
    seen: Tensor
    marks: Tensor


def _chunks(q: Tensor, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int) -> Iterator[_Chunk]:
    n_batch, n_queries, n_heads, _ = q.shape
    spans = (slots, begins, slots + 1 if ends is None else ends)
    n_patterns = max(x.shape[0] for x in spans)
    for row, (own_slots, own_begins, own_ends) in enumerate(
        zip(*(x.expand(n_patterns, n_queries).tolist() for x in spans), strict=True)
    ):
        rows = slice(None) if n_patterns == 1 else slice(row, row + 1)
        n_rows = n_batch if n_patterns == 1 else 1
        t = 0
        while t < n_queries:
            first, end = t, own_ends[t]
            while t < n_queries and own_slots[t] >= 0 and own_begins[t] == own_begins[first]:
                most = max(end, own_ends[t])
                if t > first and (t - first + 1) * (most - own_begins[first]) * n_rows * n_heads > LOGITS:
                    break
                end = most
                t += 1
            if t == first:
                t += 1  # this one sees nothing
            else:
                at = slots[min(row, len(slots) - 1), first:t] - own_begins[first]  # (Q,)
                yield _chunk(rows, slice(first, t), slice(own_begins[first], end), at, ends is not None, block)


def _chunk(rows: slice, queries: slice, keys: slice, at: Tensor, both_ways: bool, block: int) -> _Chunk:
    size, length = block + 1, keys.stop - keys.start
    n_blocks = -(-length // size)
    index, place = (torch.arange(n, device=at.device) for n in (n_blocks, size))
    marks = torch.full_like(index, block)
    if both_ways:
        marks[-1] = (length - 1) % size
    own = index == (at // size)[:, None]
    others = ~own if both_ways else index < (at // size)[:, None]
    tokens = place < marks[:, None]  # (C, N)
    reach = tokens[None] if both_ways else tokens & (place <= (at % size)[:, None, None])
    seen = (own[..., None] & reach) | (others[..., None] & tokens)
    return _Chunk(rows, queries, keys, own, others, seen, marks)


def _queries(x: Tensor, chunk: _Chunk, n_groups: int, dtype: torch.dtype) -> Tensor:
    """Those of a chunk out of (B, T, H, K): (R, G, U Q, K)."""
    own = x[chunk.rows, chunk.queries].to(dtype).unflatten(2, (n_groups, -1))
    return own.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _back(x: Tensor, n_queries: int) -> Tensor:
    """The inverse of `_queries`: (R, Q, H, K)."""
    return x.unflatten(2, (-1, n_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _keys(x: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """Those of a chunk out of (B, S, G, K): (R, G, C N, K), zeros behind the last."""
    own = x[chunk.rows, chunk.keys].to(dtype).transpose(1, 2)
    return F.pad(own, (0, 0, 0, chunk.seen[0].numel() - own.shape[2]))


def _shares(chunk: _Chunk, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens inside of their blocks (R, G, U, Q, C, N), of blocks (R, G, U, Q, C), and lse (R, G, U, Q)."""
    logits = (q @ k.mT).mul_(scale).unflatten(3, chunk.seen.shape[1:]).unflatten(2, (-1, chunk.seen.shape[0]))
    marks = logits.gather(-1, chunk.marks[:, None].expand(*logits.shape[:-1], 1))[..., 0]
    inner = logits.masked_fill_(~chunk.seen, -torch.inf)
    sums = inner.logsumexp(-1)  # (R, G, U, Q, C)
    outer = torch.where(chunk.own, sums, marks.masked_fill(~chunk.others, -torch.inf))
    lse = outer.logsumexp(-1)
    # finite, so that a block of which nothing is seen has shares of 0 and not NaN
    inner = inner.sub_(sums.masked_fill(sums == -torch.inf, 0.0)[..., None]).exp_()
    return inner, (outer - lse[..., None]).exp_(), lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`; see the contract in `op`."""
    dtype, n_groups = state_dtype(q), k.shape[2]
    y = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype, device=q.device)
    for chunk in _chunks(q, slots, begins, ends, block):
        inner, outer, sums = _shares(chunk, _queries(q, chunk, n_groups, dtype), _keys(k, chunk, dtype), scale)
        weights = inner.mul_(outer[..., None]).flatten(4).flatten(2, 3)  # (R, G, U Q, C N)
        drawn = weights @ _keys(v, chunk, dtype)
        y[chunk.rows, chunk.queries] = _back(drawn, len(chunk.own)).to(y.dtype)
        lse[chunk.rows, :, chunk.queries] = sums.flatten(1, 2)
    return y, lse


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
    dtype, n_groups = state_dtype(q), k.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for chunk in _chunks(q, slots, begins, ends, block):
        queries, gradient, drawn = (_queries(x, chunk, n_groups, dtype) for x in (q, dy, y))
        keys, values = _keys(k, chunk, dtype), _keys(v, chunk, dtype)
        inner, outer, _ = _shares(chunk, queries, keys, scale)
        worth = (gradient @ values.mT).view(inner.shape)
        mean = (inner * worth).sum(-1)  # (R, G, U, Q, C)
        overall = (gradient * drawn).sum(-1).view(*mean.shape[:-1], 1)
        weights = inner.mul_(outer[..., None])
        of_marks = (outer * (mean - overall)).masked_fill_(~chunk.others, 0.0)
        dlogits = worth.sub_(torch.where(chunk.own, overall, mean)[..., None]).mul_(weights)
        index = chunk.marks[:, None].expand(*dlogits.shape[:-1], 1)
        dlogits = dlogits.scatter_add_(-1, index, of_marks[..., None]).mul_(scale).flatten(4).flatten(2, 3)
        n_keys = chunk.keys.stop - chunk.keys.start
        dq[chunk.rows, chunk.queries] = _back(dlogits @ keys, len(chunk.own))
        dk[chunk.rows, chunk.keys] += (dlogits.mT @ queries)[:, :, :n_keys].transpose(1, 2)
        weights = weights.flatten(4).flatten(2, 3)
        dv[chunk.rows, chunk.keys] += (weights.mT @ gradient)[:, :, :n_keys].transpose(1, 2)
    return dq, dk, dv
