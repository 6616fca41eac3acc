"""The loops of the numba backend: compiled, over vectors of 16 value channels.

The rows of a state, one per value channel, do not act on each other. A block is 32 of them, two vectors: every number
of r, w, k, a, b that is read then serves 32 rows. The state of a block is K pairs of vectors; V is a multiple of 32
here. A task is one head of one batch row, or one block of it; tasks run in parallel and never share memory that they
write. The README of this folder derives the backward pass.

Arrays are flat; `r_at`, `v_at` ... are strides over B, T and H. `decay` is exp(w).

Shape letters: B batch, T time, H heads, K key channels, V value channels, C chunks, R tasks of one head.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from zoo.kernels.simd import LANES, broadcast, inlined, jit, load, prefetch, scratch, splat, store, totals
from zoo.kernels.wkv7.op import VALUES


@jit
def _rows_to_vectors(matrix, row, vectors, n_keys):
    """Turns `VALUES` rows of K numbers into K pairs of vectors with one lane per row."""
    for i in range(n_keys):
        for lane in range(VALUES):
            vectors[i * VALUES + lane] = matrix[(row + lane) * n_keys + i]


@jit
def _vectors_to_rows(vectors, matrix, row, n_keys):
    for i in range(n_keys):
        for lane in range(VALUES):
            matrix[(row + lane) * n_keys + i] = vectors[i * VALUES + lane]


@jit
def _zero(vectors, at, count):
    for i in range(at, at + count):
        vectors[i] = 0.0


@inlined
def _row(strides, b, t, h):
    return b * strides[0] + t * strides[1] + h * strides[2]


@inlined
def _prefetch(array, at, count):
    for i in range(at, at + count, LANES):
        prefetch(array, i)


@inlined
def _read(state, at, a, a_row, n_keys):
    """S a, as two vectors."""
    q0 = splat(a.dtype.type(0))
    q1 = q0
    for i in range(n_keys):
        a_i = broadcast(a, a_row + i)
        q0 = q0 + load(state, at + i * VALUES) * a_i
        q1 = q1 + load(state, at + i * VALUES + LANES) * a_i
    return q0, q1


@inlined
def _add_totals(partial, out, at, more):
    """Sums 16 vectors over their lanes into out[at : at + 16], or adds the sums to what is there."""
    value = totals(partial, 0)
    if more:
        value = value + load(out, at)
    store(out, at, value)


@jit
def forward(
    first,
    last,
    sizes,
    r,
    r_at,
    decay,
    decay_at,
    k,
    k_at,
    v,
    v_at,
    a,
    a_at,
    b,
    b_at,
    initial_state,
    resets,
    flags,
    y,
    final_state,
    checkpoints,
):
    """Goes forward in time, chunk by chunk over the blocks of a task; stores the state at the start of each chunk."""
    n_time, n_heads, n_keys, n_values, n_parts, steps = sizes
    has_initial, has_resets, save = flags
    n_chunks = -(-n_time // steps)
    block_size = n_keys * VALUES
    zero = splat(v.dtype.type(0))
    states = scratch(n_values * n_keys, v)

    for task in range(first, last):
        slab, part = divmod(task, n_parts)
        n, h = divmod(slab, n_heads)
        channels = range(part * n_values // n_parts, (part + 1) * n_values // n_parts, VALUES)
        for c in channels:
            state = states[c * n_keys : c * n_keys + block_size]
            if has_initial:
                _rows_to_vectors(initial_state, slab * n_values + c, state, n_keys)
            else:
                _zero(state, 0, block_size)

        for chunk in range(n_chunks):
            start = chunk * steps
            stop = min(n_time, start + steps)
            for c in channels:
                state = states[c * n_keys : c * n_keys + block_size]
                if save:
                    saved = (((n * n_chunks + chunk) * n_heads + h) * n_values + c) * n_keys
                    for i in range(0, block_size, LANES):
                        store(checkpoints, saved + i, load(state, i))

                q0, q1 = _read(state, 0, a, _row(a_at, n, start, h), n_keys)
                for t in range(start, stop):
                    if has_resets and resets[n * n_time + t]:
                        _zero(state, 0, block_size)
                        q0 = zero
                        q1 = zero
                    r_row = _row(r_at, n, t, h)
                    decay_row = _row(decay_at, n, t, h)
                    k_row = _row(k_at, n, t, h)
                    b_row = _row(b_at, n, t, h)
                    a_row = _row(a_at, n, min(t + 1, stop - 1), h)
                    v_row = _row(v_at, n, t, h) + c
                    x0 = load(v, v_row)
                    x1 = load(v, v_row + LANES)
                    y0, y1, next0, next1 = zero, zero, zero, zero
                    for i in range(n_keys):
                        j = i * VALUES
                        decay_i = broadcast(decay, decay_row + i)
                        k_i = broadcast(k, k_row + i)
                        b_i = broadcast(b, b_row + i)
                        s0 = load(state, j) * decay_i + (q0 * b_i + x0 * k_i)
                        s1 = load(state, j + LANES) * decay_i + (q1 * b_i + x1 * k_i)
                        store(state, j, s0)
                        store(state, j + LANES, s1)
                        r_i = broadcast(r, r_row + i)
                        y0 = y0 + s0 * r_i
                        y1 = y1 + s1 * r_i
                        # What the next step reads, while the state is in registers.
                        a_i = broadcast(a, a_row + i)
                        next0 = next0 + s0 * a_i
                        next1 = next1 + s1 * a_i
                    q0 = next0
                    q1 = next1
                    token = ((n * n_time + t) * n_heads + h) * n_values + c
                    store(y, token, y0)
                    store(y, token + LANES, y1)

        for c in channels:
            _vectors_to_rows(states[c * n_keys : c * n_keys + block_size], final_state, slab * n_values + c, n_keys)


@jit
def backward(
    first,
    last,
    sizes,
    dy,
    dfinal_state,
    r,
    r_at,
    decay,
    decay_at,
    k,
    k_at,
    v,
    v_at,
    a,
    a_at,
    b,
    b_at,
    resets,
    flags,
    checkpoints,
    dr,
    dw,
    dk,
    dv,
    da,
    db,
    dinitial_state,
):
    """Goes back in time: for each chunk and block, recomputes the states from the checkpoint, then runs the adjoint."""
    n_batch, n_time, n_heads, n_keys, n_values, n_parts, steps = sizes
    has_final, has_resets = flags
    n_chunks = -(-n_time // steps)
    n_padded = -(-n_keys // LANES) * LANES
    block_size = n_keys * VALUES
    zero = splat(v.dtype.type(0))
    state_grads = scratch(n_values * n_keys, v)
    # One chunk of one block: the state before each step, one more after the last, and what each step read from it.
    states = scratch((steps + 1) * block_size, v)
    reads = scratch(steps * VALUES, v)
    # Products of 16 keys that are still to be summed over the lanes.
    some = scratch(LANES * LANES, v)
    others = scratch(LANES * LANES, v)

    for task in range(first, last):
        slab, part = divmod(task, n_parts)
        n, h = divmod(slab, n_heads)
        first_channel = part * n_values // n_parts
        channels = range(first_channel, (part + 1) * n_values // n_parts, VALUES)
        for c in channels:
            state_grad = state_grads[c * n_keys : c * n_keys + block_size]
            if has_final:
                _rows_to_vectors(dfinal_state, slab * n_values + c, state_grad, n_keys)
            else:
                _zero(state_grad, 0, block_size)

        for chunk in range(n_chunks - 1, -1, -1):
            start = chunk * steps
            stop = min(n_time, start + steps)
            for c in channels:
                more = c != first_channel
                state_grad = state_grads[c * n_keys : c * n_keys + block_size]
                saved = (((n * n_chunks + chunk) * n_heads + h) * n_values + c) * n_keys
                for i in range(0, block_size, LANES):
                    store(states, i, load(checkpoints, saved + i))

                q0, q1 = _read(states, 0, a, _row(a_at, n, start, h), n_keys)
                for t in range(start, stop):
                    at = (t - start) * block_size
                    if has_resets and resets[n * n_time + t]:
                        _zero(states, at, block_size)
                        q0 = zero
                        q1 = zero
                    store(reads, (t - start) * VALUES, q0)
                    store(reads, (t - start) * VALUES + LANES, q1)
                    decay_row = _row(decay_at, n, t, h)
                    k_row = _row(k_at, n, t, h)
                    b_row = _row(b_at, n, t, h)
                    a_row = _row(a_at, n, min(t + 1, stop - 1), h)
                    v_row = _row(v_at, n, t, h) + c
                    x0 = load(v, v_row)
                    x1 = load(v, v_row + LANES)
                    token = ((n * n_time + t) * n_heads + h) * n_values + c
                    dy0 = load(dy, token)
                    dy1 = load(dy, token + LANES)
                    out = (((part * n_batch + n) * n_time + t) * n_heads + h) * n_padded
                    # The rows of a head are too far apart for the hardware to fetch the next chunk by itself.
                    if c == first_channel and chunk > 0:
                        _prefetch(r, _row(r_at, n, t - steps, h), n_keys)
                        _prefetch(decay, _row(decay_at, n, t - steps, h), n_keys)
                        _prefetch(k, _row(k_at, n, t - steps, h), n_keys)
                        _prefetch(a, _row(a_at, n, t - steps, h), n_keys)
                        _prefetch(b, _row(b_at, n, t - steps, h), n_keys)
                        _prefetch(v, _row(v_at, n, t - steps, h) + c, len(channels) * VALUES)
                        _prefetch(dy, token - steps * n_heads * n_values, len(channels) * VALUES)
                        _prefetch(dv, token - steps * n_heads * n_values, len(channels) * VALUES)
                        for gradient in (dr, dw, dk, da, db):
                            _prefetch(gradient, out - steps * n_heads * n_padded, n_padded)
                    next0, next1 = zero, zero
                    for group in range(0, n_keys, LANES):
                        for i in range(group, min(n_keys, group + LANES)):
                            j = at + i * VALUES
                            decay_i = broadcast(decay, decay_row + i)
                            k_i = broadcast(k, k_row + i)
                            b_i = broadcast(b, b_row + i)
                            s0 = load(states, j) * decay_i + (q0 * b_i + x0 * k_i)
                            s1 = load(states, j + LANES) * decay_i + (q1 * b_i + x1 * k_i)
                            store(states, j + block_size, s0)
                            store(states, j + block_size + LANES, s1)
                            a_i = broadcast(a, a_row + i)
                            next0 = next0 + s0 * a_i
                            next1 = next1 + s1 * a_i
                            store(some, (i - group) * LANES, s0 * dy0 + s1 * dy1)
                        _add_totals(some, dr, out + group, more)
                    q0 = next0
                    q1 = next1

                for t in range(stop - 1, start - 1, -1):
                    at = (t - start) * block_size
                    q0 = load(reads, (t - start) * VALUES)
                    q1 = load(reads, (t - start) * VALUES + LANES)
                    r_row = _row(r_at, n, t, h)
                    k_row = _row(k_at, n, t, h)
                    b_row = _row(b_at, n, t, h)
                    v_row = _row(v_at, n, t, h) + c
                    x0 = load(v, v_row)
                    x1 = load(v, v_row + LANES)
                    token = ((n * n_time + t) * n_heads + h) * n_values + c
                    dy0 = load(dy, token)
                    dy1 = load(dy, token + LANES)
                    out = (((part * n_batch + n) * n_time + t) * n_heads + h) * n_padded
                    dv0, dv1, dq0, dq1 = zero, zero, zero, zero
                    for group in range(0, n_keys, LANES):
                        for i in range(group, min(n_keys, group + LANES)):
                            j = i * VALUES
                            r_i = broadcast(r, r_row + i)
                            g0 = load(state_grad, j) + dy0 * r_i
                            g1 = load(state_grad, j + LANES) + dy1 * r_i
                            store(state_grad, j, g0)
                            store(state_grad, j + LANES, g1)
                            k_i = broadcast(k, k_row + i)
                            dv0 = dv0 + g0 * k_i
                            dv1 = dv1 + g1 * k_i
                            b_i = broadcast(b, b_row + i)
                            dq0 = dq0 + g0 * b_i
                            dq1 = dq1 + g1 * b_i
                            store(some, (i - group) * LANES, g0 * x0 + g1 * x1)
                            store(others, (i - group) * LANES, g0 * q0 + g1 * q1)
                        _add_totals(some, dk, out + group, more)
                        _add_totals(others, db, out + group, more)
                    store(dv, token, dv0)
                    store(dv, token + LANES, dv1)

                    decay_row = _row(decay_at, n, t, h)
                    a_row = _row(a_at, n, t, h)
                    for group in range(0, n_keys, LANES):
                        for i in range(group, min(n_keys, group + LANES)):
                            j = i * VALUES
                            decay_i = broadcast(decay, decay_row + i)
                            a_i = broadcast(a, a_row + i)
                            s0 = load(states, at + j)
                            s1 = load(states, at + j + LANES)
                            g0 = load(state_grad, j) * decay_i
                            g1 = load(state_grad, j + LANES) * decay_i
                            store(some, (i - group) * LANES, g0 * s0 + g1 * s1)
                            store(others, (i - group) * LANES, dq0 * s0 + dq1 * s1)
                            store(state_grad, j, g0 + dq0 * a_i)
                            store(state_grad, j + LANES, g1 + dq1 * a_i)
                        _add_totals(some, dw, out + group, more)
                        _add_totals(others, da, out + group, more)
                    if has_resets and resets[n * n_time + t]:
                        _zero(state_grad, 0, block_size)

        for c in channels:
            _vectors_to_rows(
                state_grads[c * n_keys : c * n_keys + block_size], dinitial_state, slab * n_values + c, n_keys
            )
