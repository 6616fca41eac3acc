"""Sparse attention by torch's FlexAttention (arXiv 2412.05496), which compiles one Triton kernel per kind of pattern.

The pattern becomes a list of the 128 x 128 blocks that any query sees, and functions of a query and a key that say
whether and how often the key counts. The list is made from block numbers, never from a mask of T x S.

FlexAttention is differentiable, and only outside of torch operators, inside which autograd is off: so this backend is
called in the place of ours.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges,
P rows of the pattern (B or 1), J heads of its far ranges (H or 1), X and C blocks of queries and of keys.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from zoo.kernels.sparse_attention.pattern import Pattern, batch_of

BLOCK = 128
"""Queries and keys of a block: FlexAttention's own default."""

LEAST_WIDTH = 16
"""The kernel multiplies tiles at least so wide."""

KEPT = 8
"""How many patterns keep their blocks: those of the layers of a model, from one layer to the next and for backward."""

_masks: OrderedDict[tuple[Any, ...], tuple[Pattern, BlockMask, Callable[..., Tensor] | None]] = OrderedDict()


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention, which compiles itself for each dtype, class of shapes and kind of pattern that it meets."""
    return torch.compile(flex_attention)


def _tiles_of(pattern: Pattern, n_queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last block of queries in each tile, (N,)."""
    tiles = torch.arange(-(-n_queries // pattern.tile), device=device)
    last = ((tiles + 1) * pattern.tile).clamp(max=n_queries) - 1
    return tiles * pattern.tile // BLOCK, last // BLOCK


def blocks_seen(pattern: Pattern, n_keys: int) -> tuple[Tensor, Tensor]:
    """Returns which blocks of keys some query of a block sees, and which of them all its queries see whole.

    Both (P, J, X, C) booleans. The first may have blocks too many, the second too few.
    """
    n_queries, device, rows = pattern.lo.shape[1], pattern.lo.device, batch_of(pattern)
    n_down, n_across = -(-n_queries // BLOCK), -(-n_keys // BLOCK)
    lacking = n_down * BLOCK - n_queries

    def blocks_of(x: Tensor) -> Tensor:
        """(P|1, T) -> (P, X, BLOCK); queries behind the end are like the last."""
        return torch.cat([x, x[:, -1:].expand(-1, lacking)], 1).expand(rows, -1).unflatten(1, (n_down, BLOCK))

    lo, hi = blocks_of(pattern.lo), blocks_of(pattern.hi)
    blind = lo >= hi
    start = lo.masked_fill(blind, n_keys).amin(-1)[:, None, :, None]  # (P, 1, X, 1)
    stop = hi.masked_fill(blind, 0).amax(-1)[:, None, :, None]
    edges = torch.arange(n_across + 1, device=device) * BLOCK
    some = (edges[1:] > start) & (edges[:-1] < stop)  # (P, 1, X, C)
    whole = (edges[:-1] >= lo.amax(-1)[:, None, :, None]) & (edges[1:] <= hi.amin(-1)[:, None, :, None])
    if pattern.dilation is not None and max(pattern.dilation) > 1:
        whole = torch.zeros_like(whole)
    if pattern.far is None:
        return some, whole

    far = pattern.far.expand(rows, -1, -1, -1)  # (P, J, N, M)
    there = (far >= 0).int()
    begin = far.clamp(0, n_keys - 1)
    end = (begin + min(pattern.far_length, n_keys)).clamp(max=n_keys) - 1
    top, bottom = _tiles_of(pattern, n_queries, device)
    heads = far.shape[1]
    depth = there.new_zeros((rows, heads, n_down, n_across + 1))  # ranges that begin less those that ended
    for down in range((pattern.tile - 1) // BLOCK + 2):
        row = top + down
        inside = there * (row <= bottom).int()[:, None]
        row = row.clamp(max=n_down - 1)[:, None] * (n_across + 1)
        flat = depth.flatten(2)
        flat.scatter_add_(2, (row + begin // BLOCK).flatten(2), inside.flatten(2))
        flat.scatter_add_(2, (row + end // BLOCK + 1).flatten(2), -inside.flatten(2))
    return some | (depth.cumsum(-1)[..., :-1] > 0), whole.expand(-1, heads, -1, -1)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys a block of queries has, and their numbers followed by those of the others."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int().contiguous()


def _functions(pattern: Pattern, n_heads: int, n_keys: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Makes `near(b, h, i, j) -> bool` and `count(b, h, i, j)`, how often a far key counts, 0 where it is not seen."""
    lo, hi, first, last = pattern.lo, pattern.hi, pattern.first, pattern.last
    device, shift = lo.device, n_keys - lo.shape[1]
    dilation = None if pattern.dilation is None else torch.tensor(list(pattern.dilation), device=device)
    lo_row, hi_row, first_row, last_row = (int(x is not None and x.shape[0] > 1) for x in (lo, hi, first, last))

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j >= lo[b * lo_row, i]) & (j < hi[b * hi_row, i])
        if dilation is not None:
            seen = seen & ((j - i - shift) % dilation[h] == 0)
        return seen

    far = pattern.far
    if far is None or not far.shape[3]:
        return near, lambda b, h, i, j: torch.zeros_like(j)

    # Ranges in order, so that counting those that begin up to a key is a search by halves. One less than a power of two
    # of them, the absent ones behind all keys: no step of the search can leave the list.
    tile, length = pattern.tile, min(pattern.far_length, n_keys)
    steps = [1 << bit for bit in reversed(range(far.shape[3].bit_length()))]
    starts, order = far.masked_fill(far < 0, 2 * n_keys).sort(dim=-1, stable=True)
    starts = F.pad(starts, (0, 2 * steps[0] - 1 - far.shape[3]), value=2 * n_keys)
    sums = None
    if pattern.far_counts is not None:
        sums = F.pad(pattern.far_counts.float().gather(-1, order).cumsum(-1), (1, 2 * steps[0] - 1 - far.shape[3]))
    row, head = int(far.shape[0] > 1), int(far.shape[1] > 1)

    def begun(b: Tensor, h: Tensor, n: Tensor, j: Tensor) -> Tensor:
        """How often the ranges that begin at or before key j count together."""
        found = torch.zeros_like(j)
        for step in steps:
            found = torch.where(starts[b, h, n, found + (step - 1)] <= j, found + step, found)
        return found if sums is None else sums[b, h, n, found]

    def count(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        where = b * row, h * head, i // tile
        times = begun(*where, j) - begun(*where, j - length)
        seen = times > 0
        if first is not None:
            seen = seen & (j >= first[b * first_row, i])
        if last is not None:
            seen = seen & (j < last[b * last_row, i])
        return torch.where(seen, times, torch.zeros_like(times))

    return near, count


def make_mask(pattern: Pattern, n_heads: int, n_keys: int) -> tuple[BlockMask, Callable[..., Tensor] | None]:
    """Returns FlexAttention's `block_mask` and `score_mod` (None where every key counts once)."""
    near, count = _functions(pattern, n_heads, n_keys)
    some, whole = blocks_seen(pattern, n_keys)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return near(b, h, i, j) | (count(b, h, i, j) > 0)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        times = count(b, h, i, j).to(torch.float32)
        return score + torch.where(near(b, h, i, j) | (times <= 0), torch.ones_like(times), times).log().to(score.dtype)

    has_far = pattern.far is not None and pattern.far.shape[3] > 0
    mask = BlockMask.from_kv_blocks(
        *_ordered(some & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod if has_far else near,
        seq_lengths=(pattern.lo.shape[1], n_keys),
    )
    return mask, score_mod if has_far else None


def _mask(pattern: Pattern, n_heads: int, n_keys: int) -> tuple[BlockMask, Callable[..., Tensor] | None]:
    """`make_mask`, remembered as long as nobody writes to the pattern's tensors."""
    tensors = [x for x in pattern if isinstance(x, Tensor)]
    if any(x.is_inference() for x in tensors):  # they do not know whether they were written to
        return make_mask(pattern, n_heads, n_keys)
    key = (n_heads, n_keys, *((id(x), x._version) if isinstance(x, Tensor) else x for x in pattern))
    if key not in _masks:
        # The pattern is kept too: while it lives, no other tensor has its id.
        _masks[key] = (pattern, *make_mask(pattern, n_heads, n_keys))
        if len(_masks) > KEPT:
            _masks.popitem(last=False)
    _masks.move_to_end(key)
    return _masks[key][1:]


def _turned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) -> (B, H, T, K), with zeros for the channels that a narrow head lacks."""
    return F.pad(x.to(dtype), (0, max(0, LEAST_WIDTH - x.shape[3]))).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """Returns y, differentiable by autograd; arguments as in `zoo.kernels.sparse_attention`, already checked."""
    n_heads, n_keys, width = q.shape[2], k.shape[1], q.shape[3]
    if torch.compiler.is_compiling():  # the caller's graph takes all of it in
        mask, score_mod = make_mask(pattern, n_heads, n_keys)
        function: Callable[..., Any] = flex_attention
    else:
        mask, score_mod = _mask(pattern, n_heads, n_keys)
        function = _compiled()
    inputs = (_turned(x, q.dtype) for x in (q, k, v))
    y = function(*inputs, score_mod, mask, scale=scale, enable_gqa=n_heads != k.shape[2])
    return y.transpose(1, 2)[..., :width].contiguous()
