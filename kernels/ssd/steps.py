"""Step sizes, and what else there is one of per step and head: too little work to be worth a kernel.

Shape letters: B batch, T time, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _unlimited(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Step sizes before the limits, and what went into the softplus."""
    raw = dt.to(dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype)
    return F.softplus(raw, threshold=40.0) if dt_softplus else raw, raw


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Returns delta = clamp(softplus(dt + dt_bias)), (B, T, H)."""
    return _unlimited(dt, dt_bias, dt_softplus, dtype)[0].clamp(*dt_limit)


def step_gradients(
    ddelta: Tensor, dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of dt (B, T, H) and dt_bias (H,) from that of the step sizes."""
    delta, raw = _unlimited(dt, dt_bias, dt_softplus, ddelta.dtype)
    ddt = torch.where((delta >= dt_limit[0]) & (delta <= dt_limit[1]), ddelta, 0.0)
    if dt_softplus:
        ddt *= torch.sigmoid(raw)
    return ddt, None if dt_bias is None else ddt.sum((0, 1))


def segment_numbers(segment_ids: Tensor | None) -> Tensor | None:
    """Counts each row's segments from 0, (B, T) int32: numbers never come back, as ids may."""
    if segment_ids is None:
        return None
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T-1)
    return F.pad(changes.cumsum(1, dtype=torch.int32), (1, 0))
