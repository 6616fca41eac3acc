"""What the operators of `zoo.kernels` are timed on: inputs as in the models, one case for each, and their peers.

Letters: B batch, T time, D channels, H heads, G groups of heads, K width of a head, N state size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import kernels

D, H, K, N, TAPS, MIXES, WINDOW, BLOCK = 256, 4, 64, 16, 4, 5, 256, 64
Inputs = dict[str, Any]
"""Tensors by the names of the operator's arguments."""


@dataclass(frozen=True)
class Draw:
    """Random numbers, the same ones for each device and dtype.

    Attributes:
        device: Where they are wanted.
        dtype: To which they are rounded.
        exact: Whether they come in float64, still rounded: what truth is computed from.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    exact: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return self.like(torch.randn(*shape, generator=self.generator))

    def like(self, values: Tensor) -> Tensor:
        """Those values."""
        rounded = values.to(self.dtype)
        return (rounded.double() if self.exact else rounded).to(self.device)


@dataclass(frozen=True)
class Case:
    """An operator and what it is called with."""

    inputs: Inputs
    """Those that have gradients."""
    call: Callable[[Inputs, str], Tensor]
    """`call(inputs, backend)`: the operator's first output."""
    peers: dict[str, tuple[str, Callable[[Inputs], Tensor]]] = field(default_factory=dict)
    """Name -> the package it needs, and the same function of the same inputs by others' code."""

    def on(self, backend: str) -> Callable[[Inputs], Tensor]:
        """The call on one backend."""
        return lambda inputs: self.call(inputs, backend)


def _causal_conv1d(draw: Draw, batch: int, length: int) -> Case:
    inputs = {"x": draw(batch, length, D), "weight": draw(D, TAPS), "bias": draw(D)}

    def conv1d(x: Inputs) -> Tensor:
        y = F.conv1d(x["x"].transpose(1, 2), x["weight"][:, None], x["bias"], padding=TAPS - 1, groups=D)  # (B, D, T+3)
        return F.silu(y[..., :length]).transpose(1, 2)

    return Case(
        inputs,
        lambda x, backend: kernels.causal_conv1d(**x, activation="silu", backend=backend)[0],
        {"torch conv1d": ("torch", conv1d)},
    )


def _linear(draw: Draw, batch: int, length: int) -> Case:
    inputs = {"x": draw(batch, length, D), "weight": draw(4 * D, D)}
    return Case(inputs, lambda x, backend: kernels.linear(**x, backend=backend))


def _selective_scan(draw: Draw, batch: int, length: int) -> Case:
    inputs = {"u": draw(batch, length, D), "dt": draw(batch, length, D), "A": draw.like(_decays(D, N))}
    inputs |= {"B": draw(batch, length, N), "C": draw(batch, length, N), "D": draw(D), "z": draw(batch, length, D)}
    inputs["dt_bias"] = draw.like(torch.full((D,), -3.0))

    def mambapy(x: Inputs) -> Tensor:
        from mambapy.pscan import pscan

        delta = F.softplus(x["dt"] + x["dt_bias"])[..., None]  # (B, T, D, 1)
        new = delta * x["B"][:, :, None] * x["u"][..., None]  # (B, T, D, N)
        states = pscan(torch.exp(delta * x["A"]), new)
        return ((states @ x["C"][..., None])[..., 0] + x["D"] * x["u"]) * F.silu(x["z"])

    return Case(
        inputs,
        lambda x, backend: kernels.selective_scan(**x, dt_softplus=True, backend=backend)[0],
        {"mambapy pscan": ("mambapy", mambapy)},
    )


def _ssd(draw: Draw, batch: int, length: int) -> Case:
    heads = 2 * H
    inputs = {
        "x": draw(batch, length, heads, K),
        "dt": draw(batch, length, heads),
        "A": draw.like(_decays(1, heads)[0]),
    }
    inputs |= {"B": draw(batch, length, 1, K), "C": draw(batch, length, 1, K), "D": draw(heads)}
    inputs["dt_bias"] = draw.like(torch.full((heads,), -3.0))
    return Case(inputs, lambda x, backend: kernels.ssd(**x, dt_softplus=True, backend=backend)[0])


def _token_shift(draw: Draw, batch: int, length: int) -> Case:
    inputs = {"x": draw(batch, length, D), "mu": draw(MIXES, D)}
    return Case(inputs, lambda x, backend: torch.stack(kernels.token_shift(**x, backend=backend)[0]))


def _wkv4(draw: Draw, batch: int, length: int) -> Case:
    inputs = {"w": draw.like(-_spread(D)), "u": draw(D), "k": draw(batch, length, D), "v": draw(batch, length, D)}
    return Case(inputs, lambda x, backend: kernels.wkv4(**x, backend=backend)[0])


def _wkv7(draw: Draw, batch: int, length: int) -> Case:
    shape = (batch, length, H, K)
    r, k, v, change, rate = (draw(*shape) for _ in range(5))
    kappa = F.normalize(change, dim=-1)
    inputs = {"r": r, "w": draw.like(-_spread(K).expand(shape)), "k": k, "v": v, "a": -kappa}
    inputs["b"] = kappa * torch.sigmoid(rate)
    return Case(inputs, lambda x, backend: kernels.wkv7(**x, backend=backend)[0])


def _attention(window: int | None) -> Callable[[Draw, int, int], Case]:
    def make(draw: Draw, batch: int, length: int) -> Case:
        ends = torch.arange(1, length + 1, device=draw.device)[None]  # (1, T)
        begins = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
        pattern = kernels.Pattern(begins, ends)
        keys = torch.arange(length, device=draw.device)
        mask = None if window is None else (keys >= begins[0, :, None]) & (keys < ends[0, :, None])  # (T, T)

        def sdpa(x: Inputs) -> Tensor:
            q, k, v = (x[name].transpose(1, 2) for name in "qkv")  # (B, H, T, K)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)

        return Case(
            {name: draw(batch, length, H, K) for name in "qkv"},
            lambda x, backend: kernels.sparse_attention(**x, pattern=pattern, backend=backend),
            {"torch SDPA": ("torch", sdpa)},
        )

    return make


def _landmark_attention(draw: Draw, batch: int, length: int) -> Case:
    slots = torch.arange(length, device=draw.device)[None]  # (1, T)
    begins = torch.zeros_like(slots)
    return Case(
        {name: draw(batch, length, H, K) for name in "qkv"},
        lambda x, backend: kernels.landmark_attention(
            **x, slots=slots, begins=begins, block=BLOCK - 1, backend=backend
        ),
    )


def _relative_attention(draw: Draw, batch: int, length: int) -> Case:
    """Segments that each see themselves and the one before, as in Transformer-XL."""
    queries = min(WINDOW, length)
    n = -(-length // queries)
    before = torch.arange(n, device=draw.device)[None, :, None] - 1  # (1, segments, 1)
    segments = kernels.Segments(
        (before * queries).clamp(min=0), (before >= 0) * queries, torch.full((1, n), queries, device=draw.device)
    )
    inputs = {name: draw(batch, n, queries, H, K) for name in "qpkv"}
    inputs |= {name: draw(batch, n * queries, H, K) for name in ("memory_k", "memory_v")}
    inputs["r"] = draw(2 * queries, H, K)
    return Case(inputs, lambda x, backend: kernels.relative_attention(**x, segments=segments, backend=backend)[0])


def _decays(rows: int, states: int) -> Tensor:
    """-(1..N), as Mamba begins: (rows, states)."""
    return -torch.arange(1.0, states + 1).repeat(rows, 1)


def _spread(channels: int) -> Tensor:
    """Rates of decay from fast to slow, (channels,)."""
    return torch.logspace(0, -3, channels)


CASES: dict[str, tuple[str, Callable[[Draw, int, int], Case]]] = {
    "causal_conv1d": ("causal_conv1d", _causal_conv1d),
    "landmark_attention": ("landmark_attention", _landmark_attention),
    "linear": ("linear", _linear),
    "relative_attention": ("relative_attention", _relative_attention),
    "selective_scan": ("selective_scan", _selective_scan),
    "sparse_attention": ("sparse_attention", _attention(None)),
    "sparse_attention in a window": ("sparse_attention", _attention(WINDOW)),
    "ssd": ("ssd", _ssd),
    "token_shift": ("token_shift", _token_shift),
    "wkv4": ("wkv4", _wkv4),
    "wkv7": ("wkv7", _wkv7),
}
"""Name -> the operator, and what makes its case: `(draw, B, T)`."""
