"""Which keys each query sees, in memory linear in the number of queries.

Shape letters: B batch, T queries, S keys, H query heads, N = ceil(T / tile) tiles of queries, M far ranges per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """The keys that each query sees: an interval near it and, for all queries of a tile alike, some ranges far away.

    A dimension marked `B|1` or `H|1` may be 1 where all rows or heads are alike. A far key that a query sees as a near
    key already (in its interval and on its dilation) is not counted a second time.

    Attributes:
        lo: First near key of each query, (B|1, T) integers from 0 to S.
        hi: One past the last near key, (B|1, T) integers from 0 to S; a query with lo >= hi has no near keys.
        dilation: Per query head: of the near keys only those at a distance that is a multiple of it. The queries are
            then the last T of the S keys: query i stands at key S - T + i.
        far: First key of each far range, (B|1, H|1, N, M) integers, -1 where there is none.
        tile: Queries per row of `far`: query i belongs to row i // tile.
        far_length: Keys per far range, cut off at S.
        far_counts: How often each far range counts in the softmax, the shape of `far`, >= 0; once where absent. A key
            in several ranges counts for each of them.
        first: Far keys before it are not seen, (B|1, T) integers: where a document begins. 0 where absent.
        last: Far keys from it on are not seen, (B|1, T) integers. S where absent.
    """

    lo: Tensor
    hi: Tensor
    dilation: tuple[int, ...] | None = None
    far: Tensor | None = None
    tile: int = 64
    far_length: int = 1
    far_counts: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None


def batch_of(pattern: Pattern) -> int:
    """Returns in how many batch rows the pattern differs: B, or 1 where it is the same in all of them."""
    tensors = (pattern.lo, pattern.hi, pattern.far, pattern.first, pattern.last)
    return max(1 if tensor is None else tensor.shape[0] for tensor in tensors)


def _on_dilation(start: Tensor, stop: Tensor, position: Tensor, dilation: int) -> Tensor:
    """How many keys of start <= j < stop have a distance from `position` that `dilation` divides."""
    if dilation > 1:
        start, stop = ((edge - 1 - position).div(dilation, rounding_mode="floor") for edge in (start, stop))
    return (stop - start).clamp(min=0)


def visible_pairs(pattern: Pattern, n_heads: int, n_keys: int) -> int:
    """Counts the (query, key) pairs that are seen, in time linear in the number of queries.

    Args:
        pattern: See `Pattern`.
        n_heads: Query heads H.
        n_keys: Keys S.

    Returns:
        The sum over all queries and heads, and over batch rows where they differ (`batch_of`). A key in several ranges
        is one pair.
    """
    lo, hi = pattern.lo, pattern.hi  # (B|1, T)
    n_queries = lo.shape[1]
    rows = batch_of(pattern)
    position = torch.arange(n_queries, device=lo.device) + (n_keys - n_queries)
    dilations = tuple(pattern.dilation or (1,) * n_heads)
    total = 0
    for dilation in set(dilations):
        near = _on_dilation(lo, torch.maximum(lo, hi), position, dilation)
        total += dilations.count(dilation) * int(near.expand(rows, -1).sum())
    if pattern.far is None:
        return total

    # In order of their first keys, ranges of one length end in that order too: each begins where the last one ended.
    absent = pattern.far < 0
    if pattern.far_counts is not None:
        absent = absent | (pattern.far_counts == 0)
    begin = pattern.far.masked_fill(absent, n_keys).sort(-1).values  # (B|1, H|1, N, M)
    end = (begin + pattern.far_length).clamp(max=n_keys)
    begin[..., 1:] = torch.maximum(begin[..., 1:], end[..., :-1])
    per_head = pattern.far.shape[1] > 1
    groups = [(h, dilations[h], 1) for h in range(n_heads)] if per_head else []
    if not per_head:
        groups = [(0, dilation, dilations.count(dilation)) for dilation in sorted(set(dilations))]
    for head, dilation, heads in groups:
        # (B|1, T, M): the pieces as each query sees them
        start, stop = (edge[:, head].repeat_interleave(pattern.tile, 1)[:, :n_queries] for edge in (begin, end))
        if pattern.first is not None:
            start = torch.maximum(start, pattern.first[..., None])
        if pattern.last is not None:
            stop = torch.minimum(stop, pattern.last[..., None])
        common = torch.maximum(start, lo[..., None]), torch.minimum(stop, hi[..., None])
        twice = _on_dilation(common[0], torch.maximum(*common), position[:, None], dilation)
        pairs = (stop - start).clamp(min=0) - twice
        total += heads * int(pairs.expand(rows, -1, -1).sum())
    return total
