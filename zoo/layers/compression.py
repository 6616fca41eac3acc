"""What turns old memories into fewer of them (Rae et al. 2019, arXiv 1911.05507, section 3.1).

Letters: E evictions, S = C c slots of memories, C compressed ones, c rate, D d_model.

What is compressed is at the end of the S slots; those in front of it are zeros, as many as fill its first group of c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.linear import Linear

COMPRESSIONS = ("max", "mean", "conv", "dilated", "most_used")
LEARNT = ("conv", "dilated")
DILATIONS = (1, 2, 4)


class Pool(nn.Module):
    """The largest number, or the mean, of c neighbours.

    Args:
        rate: c.
        kind: "max" or "mean".
    """

    def __init__(self, rate: int, kind: str) -> None:
        super().__init__()
        self.rate, self.kind = rate, kind

    def forward(self, old: Tensor, exists: Tensor) -> Tensor:
        """Maps (E, S, D) to (E, C, D); `exists`, (E, S) bool: which slots there are, whole groups of c."""
        groups = old.unflatten(1, (-1, self.rate))  # (E, C, c, D)
        return groups.amax(2) if self.kind == "max" else groups.mean(2)

    def flops(self, slots: int) -> int:
        """None that count, for one eviction."""
        return 0


class Convolution(nn.Module):
    """A convolution along time with kernel and stride c: one product for each group of c neighbours.

    Args:
        d_model: D.
        rate: c.
    """

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.join = Linear(rate * d_model, d_model, bias=False)

    def forward(self, old: Tensor, exists: Tensor) -> Tensor:
        """See `Pool.forward`."""
        return self.join(old.unflatten(1, (-1, self.rate)).flatten(2))

    def flops(self, slots: int) -> int:
        """Of one eviction of S slots."""
        return 2 * slots // self.rate * self.join.weight.numel()


class DilatedConvolutions(nn.Module):
    """Residual convolutions of three slots that are 1, 2 and 4 apart, then one with kernel and stride c.

    Args:
        d_model: D.
        rate: c.
    """

    def __init__(self, d_model: int, rate: int) -> None:
        super().__init__()
        self.mix = nn.ModuleList(Linear(3 * d_model, d_model, bias=False) for _ in DILATIONS)  # oldest slot first
        self.stride = Convolution(d_model, rate)

    def forward(self, old: Tensor, exists: Tensor) -> Tensor:
        """See `Pool.forward`."""
        for gap, mix in zip(DILATIONS, self.mix, strict=True):
            padded = F.pad(old, (0, 0, gap, gap))
            mixed = mix(torch.cat((padded[:, : -2 * gap], old, padded[:, 2 * gap :]), dim=-1))
            old = (old + F.gelu(mixed)) * exists[..., None]  # or what is there would reach around its own edge
        return self.stride(old, exists)

    def flops(self, slots: int) -> int:
        """Of one eviction of S slots."""
        return 2 * slots * sum(p.numel() for p in self.mix.parameters()) + self.stride.flops(slots)


def make_compression(kind: str, d_model: int, rate: int) -> Any:
    """The compression of that name, a member of `COMPRESSIONS`; None for "most_used", which asks attention."""
    if kind == "conv":
        return Convolution(d_model, rate)
    if kind == "dilated":
        return DilatedConvolutions(d_model, rate)
    return None if kind == "most_used" else Pool(rate, kind)


def most_used(old: Tensor, usage: Tensor, wanted: Tensor, most: int) -> Tensor:
    """Of each eviction's slots those that were used most, in their order, at the end of `most` slots.

    Args:
        old: (E, S, D).
        usage: (E, S), -inf where there is no slot; of equals the older one is taken.
        wanted: (E,) int64: how many are kept.
        most: At least that many.

    Returns:
        (E, most, D), zeros in front.
    """
    best = usage.argsort(dim=1, descending=True, stable=True)[:, :most]  # (E, most)
    dropped = torch.arange(best.shape[1], device=best.device) >= wanted[:, None]
    best = best.masked_fill(dropped, -1).sort(dim=1).values
    kept = old.gather(1, best.clamp(min=0)[..., None].expand(-1, -1, old.shape[2]))
    return F.pad(kept * (best >= 0)[..., None], (0, 0, most - best.shape[1], 0))
