"""Sparse attention as dense attention with weights: the truth that every other backend is tested against.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.sparse_attention.pattern import Pattern


def dense_weights(pattern: Pattern, n_heads: int, n_keys: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns how often each key counts in each query's softmax, (B|1, H|1, T, S): 0 where it is not seen.

    Args:
        pattern: See `Pattern`.
        n_heads: Query heads H.
        n_keys: Keys S.
        dtype: Of the result.
    """
    n_queries = pattern.lo.shape[1]
    keys = torch.arange(n_keys, device=pattern.lo.device)
    near = (pattern.lo[..., None] <= keys) & (keys < pattern.hi[..., None])
    near = near[:, None]  # (B|1, 1, T, S)
    if pattern.dilation is not None:
        distance = keys - torch.arange(n_keys - n_queries, n_keys, device=keys.device)[:, None]
        dilation = torch.tensor(pattern.dilation, device=keys.device)[:n_heads, None, None]
        near = near & (distance % dilation == 0)
    if pattern.far is None:
        return near.to(dtype)

    weights = torch.zeros((*pattern.far.shape[:3], n_keys), dtype=dtype, device=keys.device)  # (B|1, H|1, N, S)
    for m, start in enumerate(pattern.far.unbind(-1)):
        inside = (start[..., None] <= keys) & (keys < start[..., None] + pattern.far_length) & (start >= 0)[..., None]
        weights += inside if pattern.far_counts is None else inside * pattern.far_counts[..., m, None].to(dtype)
    weights = weights.repeat_interleave(pattern.tile, dim=2)[:, :, :n_queries]
    if pattern.first is not None:
        weights = weights * (keys >= pattern.first[:, None, :, None])
    if pattern.last is not None:
        weights = weights * (keys < pattern.last[:, None, :, None])
    return torch.where(near, torch.ones((), dtype=dtype, device=keys.device), weights)


def reference(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`, see `op`. Differentiable by autograd, any number of times; its memory is B H T S numbers."""
    dtype = state_dtype(q)
    n_heads, n_shared = q.shape[2], q.shape[2] // k.shape[2]
    weights = dense_weights(pattern, n_heads, k.shape[1], dtype)
    k, v = (x.to(dtype).repeat_interleave(n_shared, dim=2) for x in (k, v))  # (B, S, H, K)
    logits = scale * torch.einsum("bthk,bshk->bhts", q.to(dtype), k)
    logits = logits.masked_fill(weights == 0, -torch.inf)
    most = logits.detach().amax(-1, keepdim=True)
    most = most.masked_fill(most == -torch.inf, 0.0)
    shares = weights * torch.exp(logits - most)  # (B, H, T, S)
    total = shares.sum(-1, keepdim=True)
    seen = total > 0
    y = torch.einsum("bhts,bshk->bthk", shares / total.masked_fill(~seen, 1.0), v)
    lse = (most + total.log())[..., 0]
    return y.to(q.dtype), lse
