"""The token shift as a plain loop: the truth that every other backend is tested against.

Shape letters: B batch, T time, D channels, M mixes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    x: Tensor, mu: Tensor, initial_state: Tensor | None = None, segment_ids: Tensor | None = None
) -> list[Tensor]:
    """Differentiable by autograd; arguments as in `zoo.kernels.token_shift`, returns the M mixes alone."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    nothing = torch.zeros_like(x[:, 0], dtype=dtype)  # (B, D)
    before = nothing if initial_state is None else initial_state.to(dtype)
    mixes: list[list[Tensor]] = [[] for _ in mu]
    for t in range(x.shape[1]):
        here = x[:, t].to(dtype)  # (B, D)
        if segment_ids is not None and t > 0:
            # where, not a product: an infinite input must not reach over a boundary as NaN
            before = torch.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None], before, nothing)
        for steps, share in zip(mixes, mu.to(dtype), strict=True):
            steps.append(here + (before - here) * share)
        before = here
    return [torch.stack(steps, dim=1).to(x.dtype) for steps in mixes]
