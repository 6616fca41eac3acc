"""The loops of the numba backend: compiled, over vectors of 16 channels.

A task is one batch row and one block of 16 channels; tasks run in parallel and never share memory that they write.
Inside a block, lane i of a vector is channel d0 + i. The tasks of one call go through time together, chunk by chunk, so
that memory is read in rows longer than a block. D is a multiple of 16 here. The README of this folder derives the
backward pass and the two-part exponent.

Arrays are flat; `k_at`, `v_at` are strides over B and T. Exponents are compared in units of ln 2, for exp2.

Shape letters: B batch, T time, D channels, K chunks.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.simd import LANES, LOG2_E, absolute, exp2, inlined, jit, load, store, where_negative
from zoo.kernels.wkv4.op import CHUNK
from zoo.kernels.wkv4.reference import NEUTRAL

STATE = 4 * LANES
"""Numbers in the state of a block: numerator p, denominator q, and the exponent's base and age."""


@inlined
def _weights(lead, one):
    """Weights of past and token, the larger of them 1, where the past's scale leads the token's by `lead` (log2)."""
    smaller = exp2(0.0 - absolute(lead))
    return where_negative(lead, smaller, one), where_negative(lead, one, smaller)


@inlined
def _output_weights(base, age, key, bonus, decay, one):
    return _weights(age * decay - (key - base) * LOG2_E - bonus, one)


@inlined
def _advance(p, q, base, age, key, value, decay, one):
    """The state after a token, and what the old state and the token were multiplied with."""
    older = age + 1.0
    lead = older * decay - (key - base) * LOG2_E
    keep, add = _weights(lead, one)
    p = keep * p + add * value
    q = keep * q + add
    return p, q, where_negative(lead, key, base), where_negative(lead, one * 0.0, older), keep, add


@jit
def forward(first, last, sizes, w, u, k, k_at, v, v_at, initial_state, resets, flags, y, final_state, checkpoints):
    """Goes forward in time; stores the state at the start of each chunk."""
    n_time, n_channels = sizes
    has_initial, has_resets, save = flags
    n_blocks = n_channels // LANES
    n_chunks = -(-n_time // CHUNK)
    states = np.empty((last - first) * STATE, k.dtype)

    for task in range(first, last):
        b, block = divmod(task, n_blocks)
        at = (task - first) * STATE
        for i in range(LANES):
            for part in range(4):
                states[at + part * LANES + i] = NEUTRAL if part == 2 else 0.0
            if has_initial:
                for part in range(3):
                    states[at + part * LANES + i] = initial_state[(b * 3 + part) * n_channels + block * LANES + i]

    for chunk in range(n_chunks):
        for task in range(first, last):
            b, block = divmod(task, n_blocks)
            d0 = block * LANES
            at = (task - first) * STATE
            bonus = load(u, d0) * LOG2_E
            decay = load(w, d0) * LOG2_E
            nothing = bonus * 0.0
            one = nothing + 1.0
            p = load(states, at)
            q = load(states, at + LANES)
            base = load(states, at + 2 * LANES)
            age = load(states, at + 3 * LANES)
            if save:
                saved = (b * n_chunks + chunk) * 4 * n_channels + d0
                store(checkpoints, saved, p)
                store(checkpoints, saved + n_channels, q)
                store(checkpoints, saved + 2 * n_channels, base)
                store(checkpoints, saved + 3 * n_channels, age)

            for t in range(chunk * CHUNK, min(n_time, (chunk + 1) * CHUNK)):
                if has_resets and resets[b * n_time + t]:
                    p, q, base, age = nothing, nothing, nothing + NEUTRAL, nothing
                key = load(k, b * k_at[0] + t * k_at[1] + d0)
                value = load(v, b * v_at[0] + t * v_at[1] + d0)
                past, now = _output_weights(base, age, key, bonus, decay, one)
                store(y, (b * n_time + t) * n_channels + d0, (past * p + now * value) / (past * q + now))
                p, q, base, age, _, _ = _advance(p, q, base, age, key, value, decay, one)

            store(states, at, p)
            store(states, at + LANES, q)
            store(states, at + 2 * LANES, base)
            store(states, at + 3 * LANES, age)
            if chunk == n_chunks - 1:
                row = b * 3 * n_channels + d0
                store(final_state, row, p)
                store(final_state, row + n_channels, q)
                store(final_state, row + 2 * n_channels, base + age * load(w, d0))


@jit
def backward(
    first,
    last,
    sizes,
    dy,
    dfinal_state,
    w,
    u,
    k,
    k_at,
    v,
    v_at,
    resets,
    flags,
    checkpoints,
    dw,
    du,
    dk,
    dv,
    dinitial_state,
):
    """Goes back in time: for each chunk and block, recomputes the states from the checkpoint, then runs the adjoint."""
    n_time, n_channels = sizes
    has_final, has_resets = flags
    n_blocks = n_channels // LANES
    n_chunks = -(-n_time // CHUNK)
    # Per block: gradients of p, q, u and w so far.
    gradients = np.zeros((last - first) * 4 * LANES, k.dtype)
    # One chunk of one block.
    decayed_p = np.empty(CHUNK * LANES, k.dtype)
    decayed_q = np.empty(CHUNK * LANES, k.dtype)
    keeps = np.empty(CHUNK * LANES, k.dtype)
    adds = np.empty(CHUNK * LANES, k.dtype)
    outs = np.empty(CHUNK * LANES, k.dtype)
    past_grads = np.empty(CHUNK * LANES, k.dtype)
    now_grads = np.empty(CHUNK * LANES, k.dtype)

    if has_final:
        for task in range(first, last):
            b, block = divmod(task, n_blocks)
            for i in range(2 * LANES):
                part, lane = divmod(i, LANES)
                gradients[(task - first) * 4 * LANES + i] = dfinal_state[
                    (b * 3 + part) * n_channels + block * LANES + lane
                ]

    for chunk in range(n_chunks - 1, -1, -1):
        start = chunk * CHUNK
        stop = min(n_time, start + CHUNK)
        for task in range(first, last):
            b, block = divmod(task, n_blocks)
            d0 = block * LANES
            at = (task - first) * 4 * LANES
            bonus = load(u, d0) * LOG2_E
            decay = load(w, d0) * LOG2_E
            nothing = bonus * 0.0
            one = nothing + 1.0
            saved = (b * n_chunks + chunk) * 4 * n_channels + d0
            p = load(checkpoints, saved)
            q = load(checkpoints, saved + n_channels)
            base = load(checkpoints, saved + 2 * n_channels)
            age = load(checkpoints, saved + 3 * n_channels)

            for t in range(start, stop):
                if has_resets and resets[b * n_time + t]:
                    p, q, base, age = nothing, nothing, nothing + NEUTRAL, nothing
                key = load(k, b * k_at[0] + t * k_at[1] + d0)
                value = load(v, b * v_at[0] + t * v_at[1] + d0)
                past, now = _output_weights(base, age, key, bonus, decay, one)
                share = 1.0 / (past * q + now)
                step = (t - start) * LANES
                store(outs, step, (past * p + now * value) * share)
                share = share * load(dy, (b * n_time + t) * n_channels + d0)
                store(past_grads, step, past * share)
                store(now_grads, step, now * share)
                before_p, before_q = p, q
                p, q, base, age, keep, add = _advance(p, q, base, age, key, value, decay, one)
                store(decayed_p, step, keep * before_p)
                store(decayed_q, step, keep * before_q)
                store(keeps, step, keep)
                store(adds, step, add)

            p_grad = load(gradients, at)
            q_grad = load(gradients, at + LANES)
            u_grad = nothing
            w_grad = nothing
            for t in range(stop - 1, start - 1, -1):
                step = (t - start) * LANES
                value = load(v, b * v_at[0] + t * v_at[1] + d0)
                out = load(outs, step)
                past_grad = load(past_grads, step)
                now_grad = load(now_grads, step)
                keep = load(keeps, step)
                add = load(adds, step)
                token = (b * n_time + t) * n_channels + d0
                direct = now_grad * (value - out)
                store(dv, token, now_grad + add * p_grad)
                store(dk, token, direct + add * (p_grad * value + q_grad))
                u_grad = u_grad + direct
                w_grad = w_grad + (p_grad * load(decayed_p, step) + q_grad * load(decayed_q, step))
                p_grad = keep * p_grad + past_grad
                q_grad = keep * q_grad - past_grad * out
                if has_resets and resets[b * n_time + t]:
                    p_grad, q_grad = nothing, nothing

            store(gradients, at, p_grad)
            store(gradients, at + LANES, q_grad)
            # Chunk by chunk: a sum of sums loses fewer digits over a long sequence.
            store(gradients, at + 2 * LANES, load(gradients, at + 2 * LANES) + u_grad)
            store(gradients, at + 3 * LANES, load(gradients, at + 3 * LANES) + w_grad)
            if chunk == 0:
                row = b * 3 * n_channels + d0
                store(dinitial_state, row, p_grad)
                store(dinitial_state, row + n_channels, q_grad)
                store(dinitial_state, row + 2 * n_channels, nothing)
                store(du, b * n_channels + d0, load(gradients, at + 2 * LANES))
                store(dw, b * n_channels + d0, load(gradients, at + 3 * LANES))
