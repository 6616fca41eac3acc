"""The WKV operator of RWKV-4 as a plain loop over time: the truth that every other backend is tested against.

Shape letters: B batch, T time, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEUTRAL = -1e38
"""Exponent of a state that holds nothing: any key is larger, and differences with keys stay finite in float32."""


def reference(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd, any number of times; arguments and results as in `zoo.kernels.wkv4`."""
    out_dtype = v.dtype
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    w, u, k, v = (x.to(dtype) for x in (w, u, k, v))

    if initial_state is None:
        p = q = k.new_zeros(k.shape[0], k.shape[2])  # (B, D)
        o = torch.full_like(p, NEUTRAL)
    else:
        p, q, o = initial_state.to(dtype).unbind(1)
        o = o.detach()
    ys = []
    for t in range(k.shape[1]):
        if segment_ids is not None and t > 0:
            same = (segment_ids[:, t] == segment_ids[:, t - 1])[:, None]
            p, q = torch.where(same, p, 0.0), torch.where(same, q, 0.0)
            o = torch.where(same, o, NEUTRAL)
        # The largest exponent is only a scale, in the outputs and in the state: no gradient passes through it.
        top = torch.maximum(o, u + k[:, t]).detach()
        past, now = torch.exp(o - top), torch.exp(u + k[:, t] - top)
        ys.append((past * p + now * v[:, t]) / (past * q + now))
        top = torch.maximum(o + w, k[:, t]).detach()
        past, now = torch.exp(o + w - top), torch.exp(k[:, t] - top)
        p, q, o = past * p + now * v[:, t], past * q + now, top
    return torch.stack(ys, dim=1).to(out_dtype), torch.stack([p, q, o], dim=1)
