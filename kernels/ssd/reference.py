"""The recurrence of Mamba-2 as a plain loop over time: the truth that every other backend is tested against.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd, any number of times; arguments and results as in `zoo.kernels.ssd`."""
    out_dtype = x.dtype
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, dt, A, B, C = (value.to(dtype) for value in (x, dt, A, B, C))
    n_batch, n_time, n_heads, n_channels = x.shape
    B, C = (value.repeat_interleave(n_heads // value.shape[2], dim=2) for value in (B, C))  # (B, T, H, N)

    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    # threshold: beyond it softplus(x) == x in float64 as well, and the default of 20 does not reach 1e-10
    delta = (F.softplus(dt, threshold=40.0) if dt_softplus else dt).clamp(*dt_limit)  # (B, T, H)

    shape = (n_batch, n_heads, n_channels, B.shape[3])
    state = x.new_zeros(shape) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(n_time):
        if segment_ids is not None and t > 0:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
        decay = torch.exp(delta[:, t] * A)  # (B, H)
        drive = delta[:, t, :, None] * x[:, t]  # (B, H, P)
        state = decay[..., None, None] * state + drive[..., None] * B[:, t, :, None, :]  # (B, H, P, N)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(ys, dim=1)  # (B, T, H, P)

    if D is not None:
        y = y + x * D.to(dtype)[:, None]
    return y.to(out_dtype), state
