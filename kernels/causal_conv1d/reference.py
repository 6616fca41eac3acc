"""The causal depthwise convolution as a plain double loop: the truth that every other backend is tested against.

Shape letters: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Differentiable by autograd; arguments as in `zoo.kernels.causal_conv1d`, returns y alone."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    history = torch.cat([initial_state.to(dtype), x.to(dtype)], dim=1)  # (B, K-1+T, D); step t is row K-1+t
    ys = []
    for t in range(x.shape[1]):
        total = history[:, taps - 1 + t] * weight[:, taps - 1].to(dtype)  # (B, D)
        visible = torch.ones(x.shape[0], 1, dtype=dtype, device=x.device)
        for back in range(1, taps):
            if segment_ids is not None and t - back >= 0:
                visible = visible * (segment_ids[:, t - back] == segment_ids[:, t - back + 1])[:, None]
            # where, not a product: an infinite input must not reach over a boundary as NaN
            seen = torch.where(visible > 0, history[:, taps - 1 + t - back], 0.0)
            total = total + seen * weight[:, taps - 1 - back].to(dtype)
        ys.append(total)
    y = torch.stack(ys, dim=1)  # (B, T, D)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)
