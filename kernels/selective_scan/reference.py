"""The selective scan as a plain loop over time: the truth that every other backend is tested against.

Shape letters: B batch, T time, D channels, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd, any number of times; arguments and results as in `zoo.kernels.selective_scan`."""
    out_dtype = u.dtype
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, dt, A, B, C = (x.to(dtype) for x in (u, dt, A, B, C))

    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    # threshold: beyond it softplus(x) == x in float64 as well, and the default of 20 does not reach 1e-10
    delta = F.softplus(dt, threshold=40.0) if dt_softplus else dt

    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(u.shape[1]):
        if segment_ids is not None and t > 0:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            state = torch.where(same[:, None, None], state, torch.zeros_like(state))
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, D, N)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]  # (B, D, N)
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    y = torch.stack(ys, dim=1)  # (B, T, D)

    if D is not None:
        y = y + u * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), state
