"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairing.

Letters: B batch, T time, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, in fp32.

    Args:
        positions: Integer positions, (...).
        head_dim: K, even.
        base: Base of the geometric sequence of wavelengths.

    Returns:
        cos and sin, each (..., 1, K/2), ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * base**-exponents  # (..., K/2)
    return angles.cos()[..., None, :], angles.sin()[..., None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel j of the first half with channel j of the second half.

    Args:
        x: (B, T, H, K).
        cos: (T, 1, K/2) or (B, T, 1, K/2).
        sin: Like `cos`.
    """
    first, second = x.chunk(2, dim=-1)  # each (B, T, H, K/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
