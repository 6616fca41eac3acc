"""Relative attention as dense attention: the truth that every other backend is tested against.

Letters: B batch, N segments, Q queries of a segment, H query heads, G key/value heads, K head width, M slots of memory,
W most slots that a segment sees, S distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.relative_attention.segments import Segments, memory_slots


def reference(
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
    """Returns `(y, lse)`, see `op`. Differentiable by autograd, any number of times; dense in segments and slots."""
    dtype, n_shared = state_dtype(q), q.shape[3] // k.shape[3]
    slots, there = memory_slots(segments)
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    k, v = (
        torch.cat((memory[rows, slots.expand(q.shape[0], -1, -1)], own), dim=2).to(dtype).repeat_interleave(n_shared, 3)
        for memory, own in ((memory_k, k), (memory_v, v))
    )  # (B, N, W + Q, H, K)
    own = torch.arange(q.shape[2], device=q.device)
    width = slots.shape[2]
    distances = own[:, None] + width - torch.arange(width + q.shape[2], device=q.device)  # (Q, W + Q)
    position = r.to(dtype).repeat_interleave(n_shared, 1)[distances.clamp(0, r.shape[0] - 1)]  # (Q, W + Q, H, K)
    logits = torch.einsum("bnqhk,bnshk->bnhqs", q.to(dtype), k)
    logits = scale * (logits + torch.einsum("bnqhk,qshk->bnhqs", p.to(dtype), position))
    present = own < segments.counts[..., None]  # (B|1, N, Q)
    seen = torch.cat((there, torch.ones_like(present)), dim=2)[:, :, None] & (distances >= 0) & present[..., None]
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    present = present.expand(q.shape[0], -1, -1)[..., None]  # (B, N, Q, 1)
    shares = logits.masked_fill(~present[:, :, None], 0.0).softmax(-1)
    y = torch.einsum("bnhqs,bnshk->bnqhk", shares, v).masked_fill(~present[..., None], 0.0)
    return y.to(q.dtype), logits.logsumexp(-1).transpose(2, 3)
