"""The token shift on any device: the sequence moved by one step, and an interpolation per mix.

Shape letters: B batch, T time, D channels, M mixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _begins(segment_ids: Tensor) -> Tensor:
    """Whether a step, from the second on, begins another segment; (B, T-1, 1)."""
    return (segment_ids[:, 1:] != segment_ids[:, :-1])[..., None]


def _before(x: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """What each step sees of the one before it, (B, T, D)."""
    first = torch.zeros_like(x[:, :1]) if initial_state is None else initial_state.to(x.dtype)[:, None]
    earlier = x[:, :-1]
    if segment_ids is not None:
        earlier = earlier.masked_fill(_begins(segment_ids), 0)
    return torch.cat([first, earlier], dim=1)


def forward(x: Tensor, mu: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> list[Tensor]:
    """Returns the M mixes; see the contract in `op`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    here = x.to(dtype)
    before = _before(here, initial_state, segment_ids)
    return [torch.lerp(here, before, share).to(x.dtype).contiguous() for share in mu.to(dtype)]


def backward(
    dmixes: Sequence[Tensor], x: Tensor, mu: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, mu and the initial state; see the contract in `op`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(dtype)
    step = _before(x, initial_state, segment_ids) - x  # (B, T, D)
    dx, dbefore = torch.zeros_like(x), torch.zeros_like(x)
    dmu = []
    for dmix, share in zip(dmixes, mu.to(dtype), strict=True):
        dmix = dmix.to(dtype)
        dmu.append((dmix * step).sum((0, 1)))
        dbefore.addcmul_(dmix, share)
        dx.add_(dmix)
    dx.sub_(dbefore)
    later = dbefore[:, 1:]
    if segment_ids is not None:
        later = later.masked_fill(_begins(segment_ids), 0)
    return dx.add_(F.pad(later, (0, 0, 0, 1))), torch.stack(dmu), dbefore[:, 0]
