"""The causal depthwise convolution on CPUs: one pass over memory forward, one backward, bias and SiLU included.

A task is one batch row and up to `RANGE` blocks of 16 channels, over all of time. A carried state and channels that do
not fill a block are rare or small, so they are dealt with before the loops: the state becomes the first rows of x.

Shape letters: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import parallel
from zoo.kernels.arrays import flat, resets, rows
from zoo.kernels.simd import LANES, jit, load, sigmoid, store

RANGE = 8
"""Blocks per task."""


@jit
def _count_visible(reset, b, n_time, taps, has_resets, visible):  # type: ignore[no-untyped-def]
    """How many steps back each step sees: at most K-1, and not over the start of its segment."""
    seen = 0
    for t in range(n_time):
        if has_resets and reset[b * n_time + t]:
            seen = 0
        visible[t] = seen
        seen = min(seen + 1, taps - 1)


@jit
def _forward(  # type: ignore[no-untyped-def]
    first, last, sizes, x, x_at, weight, bias, reset, flags, y
):
    n_time, n_channels, taps = sizes
    has_silu, has_resets = flags
    n_ranges = -(-n_channels // (RANGE * LANES))
    visible = np.empty(n_time, np.int64)
    for task in range(first, last):
        b = task // n_ranges
        start = (task - b * n_ranges) * RANGE * LANES
        stop = min(n_channels, start + RANGE * LANES)
        _count_visible(reset, b, n_time, taps, has_resets, visible)
        for t in range(n_time):
            row = b * x_at[0] + t * x_at[1]
            for d0 in range(start, stop, LANES):
                out = load(bias, d0)
                for back in range(visible[t] + 1):
                    seen = load(x, row - back * x_at[1] + d0)
                    out = out + seen * load(weight, (taps - 1 - back) * n_channels + d0)
                if has_silu:
                    out = out * sigmoid(out)
                store(y, (b * n_time + t) * n_channels + d0, out)


@jit
def _backward(  # type: ignore[no-untyped-def]
    first, last, sizes, dy, x, x_at, weight, bias, reset, flags, dx, dweight, dbias
):
    n_time, n_channels, taps = sizes
    has_silu, has_resets = flags
    n_ranges = -(-n_channels // (RANGE * LANES))
    visible = np.empty(n_time, np.int64)
    # Gradients before the activation, of the K steps from t on: step t is in row t % K.
    recent = np.empty(taps * RANGE * LANES, x.dtype)
    for task in range(first, last):
        b = task // n_ranges
        start = (task - b * n_ranges) * RANGE * LANES
        stop = min(n_channels, start + RANGE * LANES)
        _count_visible(reset, b, n_time, taps, has_resets, visible)
        for d in range(start, stop):
            dbias[b * n_channels + d] = 0.0
            for tap in range(taps):
                dweight[(b * taps + tap) * n_channels + d] = 0.0
        for t in range(n_time - 1, -1, -1):
            row = b * x_at[0] + t * x_at[1]
            for d0 in range(start, stop, LANES):
                grad = load(dy, (b * n_time + t) * n_channels + d0)
                if has_silu:
                    out = load(bias, d0)
                    for back in range(visible[t] + 1):
                        seen = load(x, row - back * x_at[1] + d0)
                        out = out + seen * load(weight, (taps - 1 - back) * n_channels + d0)
                    s = sigmoid(out)
                    grad = grad * (s * (1.0 + out * (1.0 - s)))
                store(recent, (t % taps) * RANGE * LANES + d0 - start, grad)
                store(dbias, b * n_channels + d0, load(dbias, b * n_channels + d0) + grad)
                for back in range(visible[t] + 1):
                    at = (b * taps + taps - 1 - back) * n_channels + d0
                    store(dweight, at, load(dweight, at) + grad * load(x, row - back * x_at[1] + d0))
                x_grad = grad * load(weight, (taps - 1) * n_channels + d0)
                for ahead in range(1, min(taps, n_time - t)):
                    if visible[t + ahead] < ahead:
                        break
                    later = load(recent, ((t + ahead) % taps) * RANGE * LANES + d0 - start)
                    x_grad = x_grad + later * load(weight, (taps - 1 - ahead) * n_channels + d0)
                store(dx, (b * n_time + t) * n_channels + d0, x_grad)


def _whole_blocks(*tensors: Tensor | None) -> list[Any]:
    """Adds zero channels in the last dimension up to a multiple of 16."""
    return [x if x is None or x.shape[-1] % LANES == 0 else F.pad(x, (0, -x.shape[-1] % LANES)) for x in tensors]


def _with_state(x: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Puts the carried inputs in front of x, and into the first segment of each row."""
    if initial_state is None:
        return x, segment_ids
    if segment_ids is not None:
        carried = segment_ids[:, :1].expand(-1, initial_state.shape[1])
        segment_ids = torch.cat([carried, segment_ids], dim=1)  # (B, K-1+T)
    return torch.cat([initial_state.to(x.dtype), x], dim=1), segment_ids


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """Returns y (B, T, D); see the contract in `op`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_time, n_channels = x.shape[1:]
    x, segment_ids = _with_state(x, initial_state, segment_ids)
    x, taps, bias = _whole_blocks(x, weight.t(), bias)  # taps (K, D)
    y = torch.empty(x.shape, dtype=dtype)
    parallel.run(
        _forward,
        x.shape[0] * -(-x.shape[2] // (RANGE * LANES)),
        x.numel() * taps.shape[0],
        (x.shape[1], x.shape[2], taps.shape[0]),
        *rows(x, dtype),
        flat(taps, dtype),
        flat(bias, dtype, x.shape[2]),
        resets(segment_ids),
        (activation == "silu", segment_ids is not None),
        y.view(-1).numpy(),
    )
    return y[:, -n_time:, :n_channels].to(x.dtype).contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and the initial state; see the contract in `op`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_time, n_channels = x.shape[1:]
    x, segment_ids = _with_state(x, initial_state, segment_ids)
    if x.shape[1] > n_time:
        dy = F.pad(dy, (0, 0, x.shape[1] - n_time, 0))
    dy, x, taps, bias = _whole_blocks(dy, x, weight.t(), bias)
    n_batch = x.shape[0]
    dx = torch.empty(x.shape, dtype=dtype)
    dweight = torch.empty((n_batch, *taps.shape), dtype=dtype)
    dbias = torch.empty((n_batch, x.shape[2]), dtype=dtype)
    parallel.run(
        _backward,
        n_batch * -(-x.shape[2] // (RANGE * LANES)),
        2 * x.numel() * taps.shape[0],
        (x.shape[1], x.shape[2], taps.shape[0]),
        flat(dy, dtype),
        *rows(x, dtype),
        flat(taps, dtype),
        flat(bias, dtype, x.shape[2]),
        resets(segment_ids),
        (activation == "silu", segment_ids is not None),
        *(gradient.view(-1).numpy() for gradient in (dx, dweight, dbias)),
    )
    dx = dx[..., :n_channels]
    dinitial_state = dx[:, :-n_time].clone()  # (B, K-1, D), empty where there was none
    return dx[:, -n_time:], dweight.sum(0).t()[:n_channels], dbias.sum(0)[:n_channels], dinitial_state
