"""The token shift on CPUs: forward reads x once and writes every mix, backward reads x and their gradients once.

A task is one batch row and up to `PIECE` steps of it. Channels that do not fill a block of 16 are rare, so they are
padded before the loops. The M mixes, and their gradients, are arrays of their own; the loops reach the later ones by
their distance from the first, so that one compiled kernel serves any M.

Shape letters: B batch, T time, D channels, M mixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import parallel
from zoo.kernels.arrays import flat, resets, rows
from zoo.kernels.simd import LANES, inlined, jit, load, scratch, splat, store

PIECE = 64
"""Steps per task: long against the one step that a task of backward looks ahead, short against any sequence."""


@inlined
def _before(x, row, stride, initial, at, first, begins):  # type: ignore[no-untyped-def]
    """16 channels of the step before `row`: none at the start of a segment, the carried state before the first."""
    if begins:
        return splat(x.dtype.type(0))
    if first:
        return load(initial, at)
    return load(x, row - stride)


@jit
def _forward(  # type: ignore[no-untyped-def]
    first, last, sizes, x, x_at, mu, initial, reset, has_resets, mixes, mix_at
):
    n_time, n_channels, n_mixes = sizes
    n_pieces = -(-n_time // PIECE)
    for task in range(first, last):
        b = task // n_pieces
        start = (task - b * n_pieces) * PIECE
        for t in range(start, min(n_time, start + PIECE)):
            row = b * x_at[0] + t * x_at[1]
            out = (b * n_time + t) * n_channels
            begins = has_resets and reset[b * n_time + t]
            for d0 in range(0, n_channels, LANES):
                here = load(x, row + d0)
                step = _before(x, row + d0, x_at[1], initial, b * n_channels + d0, t == 0, begins) - here
                for m in range(n_mixes):
                    store(mixes, mix_at[m] + out + d0, here + step * load(mu, m * n_channels + d0))


@jit
def _backward(  # type: ignore[no-untyped-def]
    first, last, sizes, dmixes, mix_at, x, x_at, mu, initial, reset, has_resets, dx, dmu, dinitial
):
    n_time, n_channels, n_mixes = sizes
    n_pieces = -(-n_time // PIECE)
    zero = splat(x.dtype.type(0))
    later = scratch(n_channels, x)  # the gradient that the step after hands back
    for task in range(first, last):
        b = task // n_pieces
        start = (task - b * n_pieces) * PIECE
        stop = min(n_time, start + PIECE)
        sums = task * n_mixes * n_channels
        dmu[sums : sums + n_mixes * n_channels] = 0.0
        # The step after this piece belongs to another task; what it hands back is found once more here.
        out = (b * n_time + stop) * n_channels
        ends = stop == n_time or (has_resets and reset[b * n_time + stop])
        for d0 in range(0, n_channels, LANES):
            back = zero
            if not ends:
                for m in range(n_mixes):
                    back = back + load(dmixes, mix_at[m] + out + d0) * load(mu, m * n_channels + d0)
            store(later, d0, back)
        for t in range(stop - 1, start - 1, -1):
            row = b * x_at[0] + t * x_at[1]
            out = (b * n_time + t) * n_channels
            begins = has_resets and reset[b * n_time + t]
            for d0 in range(0, n_channels, LANES):
                step = _before(x, row + d0, x_at[1], initial, b * n_channels + d0, t == 0, begins) - load(x, row + d0)
                grad = zero
                back = zero
                for m in range(n_mixes):
                    at = m * n_channels + d0
                    dmix = load(dmixes, mix_at[m] + out + d0)
                    grad = grad + dmix
                    back = back + dmix * load(mu, at)
                    store(dmu, sums + at, load(dmu, sums + at) + dmix * step)
                store(dx, out + d0, grad - back + load(later, d0))
                # not a product: an infinite gradient must not reach over a boundary as NaN
                if begins:
                    store(later, d0, zero)
                else:
                    store(later, d0, back)
        if start == 0:
            for d0 in range(0, n_channels, LANES):
                store(dinitial, b * n_channels + d0, load(later, d0))


def _side_by_side(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The first of some contiguous tensors as a flat array, and how many elements behind its start each one begins."""
    start = tensors[0].data_ptr()
    distances = [(tensor.data_ptr() - start) // tensor.element_size() for tensor in tensors]
    return tensors[0].view(-1).numpy(), np.array(distances, np.int64)


def _pad(lacking: int, x: Tensor | None) -> Tensor | None:
    """Adds `lacking` zero channels in the last dimension."""
    return None if x is None else F.pad(x, (0, lacking))


def forward(x: Tensor, mu: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> list[Tensor]:
    """Returns the M mixes; see the contract in `op`."""
    n_batch, n_time, n_channels = x.shape
    if lacking := -n_channels % LANES:
        mixes = forward(F.pad(x, (0, lacking)), F.pad(mu, (0, lacking)), _pad(lacking, initial_state), segment_ids)
        return [mix[..., :n_channels].contiguous() for mix in mixes]

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_mixes = mu.shape[0]
    mixes = [torch.empty(x.shape, dtype=dtype) for _ in range(n_mixes)]
    parallel.run(
        _forward,
        n_batch * -(-n_time // PIECE),
        x.numel() * n_mixes,
        (n_time, n_channels, n_mixes),
        *rows(x, dtype),
        flat(mu, dtype),
        flat(initial_state, dtype, n_batch * n_channels),
        resets(segment_ids),
        segment_ids is not None,
        *_side_by_side(mixes),
    )
    return [mix.to(x.dtype) for mix in mixes]


def backward(
    dmixes: Sequence[Tensor], x: Tensor, mu: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, mu and the initial state; see the contract in `op`."""
    n_batch, n_time, n_channels = x.shape
    if lacking := -n_channels % LANES:
        dmixes = [F.pad(dmix, (0, lacking)) for dmix in dmixes]
        x, mu = F.pad(x, (0, lacking)), F.pad(mu, (0, lacking))
        dx, dmu, dstate = backward(dmixes, x, mu, _pad(lacking, initial_state), segment_ids)
        return dx[..., :n_channels], dmu[..., :n_channels], dstate[..., :n_channels]

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_mixes, n_tasks = mu.shape[0], n_batch * -(-n_time // PIECE)
    dmixes = [dmix.to(dtype).contiguous() for dmix in dmixes]
    dx = torch.empty(x.shape, dtype=dtype)
    dmu = torch.empty((n_tasks, n_mixes, n_channels), dtype=dtype)
    dinitial_state = torch.empty((n_batch, n_channels), dtype=dtype)
    parallel.run(
        _backward,
        n_tasks,
        2 * x.numel() * n_mixes,
        (n_time, n_channels, n_mixes),
        *_side_by_side(dmixes),
        *rows(x, dtype),
        flat(mu, dtype),
        flat(initial_state, dtype, n_batch * n_channels),
        resets(segment_ids),
        segment_ids is not None,
        *(gradient.view(-1).numpy() for gradient in (dx, dmu, dinitial_state)),
    )
    return dx, dmu.sum(0), dinitial_state
