"""Sparse attention by batched matrix products over blocks of queries, on any device.

A block of up to `BLOCK` queries takes the hull of its near intervals and its far ranges as one gathered list of keys.
Blocks whose hulls are about as wide are worked on together, a chunk at a time that fits the cache, so that one that
sees everything costs its own work and no other's. Backward gathers and multiplies again.

A dilation is a renaming: with the keys in order of their remainder (0, d, 2d, ..., 1, d+1, ...), those that a query
sees lie side by side. Far ranges would be torn apart by it, so that with them dilations are masks.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges of L
keys; P rows of the pattern (B or 1), U units that share a row's mask and have keys of their own (P U = B G), R = H / G
query heads of a unit, Q queries per block, X blocks per row, I blocks in a chunk, C columns (keys) of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.checks import state_dtype
from zoo.kernels.sparse_attention.pattern import Pattern, batch_of

BLOCK = 64
"""Most queries per block: a block of Q computes about Q logits per query beyond those of a window."""

CHUNK = 1 << 19
"""Logits that are worked on together."""

LOG2_E = math.log2(math.e)
"""Logits are to the base 2: on CPUs torch's exp2 took a quarter of the time of its exp, with infinities a tenth."""


@dataclass
class _Chunk:
    """Some blocks with equally many columns, for some of the units.

    Attributes:
        blocks: Indices of the blocks, (I,).
        units: Which of the U units.
        near: Per block the pattern's row and its first near column.
        width: How many near columns there are; the far ones follow.
        keys: Index of each column's key among all P U S, (I, U, C).
        bias: Added to the logits, (I, 1, 1, Q, C): log2 of how often a column counts, -inf where it is not seen.
    """

    blocks: Tensor
    units: slice
    near: list[tuple[int, int]]
    width: int
    keys: Tensor
    bias: Tensor


class _Blocks:
    """The queries of a call in blocks, for heads that all have the same pattern (`far` of one head, one dilation)."""

    def __init__(self, pattern: Pattern, q: Tensor, k: Tensor) -> None:
        n_batch, self.n_queries, self.n_heads, _ = q.shape
        self.n_keys, self.n_shared = k.shape[1], self.n_heads // k.shape[2]
        self.pattern, self.dtype = pattern, q.dtype
        self.rows = batch_of(pattern)
        self.units = n_batch // self.rows * (self.n_heads // self.n_shared)
        self.size = min(BLOCK, self.n_queries)
        if pattern.far is not None and self.n_queries > pattern.tile:  # a block must not straddle tiles
            self.size = max(size for size in range(1, BLOCK + 1) if pattern.tile % size == 0)
        self.count = -(-self.n_queries // self.size)
        self.lacking = self.count * self.size - self.n_queries
        self.lo, self.hi = self._queries(pattern.lo), self._queries(pattern.hi)
        device = pattern.lo.device
        self.position = torch.arange(self.n_keys - self.n_queries, self.n_keys + self.lacking, device=device)
        self.position = self.position.view(self.count, self.size)

    def _queries(self, x: Tensor) -> Tensor:
        """(P|1, T) -> (P X, Q), zeros behind the end."""
        return F.pad(x.expand(self.rows, -1), (0, self.lacking)).reshape(-1, self.size)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H, K) -> (P X, U, R Q, K)."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.lacking))
        x = x.view(self.rows, -1, self.count, self.size, self.n_heads // self.n_shared, self.n_shared, x.shape[3])
        return x.permute(0, 2, 1, 4, 5, 3, 6).reshape(self.rows * self.count, self.units, -1, x.shape[6])

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        groups = self.n_heads // self.n_shared
        x = x.view(self.rows, self.count, -1, groups, self.n_shared, self.size, x.shape[3])
        x = x.permute(0, 2, 1, 5, 3, 4, 6).reshape(-1, self.count * self.size, self.n_heads, x.shape[6])
        return x[:, : self.n_queries]

    def chunks(self) -> Iterator[_Chunk]:
        """All blocks that see anything, those with hulls of about the same width together."""
        sees = self.lo < self.hi
        start = self.lo.masked_fill(~sees, self.n_keys).amin(1)
        stop = self.hi.masked_fill(~sees, 0).amax(1)
        groups: dict[int, list[int]] = {}
        starts, widths = start.tolist(), (stop - start).clamp(min=0).tolist()
        for block, width in enumerate(widths):
            step = max(16, 1 << max(0, width.bit_length() - 3))  # at most a quarter of the columns for nothing
            groups.setdefault(min(self.n_keys, -(-width // step) * step), []).append(block)

        far = self.pattern.far
        n_far = 0 if far is None else far.shape[3] * min(self.pattern.far_length, self.n_keys)
        for width, blocks in sorted(groups.items()):
            logits = self.n_shared * self.size * (width + n_far)
            if not logits:
                continue
            units = max(1, min(self.units, CHUNK // logits))
            step = max(1, CHUNK // (units * logits))
            for at in range(0, len(blocks), step):
                some = blocks[at : at + step]
                near = [(block // self.count, min(starts[block], self.n_keys - width)) for block in some]
                yield from self._chunk(some, near, width, units)

    def _chunk(self, blocks: list[int], near: list[tuple[int, int]], width: int, units: int) -> Iterator[_Chunk]:
        device = self.lo.device
        index = torch.tensor(blocks, device=device)
        first = torch.tensor([start for _, start in near], device=device)
        columns = first[:, None] + torch.arange(width, device=device)  # (I, C)
        bias = self._bias(self._near(index, columns))
        if self.pattern.far is not None:
            far, far_bias = self._far(index)
            columns, bias = torch.cat([columns, far], 1), torch.cat([bias, far_bias], 2)
        row = index // self.count * self.units
        for at in range(0, self.units, units):
            some = slice(at, min(self.units, at + units))
            owner = row[:, None] + torch.arange(some.start, some.stop, device=device)  # (I, U)
            keys = owner[..., None] * self.n_keys + columns[:, None]
            yield _Chunk(index, some, near, width, keys, bias[:, None, None])

    def _near(self, index: Tensor, columns: Tensor) -> Tensor:
        """Whether each query of some blocks sees each column as a near key, (I, Q, C)."""
        columns = columns[:, None]
        seen = (columns >= self.lo[index, :, None]) & (columns < self.hi[index, :, None])
        if self.pattern.dilation is not None:
            distance = columns - self.position[index % self.count, :, None]
            seen &= distance % self.pattern.dilation[0] == 0
        return seen

    def _bias(self, seen: Tensor) -> Tensor:
        hidden = torch.full((), -torch.inf, dtype=self.dtype, device=seen.device)
        return torch.where(seen, torch.zeros_like(hidden), hidden)

    def _far(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Far columns of some blocks, (I, C), and their bias, (I, Q, C)."""
        pattern, n_keys = self.pattern, self.n_keys
        assert pattern.far is not None
        tile = index % self.count * self.size // pattern.tile
        row = index // self.count
        starts = pattern.far[:, 0].expand(self.rows, -1, -1)[row, tile]  # (I, M)
        length = min(pattern.far_length, n_keys)
        columns = (starts[..., None] + torch.arange(length, device=index.device)).flatten(1)
        there = (starts >= 0).repeat_interleave(length, 1) & (columns < n_keys)
        seen = there[:, None] & ~self._near(index, columns)
        if pattern.first is not None:
            seen &= columns[:, None] >= self._queries(pattern.first)[index, :, None]
        if pattern.last is not None:
            seen &= columns[:, None] < self._queries(pattern.last)[index, :, None]
        bias = self._bias(seen)
        if pattern.far_counts is not None:
            counts = pattern.far_counts[:, 0].expand(self.rows, -1, -1)[row, tile].to(self.dtype)
            bias += counts.log2().repeat_interleave(length, 1)[:, None]
        return columns.clamp(0, n_keys - 1), bias

    def logits(self, chunk: _Chunk, q: Tensor, keys: Tensor) -> Tensor:
        """(I, U, R Q, C), to the base 2."""
        logits = q @ keys.mT
        logits.unflatten(2, (self.n_shared, -1)).add_(chunk.bias)
        return logits


def _gathered(x: Tensor, chunk: _Chunk) -> Tensor:
    """The keys or values of a chunk's columns out of (P U S, K), (I, U, C, K)."""
    return x.index_select(0, chunk.keys.flatten()).view(*chunk.keys.shape, -1)


def _attend(blocks: _Blocks, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Forward in blocks: scaled q (P X, U, R Q, K), k and v (P U S, K) -> y as q and lse (P X, U, R Q, 1), base 2."""
    y, lse = torch.zeros_like(q), torch.full_like(q[..., :1], -torch.inf)
    for chunk in blocks.chunks():
        logits = blocks.logits(chunk, q[chunk.blocks, chunk.units], _gathered(k, chunk))
        most = logits.amax(-1, keepdim=True)
        most.masked_fill_(most == -torch.inf, 0.0)
        shares = logits.sub_(most).exp2_()
        total = shares.sum(-1, keepdim=True)
        y[chunk.blocks, chunk.units] = (shares @ _gathered(v, chunk)).div_(total.masked_fill(total == 0, 1.0))
        lse[chunk.blocks, chunk.units] = total.log2_().add_(most)
    return y, lse


def _send_back(
    blocks: _Blocks, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward in blocks: the gradients of q, k and v as `_attend` takes them.

    lse is to the base 2, and finite also for a query that sees nothing, so that its shares are 0 and not NaN; delta is
    the sum over K of y dy. What comes out are derivatives of the logits to the base e times k and q as they are here.
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for chunk in blocks.chunks():
        at = chunk.blocks, chunk.units
        keys, values, queries, gradient = _gathered(k, chunk), _gathered(v, chunk), q[at], dy[at]
        shares = blocks.logits(chunk, queries, keys).sub_(lse[at]).exp2_()  # (I, U, R Q, C)
        _add(blocks, chunk, dv, shares.mT @ gradient)
        dlogits = (gradient @ values.mT).sub_(delta[at]).mul_(shares)
        dq[at] = dlogits @ keys
        _add(blocks, chunk, dk, dlogits.mT @ queries)
    return dq, dk, dv


def _add(blocks: _Blocks, chunk: _Chunk, total: Tensor, parts: Tensor) -> None:
    """Adds what the columns of a chunk get, (I, U, C, K), to what all keys get, (P U S, K), in a fixed order."""
    by_unit = total.view(blocks.rows, blocks.units, blocks.n_keys, -1)
    if chunk.width:
        for (row, start), part in zip(chunk.near, parts[:, :, : chunk.width], strict=True):
            by_unit[row, chunk.units, start : start + chunk.width] += part
    if chunk.width < parts.shape[2]:
        index, values = chunk.keys[..., chunk.width :].flatten(), parts[:, :, chunk.width :].flatten(0, 2)
        if total.is_cuda:  # index_add_ is atomic there, this sorts
            total.index_put_((index,), values, accumulate=True)
        else:
            total.index_add_(0, index, values)


@dataclass
class _Part:
    """Query heads that have the same pattern, and where their queries and keys stand in the whole call.

    Attributes:
        heads: The query heads, (H',).
        kv_heads: The key/value head of each; None where the part is the whole call, with its heads grouped.
        queries: Order in which the part takes the queries, (T,), or None.
        keys: Order in which it takes the keys, (S,), or None.
        pattern: With a far of one head, and one dilation or None.
    """

    heads: list[int]
    kv_heads: list[int] | None
    queries: Tensor | None
    keys: Tensor | None
    pattern: Pattern

    def of_queries(self, x: Tensor) -> Tensor:
        """The part of (B, T, H, ...)."""
        x = x if self.kv_heads is None else x[:, :, self.heads]
        return x if self.queries is None else x[:, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of (B, S, G, K)."""
        x = x if self.kv_heads is None else x[:, :, self.kv_heads]
        return x if self.keys is None else x[:, self.keys]

    def put(self, out: Tensor, x: Tensor) -> None:
        """Writes what belongs to the part's queries into (B, T, H, ...)."""
        if self.queries is not None:
            x = torch.empty_like(x).index_copy_(1, self.queries, x)
        if self.kv_heads is None:
            out.copy_(x)
        else:
            out[:, :, self.heads] = x

    def add(self, out: Tensor, x: Tensor) -> None:
        """Adds what belongs to the part's keys to (B, S, G, K)."""
        if self.keys is not None:
            x = torch.empty_like(x).index_copy_(1, self.keys, x)
        if self.kv_heads is None:
            out += x
        else:
            for at, head in enumerate(self.kv_heads):
                out[:, :, head] += x[:, :, at]


def _parts(pattern: Pattern, n_heads: int, n_groups: int, n_keys: int) -> Iterator[_Part]:
    dilations = pattern.dilation or (1,) * n_heads
    per_head = pattern.far is not None and pattern.far.shape[1] > 1
    kinds: dict[tuple[int, int], list[int]] = {}
    for head, dilation in enumerate(dilations):
        kinds.setdefault((dilation, head if per_head else 0), []).append(head)
    for (dilation, _), heads in kinds.items():
        kv_heads = None if len(kinds) == 1 else [head * n_groups // n_heads for head in heads]
        part = _Part(heads, kv_heads, None, None, pattern._replace(dilation=None))
        if per_head and pattern.far is not None:
            counts = None if pattern.far_counts is None else pattern.far_counts[:, heads]
            part.pattern = part.pattern._replace(far=pattern.far[:, heads], far_counts=counts)
        if dilation > 1 and pattern.far is not None:
            part.pattern = part.pattern._replace(dilation=(dilation,))
        elif dilation > 1:
            _by_remainder(part, dilation, n_keys)
        yield part


def _by_remainder(part: _Part, dilation: int, n_keys: int) -> None:
    """Puts queries and keys in order of their remainder: then a dilated interval is an interval."""
    lo, hi = part.pattern.lo, part.pattern.hi
    keys = torch.arange(n_keys, device=lo.device) % dilation
    queries = torch.arange(n_keys - lo.shape[1], n_keys, device=lo.device) % dilation
    part.keys, part.queries = keys.argsort(stable=True), queries.argsort(stable=True)
    before = F.pad(keys.bincount(minlength=dilation).cumsum(0), (1, 0))[queries]  # (T,)
    edges = (before + (edge - queries + dilation - 1) // dilation for edge in (lo, hi))
    lo, hi = (edge[:, part.queries] for edge in edges)
    part.pattern = part.pattern._replace(lo=lo, hi=hi)


def _by_unit(x: Tensor) -> Tensor:
    """(B, S, G, K) -> (B G S, K)."""
    return x.transpose(1, 2).reshape(-1, x.shape[3])


def _by_key(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_by_unit`."""
    n_batch, n_keys, n_groups, width = like.shape
    return x.view(n_batch, n_groups, n_keys, width).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`; see the contract in `op`."""
    dtype = state_dtype(q)
    y = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:3], 1), dtype=dtype)
    for part in _parts(pattern, q.shape[2], k.shape[2], k.shape[1]):
        own_q = part.of_queries(q).to(dtype) * (scale * LOG2_E)
        own_k, own_v = (part.of_keys(x).to(dtype) for x in (k, v))
        blocks = _Blocks(part.pattern, own_q, own_k)
        own_y, own_lse = _attend(blocks, blocks.split(own_q), _by_unit(own_k), _by_unit(own_v))
        part.put(y, blocks.joined(own_y).to(y.dtype))
        part.put(lse, blocks.joined(own_lse))
    return y, (lse[..., 0] / LOG2_E).transpose(1, 2).contiguous()


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
    dtype = state_dtype(q)
    delta = (y.to(dtype) * dy.to(dtype)).sum(-1, keepdim=True)
    lse = (lse * LOG2_E).masked_fill(lse == -torch.inf, 0.0).transpose(1, 2)[..., None]  # (B, T, H, 1)
    dq = q.new_empty(q.shape, dtype=dtype)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    for part in _parts(pattern, q.shape[2], k.shape[2], k.shape[1]):
        own_q = part.of_queries(q).to(dtype) * (scale * LOG2_E)
        own_k, own_v = (part.of_keys(x).to(dtype) for x in (k, v))
        blocks = _Blocks(part.pattern, own_q, own_k)
        own_dq, own_dk, own_dv = _send_back(
            blocks,
            blocks.split(own_q),
            _by_unit(own_k),
            _by_unit(own_v),
            blocks.split(part.of_queries(dy).to(dtype)),
            blocks.split(part.of_queries(lse)),
            blocks.split(part.of_queries(delta)),
        )
        part.put(dq, blocks.joined(own_dq) * scale)
        part.add(dk, _by_key(own_dk, own_k) / LOG2_E)
        part.add(dv, _by_key(own_dv, own_v))
    return dq, dk, dv
