"""Landmark attention by its definition, on dense weights: the truth that every other backend is tested against.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, C blocks of a document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype


def reference(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns `(y, lse)`, see `op`. Differentiable by autograd, any number of times; its memory is B H T S numbers."""
    dtype = state_dtype(q)
    n_shared, n_keys, size = q.shape[2] // k.shape[2], k.shape[1], block + 1
    k, v = (x.to(dtype).repeat_interleave(n_shared, dim=2) for x in (k, v))  # (B, S, H, K)
    logits = scale * torch.einsum("bthk,bshk->bhts", q.to(dtype), k)

    keys = torch.arange(n_keys, device=q.device)
    slots, begins = slots[..., None], begins[..., None]  # (B|1, T, 1)
    places = keys - begins  # (B|1, T, S): of the keys, in the query's document
    tiles, own = places.div(size, rounding_mode="floor"), (slots - begins).div(size, rounding_mode="floor")
    if ends is None:
        there, closes = (places >= 0) & (keys <= slots) & (slots >= 0), places % size == block
    else:
        last = ends[..., None] - 1
        there, closes = (places >= 0) & (keys <= last) & (slots >= 0), (places % size == block) | (keys == last)
    ordinary, near = there & ~closes, tiles == own
    # Softmax inside of each block, (B|1, 1, T, S) masks on (B, H, T, S) logits.
    index = tiles.clamp(0, n_keys)[:, None].expand(logits.shape[0], logits.shape[1], -1, -1)
    inner = logits.masked_fill(~ordinary[:, None], -torch.inf)
    most = torch.full((*logits.shape[:3], n_keys + 1), -torch.inf, dtype=dtype, device=q.device)
    most = most.scatter_reduce(3, index, inner.detach(), "amax")  # (B, H, T, C)
    most = most.masked_fill(most == -torch.inf, 0.0).gather(3, index)
    shares = torch.exp(inner - most)  # (B, H, T, S)
    totals = torch.zeros_like(most[..., :1]).expand(-1, -1, -1, n_keys + 1).scatter_add(3, index, shares)
    totals = totals.gather(3, index)
    shares = shares / totals.masked_fill(totals == 0, 1.0)

    # Softmax over the query's own block and the landmarks of the others.
    outer = (near & ordinary) | (~near & there & closes)
    marked = logits.masked_fill(~outer[:, None], -torch.inf)
    top = marked.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(marked - top)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    of_block = torch.zeros_like(shares[..., :1]).expand(-1, -1, -1, n_keys + 1)
    of_block = of_block.scatter_add(3, index, weights.masked_fill(~closes[:, None], 0.0)).gather(3, index)
    weights = torch.where(near[:, None], weights, of_block * shares).masked_fill(~ordinary[:, None], 0.0)
    y = torch.einsum("bhts,bshk->bthk", weights, v)
    return y.to(q.dtype), (top + total.log())[..., 0]
