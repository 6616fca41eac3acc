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
        cos and signed sin, each (..., 1, K), ready to broadcast over heads; see `rotate`.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None, None] * base**-exponents  # (..., 1, K/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel j of the first half with channel j of the second half.

    With the sign in `sin`, swapping the halves by a roll needs half the memory traffic of treating them apart.

    Args:
        x: (B, T, H, K).
        cos: (T, 1, K) or (B, T, 1, K).
        sin: Like `cos`, negative in the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
