"""The loops of the numba backend: chunks of steps as small matrix products, compiled, in vectors of 16 numbers.

A task is one batch row and a range of heads of one group; it walks through the chunks of time in order and keeps its
heads' states in the second-level cache. Tasks run in parallel and never share memory that they write. The README of
this folder derives the products.

Arrays are flat; `x_at`, `B_at`, `C_at` are strides over B, T and H or G. Scratch matrices are whole vectors wide and
high, zero beyond what they hold. `logs` (B, T, H) are logarithms of decays to base 2, -inf where the state is reset.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size, Q = CHUNK steps.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, add_scaled, clear, copy, scale, transpose, write
from zoo.kernels.simd import LANES, exp2, inlined, jit, load, store
from zoo.kernels.ssd.op import CHUNK


@inlined
def whole(size):
    """`size` rounded up to whole vectors."""
    return -(-size // LANES) * LANES


@jit
def load_rows(source, at, row, steps, width, out, out_row):
    """Copies one chunk of rows to scratch and clears what is left of the last vectors of steps."""
    copy(source, at, row, steps, width, out, 0, out_row, 1.0)
    clear(out, steps * out_row, (whole(steps) - steps) * out_row)


@jit
def load_state(given, at, n_state, n_channels, state, state_at):
    """Copies a state that is stored as the caller has it, (P, N)."""
    width = whole(n_channels)
    clear(state, state_at, whole(n_state) * width)
    transpose(given, at, n_state, n_channels, n_state, state, state_at, width)


@jit
def decays(logs, at, row, steps, heads, tails, within):
    """Products of decays in a chunk: from its start to each step, from after each step to its end, and between steps.

    The rows of `within` [t, s] are sums of logarithms that grow by one term from step to step: differences of sums
    from the chunk's start would lose the digits of small decays behind large ones. Returns the decay of the whole
    chunk, and whether the first step begins a segment.
    """
    padded = whole(steps)
    for s in range(padded):
        tails[s] = -np.inf
    log = logs[at] * 0
    for t in range(steps):
        step = logs[at + t * row]
        log = step if t == 0 else log + step
        heads[t] = log
        for s in range(0, min(padded, t + LANES), LANES):
            store(tails, s, load(tails, s) + step)
        tails[t] = 0.0
        for s in range(0, whole(t + 1), LANES):
            store(within, t * CHUNK + s, exp2(load(tails, s)))
    for t in range(steps, padded):
        heads[t] = -np.inf
        clear(within, t * CHUNK, padded)
    for t in range(0, padded, LANES):
        store(heads, t, exp2(load(heads, t)))
        store(tails, t, exp2(load(tails, t)))
    return heads[steps - 1], logs[at] == -np.inf


@jit
def fade(state, at, size, decay):
    """Multiplies a state; a decay of 0 takes infinity and NaN along."""
    if decay == 0.0:
        clear(state, at, size)
    else:
        for i in range(at, at + size, LANES):
            store(state, i, load(state, i) * decay)


@jit
def score(C_rows, B_columns, padded, depth, scores):
    """scores[t, s] = C_t B_s, for the blocks that hold an s <= t."""
    for t in range(0, padded, LANES):
        for i in range(t, t + LANES):
            clear(scores, i * CHUNK, t + LANES)
        add_product(scores, t * CHUNK, CHUNK, LANES, t + LANES, C_rows, t * depth, depth, 1, B_columns, 0, CHUNK, depth)


@jit
def forward(
    first,
    last,
    sizes,
    x,
    x_at,
    delta,
    logs,
    B,
    B_at,
    C,
    C_at,
    D,
    initial_state,
    flags,
    y,
    final_state,
    checkpoints,
):
    """Goes through the chunks in order; stores the state at the start of each."""
    _, n_time, n_heads, n_channels, n_groups, n_state, n_range = sizes
    has_skip, has_initial, save = flags
    n_ranges = n_heads // n_groups // n_range
    n_chunks = -(-n_time // CHUNK)
    width, depth = whole(n_channels), whole(n_state)
    slab = n_state * n_channels
    state = np.empty(n_range * depth * width, x.dtype)
    B_rows = np.empty(CHUNK * depth, x.dtype)
    C_rows = np.empty(CHUNK * depth, x.dtype)
    B_columns = np.empty(depth * CHUNK, x.dtype)
    scores = np.empty(CHUNK * CHUNK, x.dtype)
    weights = np.empty(CHUNK * CHUNK, x.dtype)
    drive = np.empty(CHUNK * width, x.dtype)
    out = np.empty(CHUNK * width, x.dtype)
    heads = np.empty(CHUNK, x.dtype)
    tails = np.empty(CHUNK, x.dtype)

    for task in range(first, last):
        b, r = divmod(task, n_groups * n_ranges)
        group = r // n_ranges
        for i in range(n_range):
            at = i * depth * width
            if has_initial:
                given = (b * n_heads + r * n_range + i) * slab
                load_state(initial_state, given, n_state, n_channels, state, at)
            else:
                clear(state, at, depth * width)

        for chunk in range(n_chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, n_time - start)
            padded = whole(steps)
            load_rows(B, b * B_at[0] + start * B_at[1] + group * B_at[2], B_at[1], steps, n_state, B_rows, depth)
            load_rows(C, b * C_at[0] + start * C_at[1] + group * C_at[2], C_at[1], steps, n_state, C_rows, depth)
            transpose(B_rows, 0, depth, padded, depth, B_columns, 0, CHUNK)
            score(C_rows, B_columns, padded, depth, scores)

            for i in range(n_range):
                at = i * depth * width
                head = r * n_range + i
                step = (b * n_time + start) * n_heads + head
                chunk_decay, resets = decays(logs, step, n_heads, steps, heads, tails, weights)
                if save:
                    saved = ((b * n_chunks + chunk) * n_heads + head) * slab
                    write(state, at, width, n_state, n_channels, checkpoints, saved, n_channels)
                if resets:
                    clear(state, at, depth * width)
                x_row = b * x_at[0] + start * x_at[1] + head * x_at[2]
                load_rows(x, x_row, x_at[1], steps, n_channels, drive, width)
                scale(drive, 0, width, steps, width, delta, step, n_heads)

                clear(out, 0, padded * width)
                add_product(out, 0, width, padded, width, C_rows, 0, depth, 1, state, at, width, depth)
                scale(out, 0, width, padded, width, heads, 0, 1)
                for t in range(0, padded, LANES):
                    for j in range(t, t + LANES):
                        for s in range(j * CHUNK, j * CHUNK + t + LANES, LANES):
                            store(weights, s, load(weights, s) * load(scores, s))
                    add_product(
                        out, t * width, width, LANES, width, weights, t * CHUNK, CHUNK, 1, drive, 0, width, t + LANES
                    )
                token = step * n_channels
                write(out, 0, width, steps, n_channels, y, token, n_heads * n_channels)
                if has_skip:
                    add_scaled(x, x_row, x_at[1], steps, n_channels, y, token, n_heads * n_channels, D[head])

                fade(state, at, depth * width, chunk_decay)
                scale(drive, 0, width, steps, width, tails, 0, 1)
                add_product(state, at, width, depth, width, B_rows, 0, 1, depth, drive, 0, width, steps)

        for i in range(n_range):
            row = (b * n_heads + r * n_range + i) * slab
            transpose(state, i * depth * width, width, n_state, n_channels, final_state, row, n_state)
