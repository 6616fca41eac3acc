"""The loops of the numba backend: compiled, over vectors of 16 channels.

A task is one batch row and up to `RANGE` blocks of 16 channels; tasks run in parallel and never share memory that they
write. Inside a block, lane i of a vector is channel d0 + i, and the state is N such vectors. D is a multiple of 16
here. The README of this folder derives the backward pass.

Arrays are flat; `u_at`, `dt_at` ... are strides over B and T. Decays are stored times log2(e), for exp2.

Shape letters: B batch, T time, D channels, N state size, K chunks, R ranges of channels.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import math

import numpy as np

from zoo.kernels.selective_scan.op import CHUNK
from zoo.kernels.simd import (
    LANES,
    LOG2_E,
    broadcast,
    exp2,
    inlined,
    jit,
    load,
    sigmoid,
    softplus_and_slope,
    store,
    total,
)

RANGE = 8
"""Blocks per task. dB and dC are summed over a task's blocks in place, and over tasks afterwards."""

LN_2 = math.log(2)


@jit
def _columns_to_vectors(matrix, row, vectors, at, n_state, factor):
    """Turns 16 rows of N numbers into N vectors with one lane per row."""
    for n in range(n_state):
        for i in range(LANES):
            vectors[at + n * LANES + i] = matrix[(row + i) * n_state + n] * factor


@jit
def _vectors_to_columns(vectors, at, matrix, row, n_state):
    for n in range(n_state):
        for i in range(LANES):
            matrix[(row + i) * n_state + n] = vectors[at + n * LANES + i]


@jit
def _zero(vectors, at, count):
    for i in range(at, at + count):
        vectors[i] = 0.0


@inlined
def _step_size(x, softplus):
    """The step size and its derivative."""
    if softplus:
        return softplus_and_slope(x)
    return x, x * 0.0 + 1.0


@jit
def forward(
    first,
    last,
    sizes,
    u,
    u_at,
    dt,
    dt_at,
    A,
    B,
    B_at,
    C,
    C_at,
    D,
    z,
    z_at,
    dt_bias,
    initial_state,
    resets,
    flags,
    y,
    final_state,
    checkpoints,
):
    """Scans forward in time, chunk by chunk over the blocks of a range; stores the state at the start of each chunk."""
    n_time, n_channels, n_state = sizes
    has_z, softplus, has_initial, has_resets, save = flags
    n_ranges = -(-n_channels // (RANGE * LANES))
    n_chunks = -(-n_time // CHUNK)
    block_size = n_state * LANES
    decay = np.empty(RANGE * block_size, u.dtype)
    state = np.empty(RANGE * block_size, u.dtype)

    for task in range(first, last):
        b, r = divmod(task, n_ranges)
        range_start = r * RANGE * LANES
        range_stop = min(n_channels, range_start + RANGE * LANES)
        for d0 in range(range_start, range_stop, LANES):
            at = (d0 - range_start) * n_state
            _columns_to_vectors(A, d0, decay, at, n_state, LOG2_E)
            if has_initial:
                _columns_to_vectors(initial_state, b * n_channels + d0, state, at, n_state, 1.0)
            else:
                _zero(state, at, block_size)

        for chunk in range(n_chunks):
            for d0 in range(range_start, range_stop, LANES):
                at = (d0 - range_start) * n_state
                skip = load(D, d0)
                bias = load(dt_bias, d0)
                if save:
                    saved = (b * n_chunks + chunk) * n_state * n_channels + d0
                    for n in range(n_state):
                        store(checkpoints, saved + n * n_channels, load(state, at + n * LANES))

                for t in range(chunk * CHUNK, min(n_time, (chunk + 1) * CHUNK)):
                    if has_resets and resets[b * n_time + t]:
                        _zero(state, at, block_size)
                    delta, _ = _step_size(load(dt, b * dt_at[0] + t * dt_at[1] + d0) + bias, softplus)
                    x = load(u, b * u_at[0] + t * u_at[1] + d0)
                    drive = delta * x
                    out = skip * x
                    B_row = b * B_at[0] + t * B_at[1]
                    C_row = b * C_at[0] + t * C_at[1]
                    for n in range(n_state):
                        i = at + n * LANES
                        h = exp2(delta * load(decay, i)) * load(state, i) + drive * broadcast(B, B_row + n)
                        store(state, i, h)
                        out = out + h * broadcast(C, C_row + n)
                    if has_z:
                        gate = load(z, b * z_at[0] + t * z_at[1] + d0)
                        out = out * (gate * sigmoid(gate))
                    store(y, (b * n_time + t) * n_channels + d0, out)

        for d0 in range(range_start, range_stop, LANES):
            at = (d0 - range_start) * n_state
            _vectors_to_columns(state, at, final_state, b * n_channels + d0, n_state)


@jit
def backward(
    first,
    last,
    sizes,
    dy,
    dfinal_state,
    u,
    u_at,
    dt,
    dt_at,
    A,
    B,
    B_at,
    C,
    C_at,
    D,
    z,
    z_at,
    dt_bias,
    resets,
    flags,
    checkpoints,
    du,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dz,
    ddt_bias,
    dinitial_state,
):
    """Goes back in time: for each chunk and block, recomputes the states from the checkpoint, then runs the adjoint."""
    n_time, n_channels, n_state = sizes
    has_z, softplus, has_final, has_resets = flags
    n_ranges = -(-n_channels // (RANGE * LANES))
    n_chunks = -(-n_time // CHUNK)
    block_size = n_state * LANES
    decay = np.empty(RANGE * block_size, u.dtype)
    decay_grad = np.empty(RANGE * block_size, u.dtype)
    state_grad = np.empty(RANGE * block_size, u.dtype)
    skip_grad = np.empty(RANGE * LANES, u.dtype)
    bias_grad = np.empty(RANGE * LANES, u.dtype)
    state = np.empty(block_size, u.dtype)
    # One chunk of one block: the states before each step, the decays, and what the steps need per channel.
    states = np.empty(CHUNK * block_size, u.dtype)
    decays = np.empty(CHUNK * block_size, u.dtype)
    deltas = np.empty(CHUNK * LANES, u.dtype)
    slopes = np.empty(CHUNK * LANES, u.dtype)
    y_grads = np.empty(CHUNK * LANES, u.dtype)
    # One chunk, summed over the blocks of the task but not yet over the lanes.
    B_grad = np.empty(CHUNK * block_size, u.dtype)
    C_grad = np.empty(CHUNK * block_size, u.dtype)

    for task in range(first, last):
        b, r = divmod(task, n_ranges)
        range_start = r * RANGE * LANES
        range_stop = min(n_channels, range_start + RANGE * LANES)
        for d0 in range(range_start, range_stop, LANES):
            at = (d0 - range_start) * n_state
            _columns_to_vectors(A, d0, decay, at, n_state, LOG2_E)
            if has_final:
                _columns_to_vectors(dfinal_state, b * n_channels + d0, state_grad, at, n_state, 1.0)
            else:
                _zero(state_grad, at, block_size)
        _zero(decay_grad, 0, RANGE * block_size)
        _zero(skip_grad, 0, RANGE * LANES)
        _zero(bias_grad, 0, RANGE * LANES)

        for chunk in range(n_chunks - 1, -1, -1):
            start = chunk * CHUNK
            stop = min(n_time, start + CHUNK)
            _zero(B_grad, 0, CHUNK * block_size)
            _zero(C_grad, 0, CHUNK * block_size)
            for d0 in range(range_start, range_stop, LANES):
                at = (d0 - range_start) * n_state
                lane_at = d0 - range_start
                skip = load(D, d0)
                bias = load(dt_bias, d0)
                saved = (b * n_chunks + chunk) * n_state * n_channels + d0
                for n in range(n_state):
                    store(state, n * LANES, load(checkpoints, saved + n * n_channels))

                for t in range(start, stop):
                    if has_resets and resets[b * n_time + t]:
                        _zero(state, 0, block_size)
                    delta, slope = _step_size(load(dt, b * dt_at[0] + t * dt_at[1] + d0) + bias, softplus)
                    x = load(u, b * u_at[0] + t * u_at[1] + d0)
                    token = (b * n_time + t) * n_channels + d0
                    out_grad = load(dy, token)
                    y_grad = out_grad
                    if has_z:
                        gate = load(z, b * z_at[0] + t * z_at[1] + d0)
                        s = sigmoid(gate)
                        y_grad = out_grad * (gate * s)
                    drive = delta * x
                    out = skip * x
                    B_row = b * B_at[0] + t * B_at[1]
                    C_row = b * C_at[0] + t * C_at[1]
                    step = (t - start) * block_size
                    for n in range(n_state):
                        i = n * LANES
                        a = exp2(delta * load(decay, at + i))
                        before = load(state, i)
                        h = a * before + drive * broadcast(B, B_row + n)
                        store(states, step + i, before)
                        store(decays, step + i, a)
                        store(state, i, h)
                        store(C_grad, step + i, load(C_grad, step + i) + y_grad * h)
                        out = out + h * broadcast(C, C_row + n)
                    if has_z:
                        store(dz, token, out_grad * out * (s * (1.0 + gate * (1.0 - s))))
                    store(deltas, (t - start) * LANES, delta)
                    store(slopes, (t - start) * LANES, slope)
                    store(y_grads, (t - start) * LANES, y_grad)

                for t in range(stop - 1, start - 1, -1):
                    delta = load(deltas, (t - start) * LANES)
                    y_grad = load(y_grads, (t - start) * LANES)
                    x = load(u, b * u_at[0] + t * u_at[1] + d0)
                    drive = delta * x
                    drive_grad = x * 0.0
                    exponent_grad = x * 0.0
                    B_row = b * B_at[0] + t * B_at[1]
                    C_row = b * C_at[0] + t * C_at[1]
                    step = (t - start) * block_size
                    for n in range(n_state):
                        i = n * LANES
                        g = load(state_grad, at + i) + y_grad * broadcast(C, C_row + n)
                        drive_grad = drive_grad + g * broadcast(B, B_row + n)
                        store(B_grad, step + i, load(B_grad, step + i) + g * drive)
                        g = g * load(decays, step + i)
                        store(state_grad, at + i, g)
                        p = g * load(states, step + i)
                        exponent_grad = exponent_grad + p * load(decay, at + i)
                        store(decay_grad, at + i, load(decay_grad, at + i) + p * delta)
                    if has_resets and resets[b * n_time + t]:
                        _zero(state_grad, at, block_size)
                    step_grad = (drive_grad * x + exponent_grad * LN_2) * load(slopes, (t - start) * LANES)
                    token = (b * n_time + t) * n_channels + d0
                    store(du, token, drive_grad * delta + skip * y_grad)
                    store(ddt, token, step_grad)
                    store(skip_grad, lane_at, load(skip_grad, lane_at) + y_grad * x)
                    store(bias_grad, lane_at, load(bias_grad, lane_at) + step_grad)

            for t in range(start, stop):
                row = ((b * n_ranges + r) * n_time + t) * n_state
                for n in range(n_state):
                    i = (t - start) * block_size + n * LANES
                    dB[row + n] = total(load(B_grad, i))
                    dC[row + n] = total(load(C_grad, i))

        for d0 in range(range_start, range_stop, LANES):
            at = (d0 - range_start) * n_state
            row = b * n_channels + d0
            _vectors_to_columns(decay_grad, at, dA, row, n_state)
            _vectors_to_columns(state_grad, at, dinitial_state, row, n_state)
            store(dD, row, load(skip_grad, d0 - range_start))
            store(ddt_bias, row, load(bias_grad, d0 - range_start))
