"""The recurrence of RWKV-7 as a plain loop over time: the truth that every other backend is tested against.

Shape letters: B batch, T time, H heads, K key channels of a head, V value channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd, any number of times; arguments and results as in `zoo.kernels.wkv7`."""
    out_dtype = v.dtype
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    r, w, k, v, a, b = (x.to(dtype) for x in (r, w, k, v, a, b))
    decay = w.exp()

    batch, time, heads, _ = r.shape
    state = r.new_zeros(batch, heads, v.shape[3], r.shape[3]) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(time):
        if segment_ids is not None and t > 0:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
        read = torch.einsum("bhvk,bhk->bhv", state, a[:, t])
        state = (
            state * decay[:, t, :, None, :]
            + read[..., None] * b[:, t, :, None, :]
            + v[:, t, :, :, None] * k[:, t, :, None, :]
        )  # (B, H, V, K)
        ys.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    return torch.stack(ys, dim=1).to(out_dtype), state
