"""The backward loops of the numba backend: the weights again from the scores and their log-sum-exp, tile by tile.

A task is a run of tiles of queries of one row of the batch and one key/value head. Where several tasks share the keys
of a head, each has sums of its own for the keys that it sees, and `reduce` adds them up in a fixed order. See
`numba_tiles` for tiles, masks and letters.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, add_scaled, copy
from zoo.kernels.simd import LANES, LOG2_E, exp2, jit, load, scratch, store, total
from zoo.kernels.sparse_attention.numba_tiles import (
    FACTS,
    KEYS,
    LIMITS,
    OPEN,
    QUERIES,
    fours,
    load_queries,
    mask,
    next_tile,
    pack,
    read_limits,
    unpack,
    whole,
    zeros,
)


@jit
def read_sums(lse, lse_at, step, dy_rows, y, y_at, y_row, count, width, sums):
    """What the scores and the gradients of the weights start from: minus lse to base 2, and minus dy . y."""
    for i in range(whole(count)):
        sums[i], sums[QUERIES + i] = -np.inf, 0.0
        # An unseen query keeps -inf: its weights come out as 0.
        if i < count and lse[lse_at + i * step] != -np.inf:
            sums[i] = lse[lse_at + i * step] * -LOG2_E
            product = load(dy_rows, i * width) * load(y, y_at + i * y_row)
            for c in range(LANES, width, LANES):
                product = product + load(dy_rows, i * width + c) * load(y, y_at + i * y_row + c)
            sums[QUERIES + i] = -total(product)


@jit
def adjoin(
    k, k_at, k_row, v, v_at, v_row, n, lane, lanes, count, width, own, kind, facts, limits, scores, grads, dq, dk, dv,
    d_at, d_row,
):  # fmt: skip
    """Adds what `n` keys and the queries in `lanes` lanes from `lane` on are to each other's gradients."""
    q_rows, q_columns, dy_rows, dy_columns, sums = own
    height = fours(n)
    for i in range(lane, lane + lanes, LANES):
        score, grad = load(sums, i), load(sums, QUERIES + i)
        for r in range(height):
            store(scores, r * QUERIES + i, score)
            store(grads, r * QUERIES + i, grad)
    add_product(scores, lane, QUERIES, height, lanes, k, k_at, k_row, 1, q_columns, lane, QUERIES, width)
    add_product(grads, lane, QUERIES, height, lanes, v, v_at, v_row, 1, dy_columns, lane, QUERIES, width)
    if kind != OPEN:
        mask(scores, n, lane, lanes, kind, facts, limits)
    for r in range(n):
        for i in range(r * QUERIES + lane, r * QUERIES + lane + lanes, LANES):
            weight = exp2(load(scores, i))
            store(scores, i, weight)
            store(grads, i, load(grads, i) * weight)
    depth = min(lane + lanes, count) - lane
    add_product(dv, d_at, d_row, height, width, scores, lane, QUERIES, 1, dy_rows, lane * width, width, depth)
    add_product(dk, d_at, d_row, height, width, grads, lane, QUERIES, 1, q_rows, lane * width, width, depth)
    add_product(dq, lane * width, width, fours(depth), width, grads, lane, 1, QUERIES, k, k_at, k_row, n)


@jit
def backward(
    first, last, sizes, factor, cuts, tiles, q, q_at, k, k_at, v, v_at, spans, span_at, dilations, far, far_sizes,
    far_at, logs, y, lse, dy, ranges, starts, d_row, dq, dk, dv,
):  # fmt: skip
    """Runs the tasks; see `numba_backend` for the arguments."""
    n_queries, n_keys, n_heads, n_groups, width, n_tiles = sizes
    q_rows, q_columns = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    dy_rows, dy_columns = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    few_k, few_v = scratch(KEYS * width, q), scratch(KEYS * width, q)
    few_dk, few_dv = scratch(KEYS * width, q), scratch(KEYS * width, q)
    scores, grads = scratch(KEYS * QUERIES, q), scratch(KEYS * QUERIES, q)
    own_dq = scratch(QUERIES * width, q)
    limits, facts, sums = scratch(LIMITS, q), scratch(FACTS, q), scratch(2 * QUERIES, q)
    keys, edges = np.empty(KEYS, np.int64), np.empty(2 * QUERIES // LANES, np.int64)
    own = q_rows, q_columns, dy_rows, dy_columns, sums

    for task in range(first, last):
        zeros(dk, starts[task], d_row, ranges[task, 1], width)
        zeros(dv, starts[task], d_row, ranges[task, 1], width)
        base = starts[task] - ranges[task, 0] * d_row
        for entry in range(cuts[task], cuts[task + 1]):
            b, tile = divmod(entry, n_tiles)
            head, query, step, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2], tiles[tile, 3]
            lanes, group = whole(count), head * n_groups // n_heads
            shift, dilation = n_keys - n_queries, dilations[head] // step
            sight = read_limits(spans, span_at, b, (query, step, count), shift, dilation, limits, edges)
            q_row = b * q_at[0] + query * q_at[1] + head * q_at[2]
            load_queries(q, q_row, step * q_at[1], count, width, factor, q_rows, q_columns)
            for i in range(0, width * QUERIES, LANES):
                store(q_columns, i, load(q_columns, i) * LOG2_E)
            y_at, y_row = ((b * n_queries + query) * n_heads + head) * width, step * n_heads * width
            load_queries(dy, y_at, y_row, count, width, 1.0, dy_rows, dy_columns)
            lse_at = (b * n_heads + head) * n_queries + query
            read_sums(lse, lse_at, step, dy_rows, y, y_at, y_row, count, width, sums)
            zeros(own_dq, 0, width, lanes, width)
            k_base, v_base = b * k_at[0] + group * k_at[2], b * v_at[0] + group * v_at[2]
            far_ranges = far, logs, b * far_at[0] + head * far_at[1] + query // far_sizes[2] * far_at[2], far_sizes
            origin = (shift + query) % step
            cursor = (sight[0][0], 0, 0)
            while True:
                cursor, n, kind, lane, active, key, gap = next_tile(
                    cursor, sight, lanes, edges, origin, step, dilation, far_ranges, n_keys, keys, facts
                )
                if n == 0:
                    break
                if active == 0:
                    continue
                if gap:
                    adjoin(
                        k, k_base + key * k_at[1], gap * k_at[1], v, v_base + key * v_at[1], gap * v_at[1], n, lane,
                        active, count, width, own, kind, facts, limits, scores, grads, own_dq, dk, dv,
                        base + key * d_row, gap * d_row,
                    )  # fmt: skip
                else:
                    pack(k, k_base, k_at[1], keys, n, width, few_k)
                    pack(v, v_base, v_at[1], keys, n, width, few_v)
                    zeros(few_dk, 0, width, fours(n), width)
                    zeros(few_dv, 0, width, fours(n), width)
                    adjoin(
                        few_k, 0, width, few_v, 0, width, n, lane, active, count, width, own, kind, facts, limits,
                        scores, grads, own_dq, few_dk, few_dv, 0, width,
                    )  # fmt: skip
                    unpack(few_dk, n, width, keys, dk, base, d_row)
                    unpack(few_dv, n, width, keys, dv, base, d_row)
            copy(own_dq, 0, width, count, width, dq, y_at, y_row, factor)


@jit
def reduce(first, last, sizes, block, n_parts, ranges, starts, parts, out):
    """Adds up the parts' gradients for some blocks of keys of a row of the batch; zero where no part has any."""
    n_keys, n_groups, width = sizes
    n_blocks = -(-n_keys // block)
    row = n_groups * width
    for task in range(first, last):
        b, i = divmod(task, n_blocks)
        low, high = i * block, min(n_keys, (i + 1) * block)
        zeros(out, (b * n_keys + low) * row, row, high - low, row)
        for group in range(n_groups):
            for part in range((b * n_groups + group) * n_parts, (b * n_groups + group + 1) * n_parts):
                begin, end = max(low, ranges[part, 0]), min(high, ranges[part, 0] + ranges[part, 1])
                if begin < end:
                    source = starts[part] + (begin - ranges[part, 0]) * width
                    o = (b * n_keys + begin) * row + group * width
                    add_scaled(parts, source, width, end - begin, width, out, o, row, 1.0)
