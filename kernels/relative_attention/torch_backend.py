"""Relative attention by matrix products of whole segments, some segments at a time.

Logits of positions are computed by distance and shifted into place (arXiv 1901.02860, appendix B): row i of a matrix
whose rows are one number longer than they say begins one number further to the left in the row before it.

Letters: B batch, N segments, Q queries of a segment, H query heads, G key/value heads, K head width, M slots of memory,
W most slots that a segment sees, C = W + Q, S distances.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.checks import state_dtype
from zoo.kernels.relative_attention.segments import Segments, memory_slots

LOGITS = 1 << 23
"""Logits that exist at once, 32 MiB of them, where a single segment has not more."""


class _Part:
    """Some segments, as matrices by head."""

    def __init__(self, q: Tensor, k: Tensor, r: Tensor, segments: Segments) -> None:
        self.batch, _, self.queries, self.heads, _ = q.shape
        self.groups, self.dtype = k.shape[3], state_dtype(q)
        self.slots, self.there = memory_slots(segments)
        self.width = self.slots.shape[2]
        total = self.width + self.queries
        lacking = total - r.shape[0]
        # From the farthest distance to the nearest, (G, C, K).
        self.r = F.pad(r[:total], (0, 0, 0, 0, 0, max(0, lacking))).flip(0).to(self.dtype).transpose(0, 1)
        own = torch.arange(self.queries, device=q.device)
        self.present = own < segments.counts[..., None]  # (B|1, N, Q)
        later = torch.arange(total, device=q.device) > own[:, None] + self.width  # (Q, C)
        absent = torch.cat((~self.there, torch.zeros_like(self.present)), dim=2)
        self.hidden = (absent[:, :, None] | later)[:, :, None, None]  # (B|1, N, 1, 1, Q, C)

    def by_head(self, x: Tensor) -> Tensor:
        """(B, N, Q, H, K) -> (B, N, G, H/G, Q, K)."""
        return x.to(self.dtype).unflatten(3, (self.groups, -1)).permute(0, 1, 3, 4, 2, 5)

    def by_token(self, x: Tensor) -> Tensor:
        """The inverse of `by_head`."""
        return x.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    def keys(self, memory: Tensor, own: Tensor) -> Tensor:
        """What the segments see, (B, N, G, C, K)."""
        rows = torch.arange(self.batch, device=own.device)[:, None, None]
        return torch.cat((memory[rows, self.slots], own), dim=2).to(self.dtype).transpose(2, 3)

    def split(self, gradient: Tensor, memory: Tensor) -> Tensor:
        """Adds the memory's part of (B, N, G, C, K) to (B, M, G, K) and returns what is the segments' own."""
        gradient = gradient.transpose(2, 3)
        past = gradient[:, :, : self.width] * self.there[..., None, None]
        rows = torch.arange(self.batch, device=gradient.device)[:, None, None]
        memory.index_put_((rows, self.slots), past, accumulate=True)
        return gradient[:, :, self.width :]

    def shifted(self, by_distance: Tensor) -> Tensor:
        """From (..., Q, C + Q), by distance, a view of (..., Q, C), by key."""
        row = by_distance.shape[-1]
        *outer, _, _ = by_distance.stride()
        shape = (*by_distance.shape[:-1], row - self.queries)
        return by_distance.as_strided(shape, (*outer, row - 1, 1), by_distance.storage_offset() + self.queries - 1)

    def logits(self, q: Tensor, p: Tensor, keys: Tensor) -> Tensor:
        """(B, N, G, H/G, Q, C) of scaled q and p by head."""
        logits = q @ keys.mT[:, :, :, None]
        logits += self.shifted(F.pad(p @ self.r.mT[:, None], (0, self.queries)))
        return logits.masked_fill_(self.hidden, -torch.inf)


def _parts(q: Tensor, k: Tensor, r: Tensor, segments: Segments) -> Iterator[tuple[slice, _Part]]:
    """Some segments at a time."""
    longest = int(segments.lengths.sum(-1).max()) + q.shape[2]
    step = max(1, LOGITS // (q.shape[0] * q.shape[2] * q.shape[3] * longest))
    for begin in range(0, q.shape[1], step):
        at = slice(begin, begin + step)
        yield at, _Part(q[:, at], k[:, at], r, Segments(*(x[:, at] for x in segments)))


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
    y, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=state_dtype(q))
    for at, part in _parts(q, k, r, segments):
        own_q, own_p = (part.by_head(x[:, at]) * scale for x in (q, p))
        logits = part.logits(own_q, own_p, part.keys(memory_k, k[:, at]))
        own_lse = logits.logsumexp(-1, keepdim=True)
        values = part.keys(memory_v, v[:, at])[:, :, :, None]
        absent = ~part.present[..., None, None]
        y[:, at] = part.by_token(logits.sub_(own_lse).exp_() @ values).masked_fill_(absent, 0.0)
        lse[:, at] = part.by_token(own_lse).masked_fill_(absent, -torch.inf)[..., 0]
    return y, lse


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
    dtype = state_dtype(q)
    dq, dp, dk, dv, memory_dk, memory_dv, dr = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, p, k, v, memory_k, memory_v, r)
    )
    delta = (y.to(dtype) * dy.to(dtype)).sum(-1, keepdim=True)
    for at, part in _parts(q, k, r, segments):
        own_q, own_p = (part.by_head(x[:, at]) * scale for x in (q, p))
        keys, values = part.keys(memory_k, k[:, at]), part.keys(memory_v, v[:, at])
        present = part.present[..., None, None]
        gradient = part.by_head(torch.where(present, dy[:, at], 0.0))
        own_lse = part.by_head(lse[:, at, ..., None].masked_fill(~present, torch.inf))
        shares = part.logits(own_q, own_p, keys).sub_(own_lse).exp_()
        dv[:, at] = part.split((shares.mT @ gradient).sum(3), memory_dv)
        shares *= (gradient @ values.mT[:, :, :, None]).sub_(part.by_head(delta[:, at]))  # dlogits
        dk[:, at] = part.split((shares.mT @ own_q).sum(3), memory_dk)
        dq[:, at] = part.by_token(shares @ keys[:, :, :, None])
        by_distance = F.pad(torch.zeros_like(shares), (0, part.queries))
        part.shifted(by_distance).copy_(shares)
        by_distance = by_distance[..., : -part.queries]
        dp[:, at] = part.by_token(by_distance @ part.r[:, None])
        own_dr = torch.einsum("bngfqc,bngfqk->cgk", by_distance, own_p).flip(0)
        dr[: own_dr.shape[0]] += own_dr[: dr.shape[0]]
    return dq * scale, dp * scale, dk, dv, memory_dk, memory_dv, dr
