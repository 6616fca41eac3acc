"""The backward loops of the numba backend: the weights again from the scores and their log-sum-exp, chunk by chunk.

A task is some segments of one row of the batch and one key/value head. It has sums of its own for the memory and for
the positions, in which no other task writes. See `numba_tiles` for blocks, chunks and letters.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, copy
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
from zoo.kernels.simd import LANES, LOG2_E, exp2, jit, load, scratch, store, total


@jit
def weigh(scores, grads, height, n):
    """Turns scores into weights and gradients of weights into those of scores, and clears what is no slot's."""
    columns, end = whole(n), fours(n + height - 1)
    for i in range(height):
        start = height - 1 + i * (ROW - 1)
        for c in range(start, start + columns, LANES):
            weight = exp2(load(scores, c) * LOG2_E)
            store(scores, c, weight)
            store(grads, c, load(grads, c) * weight)
        for c in range(i * ROW, start):
            grads[c] = 0.0
        for c in range(start + n, i * ROW + end):
            grads[c] = 0.0


@jit
def adjoin(
    scores, grads, height, count, n, k, k_at, k_row, panels, v_panels, own, r_columns, column, r_row, r_rows, r_at,
    width, distance, dq, dp, dk, dv, d_at, dr, dr_at, d_row,
):  # fmt: skip
    """Adds what a block of queries and a chunk of slots are to each other's gradients."""
    q_rows, p_rows, dy_rows, lse, delta = own
    fill_rows(scores, height, n + height - 1, lse)
    fill_rows(grads, height, n + height - 1, delta)
    n_distances = distances_of(height, n, distance)
    add_by_distance(scores, height, n_distances, p_rows, r_columns, column, r_row, width)
    add_by_slot(scores, height, n, q_rows, panels, width)
    add_by_slot(grads, height, n, dy_rows, v_panels, width)
    hide(scores, height, n, distance, scores.dtype.type(-np.inf))
    hide(grads, height, n, distance, scores.dtype.type(0.0))
    weigh(scores, grads, height, n)
    skew, origin = ROW - 1, height - 1
    for j in range(0, n, PANEL):
        depth = min(PANEL, n - j)
        add_product(
            dv, d_at + j * d_row, d_row, fours(depth), width, scores, origin + j, 1, skew, dy_rows, 0, width, count
        )
        add_product(
            dk, d_at + j * d_row, d_row, fours(depth), width, grads, origin + j, 1, skew, q_rows, 0, width, count
        )
        add_product(dq, 0, width, height, width, grads, origin + j, skew, 1, k, k_at + j * k_row, k_row, depth)
    for j in range(0, n_distances, PANEL):
        depth = min(PANEL, n_distances - j)
        add_product(dr, dr_at + j * d_row, d_row, fours(depth), width, grads, j, 1, ROW, p_rows, 0, width, count)
        add_product(dp, 0, width, height, width, grads, j, ROW, 1, r_rows, r_at + j * width, width, depth)


@jit
def backward(
    first, last, sizes, factor, n_parts, n_slots, own_rows, q, q_at, p, p_at, k, k_at, v, v_at, past_k, past_k_at,
    past_v, past_v_at, r_columns, r_rows, starts, lengths, counts, rows_at, y, lse, dy, dq, dp, dk, dv, past_dk,
    past_dv, dr,
):  # fmt: skip
    """Runs the tasks; see `numba_backend` for the arguments."""
    n_segments, n_queries, n_heads, n_groups, width, n_runs, n_distances = sizes
    r_row, r_count = len(r_columns) // (n_groups * width), len(r_rows) // (n_groups * width)
    q_rows, p_rows, dy_rows = scratch(QUERIES * width, q), scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    own_dq, own_dp = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    panels, v_panels = scratch(KEYS * width, q), scratch(KEYS * width, q)
    panels[:], v_panels[:] = 0.0, 0.0  # what was never written may be no number
    scores, grads = scratch(QUERIES * ROW, q), scratch(QUERIES * ROW, q)
    sums, delta = scratch(QUERIES, q), scratch(QUERIES, q)
    own = q_rows, p_rows, dy_rows, sums, delta
    shared, d_row = n_heads // n_groups, n_groups * width

    for task in range(first, last):
        entry, part = divmod(task, n_parts)
        b, group = divmod(entry, n_groups)
        owned = b * n_parts + part
        past_at, dr_base = (owned * n_slots * n_groups + group) * width, (owned * r_count * n_groups + group) * width
        for segment in range(n_segments * part // n_parts, n_segments * (part + 1) // n_parts):
            line = b * rows_at * n_segments + segment
            own_k = b * k_at[0] + segment * k_at[1] + group * k_at[3]
            own_v = b * v_at[0] + segment * v_at[1] + group * v_at[3]
            own_at = ((b * n_segments + segment) * own_rows * n_groups + group) * width
            for head in range(group * shared, (group + 1) * shared):
                for block in range(0, counts[line], QUERIES):
                    count = min(QUERIES, counts[line] - block)
                    height = fours(count)
                    load_rows(
                        q,
                        b * q_at[0] + segment * q_at[1] + block * q_at[2] + head * q_at[3],
                        q_at[2],
                        count,
                        width,
                        factor,
                        q_rows,
                    )
                    load_rows(
                        p,
                        b * p_at[0] + segment * p_at[1] + block * p_at[2] + head * p_at[3],
                        p_at[2],
                        count,
                        width,
                        factor,
                        p_rows,
                    )
                    y_at = (((b * n_segments + segment) * n_queries + block) * n_heads + head) * width
                    load_rows(dy, y_at, n_heads * width, count, width, 1.0, dy_rows)
                    sums[:], delta[:] = -np.inf, 0.0
                    for i in range(count):
                        sums[i] = -lse[y_at // width + i * n_heads]
                        product = load(dy_rows, i * width) * load(y, y_at + i * n_heads * width)
                        for c in range(LANES, width, LANES):
                            product = product + load(dy_rows, i * width + c) * load(y, y_at + i * n_heads * width + c)
                        delta[i] = -total(product)
                    own_dq[:], own_dp[:] = 0.0, 0.0
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
                        column = column_of(distance + height - 1, n_distances)
                        r_at, dr_at = (group * r_count + column) * width, dr_base + column * d_row
                        column += group * width * r_row
                        if run < n_runs:
                            slot += starts[line * n_runs + run]
                            keys = b * past_k_at[0] + slot * past_k_at[1] + group * past_k_at[2]
                            values = b * past_v_at[0] + slot * past_v_at[1] + group * past_v_at[2]
                            transpose_panels(past_k, keys, past_k_at[1], n, width, panels)
                            transpose_panels(past_v, values, past_v_at[1], n, width, v_panels)
                            adjoin(
                                scores, grads, height, count, n, past_k, keys, past_k_at[1], panels, v_panels, own,
                                r_columns, column, r_row, r_rows, r_at, width, distance, own_dq, own_dp, past_dk,
                                past_dv, past_at + slot * d_row, dr, dr_at, d_row,
                            )  # fmt: skip
                        else:
                            transpose_panels(k, own_k + slot * k_at[2], k_at[2], n, width, panels)
                            transpose_panels(v, own_v + slot * v_at[2], v_at[2], n, width, v_panels)
                            adjoin(
                                scores, grads, height, count, n, k, own_k + slot * k_at[2], k_at[2], panels, v_panels,
                                own, r_columns, column, r_row, r_rows, r_at, width, distance, own_dq, own_dp, dk, dv,
                                own_at + slot * d_row, dr, dr_at, d_row,
                            )  # fmt: skip
                    copy(own_dq, 0, width, count, width, dq, y_at, n_heads * width, factor)
                    copy(own_dp, 0, width, count, width, dp, y_at, n_heads * width, factor)
