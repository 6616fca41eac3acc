"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairing.

Letters: B batch, T time, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.layers.rope_scaling import RopeScaling


class Rotary:
    """Rotates queries and keys by their positions.

    Args:
        width: K, even.
        base: Base of the geometric sequence of wavelengths.
        scaling: Of the frequencies.
    """

    def __init__(self, width: int, base: float, scaling: RopeScaling) -> None:
        self.width, self.base, self.scaling = width, base, scaling

    @property
    def grows(self) -> bool:
        """Whether the rotation depends on the current length, so that keys can only be kept as they were before it."""
        return self.scaling.grows

    def __call__(self, x: Tensor, positions: Tensor, lengths: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """Rotates x (B, T, H, K).

        Args:
            x: Queries or keys.
            positions: Integers, (T,), (B, T), or (B, T, H).
            lengths: Where the rotation `grows`: the current length, of a shape that broadcasts with that of positions.
            exact: Angles in fp64, for positions of which fp32 angles lose more than can be lost: 6e-8 of them.
        """
        dtype = torch.float64 if exact or x.dtype == torch.float64 else torch.float32
        cos, sin = self.angles(positions, lengths, dtype)
        if positions.ndim < 3:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, K)
        if exact:
            compute = torch.promote_types(x.dtype, torch.float32)
            cos, sin = cos.to(compute), sin.to(compute)
        return rotate(x, cos, sin)

    def angles(self, positions: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine, each (*positions.shape, K), of position times frequency; see `rotate`."""
        exponents = torch.arange(0, self.width, 2, device=positions.device, dtype=dtype) / self.width
        lengths = None if lengths is None else lengths[..., None]
        frequencies, factor = self.scaling.frequencies(self.base, exponents, lengths)
        angles = positions.to(dtype)[..., None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if isinstance(factor, Tensor) or factor != 1:
            cos, sin = cos * factor, sin * factor
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel j of the first half with channel j of the second half.

    With the sign in `sin`, swapping the halves by a roll needs half the memory traffic of treating them apart.

    Args:
        x: (B, T, H, K).
        cos: (T, 1, K), or (B, T, 1, K), or (B, T, H, K).
        sin: Like `cos`, negative in the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
