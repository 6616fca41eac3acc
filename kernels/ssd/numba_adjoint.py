"""The backward loops of the numba backend: the same tasks, chunks and scratch as in `numba_loops`, back in time.

Gradients of B and C are kept transposed, (N, Q), until a chunk's heads are done, because then every product has its
vectors along steps or channels. The README of this folder derives the products.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size, Q = CHUNK steps.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, add_scaled, clear, copy, scale, transpose, write
from zoo.kernels.simd import LANES, jit, load, store, total
from zoo.kernels.ssd.numba_loops import decays, fade, load_rows, load_state, score, whole
from zoo.kernels.ssd.op import CHUNK


@jit
def _within(scores, grads, weights, padded, score_grads, flow):
    """From dL/dweights to dL/dscores, added up over heads, and to what flows through each decay within the chunk.

    `weights` comes in as decays [t, s] and goes out as scores * decays; flow[r] is the sum of weights * gradients over
    s < r <= t, which are the pairs that the decay of step r stands between.
    """
    for i in range(0, padded, LANES):
        store(flow, CHUNK + i, load(grads, 0) * 0.0)
    for t in range(padded - 1, -1, -1):
        row = t * CHUNK
        stop = t // LANES * LANES + LANES
        for s in range(0, stop, LANES):
            decay, gradient, weight = load(weights, row + s), load(grads, row + s), load(scores, row + s)
            weight = weight * decay
            store(weights, row + s, weight)
            store(score_grads, row + s, load(score_grads, row + s) + gradient * decay)
            store(flow, CHUNK + s, load(flow, CHUNK + s) + gradient * weight)
        # Later pairs with s = t do not pass this decay, nor any before it.
        flow[CHUNK + t] = 0.0
        sums = load(flow, CHUNK)
        for s in range(LANES, stop, LANES):
            sums = sums + load(flow, CHUNK + s)
        flow[t] = total(sums)


@jit
def _dots_and_add(matrix, part, sums, padded, height, dots):
    """dots[t] = sum over n of matrix[n, t] part[n, t], and sums += part."""
    for t in range(0, padded, LANES):
        dot = load(part, t) * 0.0
        for i in range(t, t + height * CHUNK, CHUNK):
            value = load(part, i)
            dot = dot + value * load(matrix, i)
            store(sums, i, load(sums, i) + value)
        store(dots, t, dot)


@jit
def _dot(a, b, b_at, size):
    dot = load(a, 0) * load(b, b_at)
    for i in range(LANES, size, LANES):
        dot = dot + load(a, i) * load(b, b_at + i)
    return total(dot)


@jit
def _row_dot(a, b, at, width):
    dot = load(a, at) * load(b, at)
    for i in range(at + LANES, at + width, LANES):
        dot = dot + load(a, i) * load(b, i)
    return total(dot)


@jit
def backward(
    first,
    last,
    sizes,
    dy,
    dfinal_state,
    x,
    x_at,
    delta,
    logs,
    B,
    B_at,
    C,
    C_at,
    D,
    flags,
    checkpoints,
    dx,
    ddelta,
    dlogs,
    dB,
    dC,
    dD,
    dinitial_state,
):
    """Goes through the chunks from the last to the first.

    ddelta is the gradient that reaches a step size through the drive delta x, dlogs that of the exponent delta A.
    """
    n_batch, n_time, n_heads, n_channels, n_groups, n_state, n_range = sizes
    has_skip, has_final = flags
    n_ranges = n_heads // n_groups // n_range
    n_chunks = -(-n_time // CHUNK)
    width, depth = whole(n_channels), whole(n_state)
    slab = n_state * n_channels
    state = np.empty(depth * width, x.dtype)
    state_grad = np.empty(n_range * depth * width, x.dtype)
    skip_grad = np.empty(n_range, x.dtype)
    B_rows, C_rows = np.empty(CHUNK * depth, x.dtype), np.empty(CHUNK * depth, x.dtype)
    B_columns, C_columns = np.empty(depth * CHUNK, x.dtype), np.empty(depth * CHUNK, x.dtype)
    B_grad, C_grad = np.empty(depth * CHUNK, x.dtype), np.empty(depth * CHUNK, x.dtype)
    part = np.empty(depth * CHUNK, x.dtype)  # one head's share of either
    scores, score_grads = np.empty(CHUNK * CHUNK, x.dtype), np.empty(CHUNK * CHUNK, x.dtype)
    weights, weight_grads = np.empty(CHUNK * CHUNK, x.dtype), np.empty(CHUNK * CHUNK, x.dtype)
    values, drive_grad = np.empty(CHUNK * width, x.dtype), np.empty(CHUNK * width, x.dtype)
    out_grad, out_grad_faded = np.empty(CHUNK * width, x.dtype), np.empty(CHUNK * width, x.dtype)
    columns = np.empty(width * CHUNK, x.dtype)
    heads, tails = np.empty(CHUNK, x.dtype), np.empty(CHUNK, x.dtype)
    carried, kept = np.empty(CHUNK, x.dtype), np.empty(CHUNK, x.dtype)
    flow = np.empty(2 * CHUNK, x.dtype)

    for task in range(first, last):
        b, r = divmod(task, n_groups * n_ranges)
        group = r // n_ranges
        for i in range(n_range):
            at = i * depth * width
            skip_grad[i] = 0.0
            if has_final:
                given = (b * n_heads + r * n_range + i) * slab
                load_state(dfinal_state, given, n_state, n_channels, state_grad, at)
            else:
                clear(state_grad, at, depth * width)

        for chunk in range(n_chunks - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, n_time - start)
            padded = whole(steps)
            load_rows(B, b * B_at[0] + start * B_at[1] + group * B_at[2], B_at[1], steps, n_state, B_rows, depth)
            load_rows(C, b * C_at[0] + start * C_at[1] + group * C_at[2], C_at[1], steps, n_state, C_rows, depth)
            transpose(B_rows, 0, depth, padded, depth, B_columns, 0, CHUNK)
            transpose(C_rows, 0, depth, padded, depth, C_columns, 0, CHUNK)
            score(C_rows, B_columns, padded, depth, scores)
            clear(score_grads, 0, padded * CHUNK)
            clear(B_grad, 0, depth * CHUNK)
            clear(C_grad, 0, depth * CHUNK)

            for i in range(n_range):
                at = i * depth * width
                head = r * n_range + i
                step = (b * n_time + start) * n_heads + head
                token, row = step * n_channels, n_heads * n_channels
                x_row = b * x_at[0] + start * x_at[1] + head * x_at[2]
                chunk_decay, resets = decays(logs, step, n_heads, steps, heads, tails, weights)
                saved = ((b * n_chunks + chunk) * n_heads + head) * slab
                copy(checkpoints, saved, n_channels, n_state, n_channels, state, 0, width, 1.0)
                clear(state, n_state * width, (depth - n_state) * width)
                if resets:
                    clear(state, 0, depth * width)
                load_rows(dy, token, row, steps, n_channels, out_grad, width)
                load_rows(x, x_row, x_at[1], steps, n_channels, values, width)

                # Within the chunk: weights and, through them, scores and decays.
                transpose(values, 0, width, padded, width, columns, 0, CHUNK)
                for j in range(0, width * CHUNK, CHUNK):
                    for t in range(steps):
                        columns[j + t] *= delta[step + t * n_heads]
                for t in range(0, padded, LANES):
                    for j in range(t, t + LANES):
                        clear(weight_grads, j * CHUNK, t + LANES)
                    add_product(
                        weight_grads, t * CHUNK, CHUNK, LANES, t + LANES, out_grad, t * width, width, 1,
                        columns, 0, CHUNK, width,
                    )  # fmt: skip
                _within(scores, weight_grads, weights, padded, score_grads, flow)

                # The state that leaves the chunk: what each step gave to it.
                clear(drive_grad, 0, padded * width)
                add_product(drive_grad, 0, width, padded, width, B_rows, 0, depth, 1, state_grad, at, width, depth)
                scale(drive_grad, 0, width, padded, width, tails, 0, 1)
                for s in range(0, padded, LANES):
                    add_product(
                        drive_grad, s * width, width, LANES, width, weights, s * CHUNK + s, 1, CHUNK,
                        out_grad, s * width, width, padded - s,
                    )  # fmt: skip
                for j in range(0, width * CHUNK, CHUNK):
                    for t in range(0, padded, LANES):
                        store(columns, j + t, load(columns, j + t) * load(tails, t))
                clear(part, 0, depth * CHUNK)
                add_product(part, 0, CHUNK, depth, padded, state_grad, at, width, 1, columns, 0, CHUNK, width)
                _dots_and_add(B_columns, part, B_grad, padded, depth, kept)

                # The state that enters it: what each step took from it.
                copy(out_grad, 0, width, padded, width, out_grad_faded, 0, width, 1.0)
                scale(out_grad_faded, 0, width, padded, width, heads, 0, 1)
                transpose(out_grad_faded, 0, width, padded, width, columns, 0, CHUNK)
                clear(part, 0, depth * CHUNK)
                add_product(part, 0, CHUNK, depth, padded, state, 0, width, 1, columns, 0, CHUNK, width)
                _dots_and_add(C_columns, part, C_grad, padded, depth, carried)
                passing = (
                    chunk_decay * _dot(state, state_grad, at, depth * width) if chunk_decay != 0.0 else chunk_decay
                )
                fade(state_grad, at, depth * width, chunk_decay)
                add_product(state_grad, at, width, depth, width, C_rows, 0, 1, depth, out_grad_faded, 0, width, steps)

                for t in range(steps):
                    flow[t] += passing
                    passing += kept[t]
                later = passing * 0.0
                for t in range(steps - 1, -1, -1):
                    later += carried[t]
                    here = step + t * n_heads
                    dlogs[here] = flow[t] + later
                    ddelta[here] = _row_dot(drive_grad, values, t * width, width)
                    skip_grad[i] += _row_dot(out_grad, values, t * width, width)
                scale(drive_grad, 0, width, steps, width, delta, step, n_heads)
                write(drive_grad, 0, width, steps, n_channels, dx, token, row)
                if has_skip:
                    add_scaled(dy, token, row, steps, n_channels, dx, token, row, D[head])

            add_product(B_grad, 0, CHUNK, depth, padded, C_columns, 0, CHUNK, 1, score_grads, 0, CHUNK, padded)
            transpose(score_grads, 0, CHUNK, padded, padded, weights, 0, CHUNK)
            add_product(C_grad, 0, CHUNK, depth, padded, B_columns, 0, CHUNK, 1, weights, 0, CHUNK, padded)
            # dB and dC are (R, B, T, G, N), one layer for each range of heads of a group.
            shared = (((r % n_ranges * n_batch + b) * n_time + start) * n_groups + group) * n_state
            transpose(B_grad, 0, CHUNK, n_state, steps, dB, shared, n_groups * n_state)
            transpose(C_grad, 0, CHUNK, n_state, steps, dC, shared, n_groups * n_state)

        for i in range(n_range):
            head = b * n_heads + r * n_range + i
            dD[head] = skip_grad[i]
            transpose(state_grad, i * depth * width, width, n_state, n_channels, dinitial_state, head * slab, n_state)
