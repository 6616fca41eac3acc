"""The forward loops of the numba backend: a softmax that goes through the slots once, chunk by chunk.

A task is a block of queries of one head. Scores are to base 2. See `numba_tiles` for blocks, chunks and letters.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, scale
from zoo.kernels.relative_attention.numba_tiles import (
    KEYS,
    PANEL,
    QUERIES,
    ROW,
    add_by_distance,
    add_by_slot,
    column_of,
    distances_of,
    fill_rows,
    fours,
    hide,
    load_rows,
    next_chunk,
    transpose_panels,
    whole,
)
from zoo.kernels.simd import LANES, LOG2_E, at_least, exp2, jit, largest, load, scratch, splat, store, total


@jit
def absorb(scores, height, n, top, new, sums, fades):
    """Turns the scores of a chunk into weights, relative to the largest score of each query so far.

    `fades` is what earlier weights have lost by it.
    """
    columns = whole(n)
    for i in range(height):
        start = height - 1 + i * (ROW - 1)
        most = load(scores, start)
        for c in range(start + LANES, start + columns, LANES):
            most = at_least(most, load(scores, c))
        new[i] = max(top[i], largest(most))
    for i in range(0, height, LANES):
        store(fades, i, exp2(load(top, i) - load(new, i)))
        store(top, i, load(new, i))
    for i in range(height):
        start = height - 1 + i * (ROW - 1)
        most, added = splat(new[i]), splat(scores.dtype.type(0.0))
        for c in range(start, start + columns, LANES):
            weight = exp2(load(scores, c) - most)
            store(scores, c, weight)
            added = added + weight
        sums[i] = sums[i] * fades[i] + total(added)


@jit
def forward(
    first, last, sizes, factor, q, q_at, p, p_at, k, k_at, v, v_at, past_k, past_k_at, past_v, past_v_at, r_columns,
    starts, lengths, counts, rows_at, y, lse,
):  # fmt: skip
    """Runs the tasks; see `numba_backend` for the arguments."""
    n_segments, n_queries, n_heads, n_groups, width, n_runs, n_distances = sizes
    n_blocks, r_row = -(-n_queries // QUERIES), len(r_columns) // (n_groups * width)
    q_rows, p_rows = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    out, panels = scratch(QUERIES * width, q), scratch(KEYS * width, q)
    scores = scratch(QUERIES * ROW, q)
    top, new, sums, fades = scratch(QUERIES, q), scratch(QUERIES, q), scratch(QUERIES, q), scratch(QUERIES, q)
    lowest = q.dtype.type(np.finfo(q.dtype).min)  # not -inf: its difference to itself is a number
    nothing = np.zeros(QUERIES, q.dtype)

    for task in range(first, last):
        entry, block = divmod(task, n_blocks)
        entry, head = divmod(entry, n_heads)
        b, segment = divmod(entry, n_segments)
        group, block = head * n_groups // n_heads, block * QUERIES
        line = b * rows_at * n_segments + segment
        count = min(QUERIES, counts[line] - block)
        y_at = ((entry * n_queries + block) * n_heads + head) * width
        for i in range(max(count, 0), min(QUERIES, n_queries - block)):
            lse[y_at // width + i * n_heads] = -np.inf
            for c in range(width):
                y[y_at + i * n_heads * width + c] = 0.0
        if count <= 0:
            continue
        height = fours(count)
        load_rows(
            q, b * q_at[0] + segment * q_at[1] + block * q_at[2] + head * q_at[3], q_at[2], count, width, factor, q_rows
        )
        load_rows(
            p, b * p_at[0] + segment * p_at[1] + block * p_at[2] + head * p_at[3], p_at[2], count, width, factor, p_rows
        )
        out[:] = 0.0
        top[:], sums[:] = lowest, 0.0
        new[:] = lowest
        own_k = b * k_at[0] + segment * k_at[1] + group * k_at[3]
        own_v = b * v_at[0] + segment * v_at[1] + group * v_at[3]
        slots = np.int64(0)
        for run in range(n_runs):
            slots += lengths[line * n_runs + run]
        cursor = (np.int64(0), np.int64(0))
        while True:
            cursor, run, slot, n, slots, distance = next_chunk(
                cursor, lengths, line * n_runs, n_runs, slots, block, count
            )
            if n == 0:
                break
            fill_rows(scores, height, n + height - 1, nothing)
            at = group * width * r_row + column_of(distance + height - 1, n_distances)
            add_by_distance(scores, height, distances_of(height, n, distance), p_rows, r_columns, at, r_row, width)
            if run < n_runs:
                slot += starts[line * n_runs + run]
                transpose_panels(
                    past_k,
                    b * past_k_at[0] + slot * past_k_at[1] + group * past_k_at[2],
                    past_k_at[1],
                    n,
                    width,
                    panels,
                )
            else:
                transpose_panels(k, own_k + slot * k_at[2], k_at[2], n, width, panels)
            add_by_slot(scores, height, n, q_rows, panels, width)
            hide(scores, height, n, distance, scores.dtype.type(-np.inf))
            absorb(scores, height, n, top, new, sums, fades)
            scale(out, 0, width, height, width, fades, 0, 1)
            for j in range(0, n, PANEL):
                depth = min(PANEL, n - j)
                if run < n_runs:
                    values = b * past_v_at[0] + (slot + j) * past_v_at[1] + group * past_v_at[2]
                    add_product(
                        out,
                        0,
                        width,
                        height,
                        width,
                        scores,
                        height - 1 + j,
                        ROW - 1,
                        1,
                        past_v,
                        values,
                        past_v_at[1],
                        depth,
                    )
                else:
                    values = own_v + (slot + j) * v_at[2]
                    add_product(
                        out, 0, width, height, width, scores, height - 1 + j, ROW - 1, 1, v, values, v_at[2], depth
                    )
        for i in range(count):
            lse[y_at // width + i * n_heads] = (top[i] + np.log2(sums[i])) / LOG2_E
            share = splat(out.dtype.type(1.0) / sums[i])
            for c in range(0, width, LANES):
                store(y, y_at + i * n_heads * width + c, load(out, i * width + c) * share)
