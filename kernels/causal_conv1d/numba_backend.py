"""The causal depthwise convolution on CPUs: one pass over memory forward, one backward, bias and SiLU included.

A task is one batch row and up to `RANGE` blocks of 16 channels, over all of time.

Shape letters: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoo.kernels import parallel
from zoo.kernels.arrays import flat, resets, rows
from zoo.kernels.simd import LANES, inlined, jit, load_some, sigmoid, store_some

RANGE = 8
"""Blocks per task."""


@jit
def _reach(reset, b, n_time, taps, has_initial, has_resets, reach):  # type: ignore[no-untyped-def]
    """How many steps back each step may look: not over a boundary, before the first step only into a state."""
    seen = taps - 1 if has_initial else 0
    for t in range(n_time):
        if has_resets and reset[b * n_time + t]:
            seen = 0
        reach[t] = seen
        seen = min(seen + 1, taps - 1)


@inlined
def _input(x, x_at, initial_state, b, t, d0, n_channels, taps, width):  # type: ignore[no-untyped-def]
    """The input at step t, which lies in the carried state where t is negative."""
    if t >= 0:
        return load_some(x, b * x_at[0] + t * x_at[1] + d0, width)
    return load_some(initial_state, (b * (taps - 1) + taps - 1 + t) * n_channels + d0, width)


@inlined
def _linear(x, x_at, weight, bias, initial_state, b, t, d0, n_channels, taps, reach, width):  # type: ignore[no-untyped-def]
    now = load_some(x, b * x_at[0] + t * x_at[1] + d0, width)
    y = load_some(bias, d0, width) + now * load_some(weight, (taps - 1) * n_channels + d0, width)
    for back in range(1, reach + 1):
        before = _input(x, x_at, initial_state, b, t - back, d0, n_channels, taps, width)
        y = y + before * load_some(weight, (taps - 1 - back) * n_channels + d0, width)
    return y


@jit
def _forward(  # type: ignore[no-untyped-def]
    first, last, sizes, x, x_at, weight, bias, initial_state, reset, flags, y
):
    n_time, n_channels, taps = sizes
    has_silu, has_initial, has_resets = flags
    n_ranges = -(-n_channels // (RANGE * LANES))
    reach = np.empty(n_time, np.int64)
    for task in range(first, last):
        b = task // n_ranges
        start = (task - b * n_ranges) * RANGE * LANES
        _reach(reset, b, n_time, taps, has_initial, has_resets, reach)
        for t in range(n_time):
            for d0 in range(start, min(n_channels, start + RANGE * LANES), LANES):
                width = min(LANES, n_channels - d0)
                out = _linear(x, x_at, weight, bias, initial_state, b, t, d0, n_channels, taps, reach[t], width)
                if has_silu:
                    out = out * sigmoid(out)
                store_some(y, (b * n_time + t) * n_channels + d0, out, width)


@jit
def _backward(  # type: ignore[no-untyped-def]
    first, last, sizes, dy, x, x_at, weight, bias, initial_state, reset, flags, dx, dweight, dbias, dinitial_state
):
    n_time, n_channels, taps = sizes
    has_silu, has_initial, has_resets = flags
    n_ranges = -(-n_channels // (RANGE * LANES))
    reach = np.empty(n_time, np.int64)
    for task in range(first, last):
        b = task // n_ranges
        start = (task - b * n_ranges) * RANGE * LANES
        stop = min(n_channels, start + RANGE * LANES)
        _reach(reset, b, n_time, taps, has_initial, has_resets, reach)
        # Gradients before the activation, of the last K steps: step t is in row t % K.
        recent = np.empty((taps, RANGE * LANES), x.dtype).ravel()
        for d in range(start, stop):
            dbias[b * n_channels + d] = 0.0
            for tap in range(taps):
                dweight[(b * taps + tap) * n_channels + d] = 0.0
        for t in range(n_time - 1, -1, -1):
            for d0 in range(start, stop, LANES):
                width = min(LANES, n_channels - d0)
                grad = load_some(dy, (b * n_time + t) * n_channels + d0, width)
                if has_silu:
                    out = _linear(x, x_at, weight, bias, initial_state, b, t, d0, n_channels, taps, reach[t], width)
                    s = sigmoid(out)
                    grad = grad * (s * (1.0 + out * (1.0 - s)))
                store_some(recent, (t % taps) * RANGE * LANES + d0 - start, grad, width)
                at = b * n_channels + d0
                store_some(dbias, at, load_some(dbias, at, width) + grad, width)
                for back in range(reach[t] + 1):
                    at = (b * taps + taps - 1 - back) * n_channels + d0
                    seen = _input(x, x_at, initial_state, b, t - back, d0, n_channels, taps, width)
                    store_some(dweight, at, load_some(dweight, at, width) + grad * seen, width)
                x_grad = _from_later(recent, weight, t, n_time, reach, d0, start, n_channels, taps, width)
                store_some(dx, (b * n_time + t) * n_channels + d0, x_grad, width)
        if has_initial:
            for t in range(1 - taps, 0):
                for d0 in range(start, stop, LANES):
                    width = min(LANES, n_channels - d0)
                    x_grad = _from_later(recent, weight, t, n_time, reach, d0, start, n_channels, taps, width)
                    store_some(dinitial_state, (b * (taps - 1) + taps - 1 + t) * n_channels + d0, x_grad, width)


@inlined
def _from_later(recent, weight, t, n_time, reach, d0, start, n_channels, taps, width):  # type: ignore[no-untyped-def]
    """The gradient of the input at step t: what the steps t .. t+K-1 that look back to it hand over."""
    x_grad = load_some(weight, d0, width) * 0.0
    for ahead in range(max(0, -t), min(taps, n_time - t)):
        if reach[t + ahead] >= ahead:
            later = load_some(recent, ((t + ahead) % taps) * RANGE * LANES + d0 - start, width)
            x_grad = x_grad + later * load_some(weight, (taps - 1 - ahead) * n_channels + d0, width)
    return x_grad


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
    n_batch, n_time, n_channels = x.shape
    y = torch.empty(x.shape, dtype=dtype)
    parallel.run(
        _forward,
        n_batch * -(-n_channels // (RANGE * LANES)),
        x.numel() * weight.shape[1],
        (n_time, n_channels, weight.shape[1]),
        *rows(x, dtype),
        flat(weight.t(), dtype),
        flat(bias, dtype, n_channels),
        flat(initial_state, dtype),
        resets(segment_ids),
        (activation == "silu", initial_state is not None, segment_ids is not None),
        y.view(-1).numpy(),
    )
    return y if y.dtype == x.dtype else y.to(x.dtype)


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
    n_batch, n_time, n_channels = x.shape
    taps = weight.shape[1]
    dx = torch.empty(x.shape, dtype=dtype)
    dweight = torch.empty((n_batch, taps, n_channels), dtype=dtype)
    dbias = torch.empty((n_batch, n_channels), dtype=dtype)
    dinitial_state = torch.empty((n_batch, taps - 1, n_channels), dtype=dtype)
    parallel.run(
        _backward,
        n_batch * -(-n_channels // (RANGE * LANES)),
        2 * x.numel() * taps,
        (n_time, n_channels, taps),
        flat(dy, dtype),
        *rows(x, dtype),
        flat(weight.t(), dtype),
        flat(bias, dtype, n_channels),
        flat(initial_state, dtype),
        resets(segment_ids),
        (activation == "silu", initial_state is not None, segment_ids is not None),
        *(gradient.view(-1).numpy() for gradient in (dx, dweight, dbias, dinitial_state)),
    )
    return dx, dweight.sum(0).t(), dbias.sum(0), dinitial_state
