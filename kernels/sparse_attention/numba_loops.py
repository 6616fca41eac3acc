"""The forward loops of the numba backend: a softmax that goes through the keys once, tile by tile.

A task is a run of tiles of queries, over heads and rows of the batch; tasks write what no other task writes. Scores
are to base 2. See `numba_tiles` for tiles, masks and letters.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, scale
from zoo.kernels.simd import LANES, LOG2_E, at_least, exp2, jit, load, scratch, splat, store, total
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
    whole,
    zeros,
)

FEW = 4
"""Queries so few, as in decoding, that products with a lane per query would mostly compute nothing."""


@jit
def absorb(scores, n, lane, lanes, top, sums, fades):
    """Turns the scores of `n` keys into weights, relative to the largest score of each query so far.

    Returns whether that changed for any query; then `fades` is what earlier weights have lost by it.
    """
    changed = False
    for i in range(lane, lane + lanes, LANES):
        old = load(top, i)
        a, b, c, d = old, old, old, old
        r = 0
        while r + 4 <= n:
            at = r * QUERIES + i
            a, b = at_least(a, load(scores, at)), at_least(b, load(scores, at + QUERIES))
            c, d = at_least(c, load(scores, at + 2 * QUERIES)), at_least(d, load(scores, at + 3 * QUERIES))
            r += 4
        while r < n:
            a = at_least(a, load(scores, r * QUERIES + i))
            r += 1
        new = at_least(at_least(a, b), at_least(c, d))
        added = old * 0.0
        for r in range(n):
            weight = exp2(load(scores, r * QUERIES + i) - new)
            store(scores, r * QUERIES + i, weight)
            added = added + weight
        fade = exp2(old - new)
        store(fades, i, fade)
        store(top, i, new)
        store(sums, i, load(sums, i) * fade + added)
        changed |= total(new - old) != 0.0
    return changed


@jit
def attend(
    k, k_at, k_row, v, v_at, v_row, n, lane, lanes, count, width, queries, kind, facts, limits, scores, soft, out
):
    """Takes `n` keys into the outputs of the tile's `count` queries, those in `lanes` lanes from `lane` on."""
    rows, columns = queries
    top, sums, fades = soft
    zeros(scores, lane, QUERIES, fours(n), lanes)
    if count <= FEW:
        for r in range(n):
            for i in range(count):
                product = load(k, k_at + r * k_row) * load(rows, i * width)
                for c in range(LANES, width, LANES):
                    product = product + load(k, k_at + r * k_row + c) * load(rows, i * width + c)
                scores[r * QUERIES + i] = total(product)
    else:
        add_product(scores, lane, QUERIES, fours(n), lanes, k, k_at, k_row, 1, columns, lane, QUERIES, width)
    if kind != OPEN:
        mask(scores, n, lane, lanes, kind, facts, limits)
    if absorb(scores, n, lane, lanes, top, sums, fades):
        scale(out, lane * width, width, lanes, width, fades, lane, 1)
    height = fours(min(lanes, count - lane))
    add_product(out, lane * width, width, height, width, scores, lane, 1, QUERIES, v, v_at, v_row, n)


@jit
def finish(soft, out, count, width, y, y_at, y_row, lse, lse_at, step):
    """Divides by the sums of the weights and writes; a query that saw nothing gets zeros."""
    top, sums, _ = soft
    for i in range(count):
        lse[lse_at + i * step] = (top[i] + np.log2(sums[i])) / LOG2_E
        if sums[i] == 0.0:
            lse[lse_at + i * step] = -np.inf
            zeros(y, y_at + i * y_row, 0, 1, width)
        else:
            factor = splat(out.dtype.type(1.0) / sums[i])
            for c in range(0, width, LANES):
                store(y, y_at + i * y_row + c, load(out, i * width + c) * factor)


@jit
def forward(
    first, last, sizes, factor, cuts, tiles, q, q_at, k, k_at, v, v_at, spans, span_at, dilations, far, far_sizes,
    far_at, logs, y, lse,
):  # fmt: skip
    """Runs the tasks; see `numba_backend` for the arguments."""
    n_queries, n_keys, n_heads, n_groups, width, n_tiles = sizes
    queries = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    out = scratch(QUERIES * width, q)
    few_k, few_v = scratch(KEYS * width, q), scratch(KEYS * width, q)
    scores, limits, facts = scratch(KEYS * QUERIES, q), scratch(LIMITS, q), scratch(FACTS, q)
    soft = scratch(QUERIES, q), scratch(QUERIES, q), scratch(QUERIES, q)
    keys, edges = np.empty(KEYS, np.int64), np.empty(2 * QUERIES // LANES, np.int64)
    lowest = splat(q.dtype.type(np.finfo(q.dtype).min))  # not -inf: its difference to itself is a number

    for entry in range(cuts[first], cuts[last]):
        b, tile = divmod(entry, n_tiles)
        head, query, step, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2], tiles[tile, 3]
        lanes, group = whole(count), head * n_groups // n_heads
        shift, dilation = n_keys - n_queries, dilations[head] // step
        sight = read_limits(spans, span_at, b, (query, step, count), shift, dilation, limits, edges)
        q_row = b * q_at[0] + query * q_at[1] + head * q_at[2]
        load_queries(q, q_row, step * q_at[1], count, width, factor, queries[0], queries[1])
        zeros(out, 0, width, lanes, width)
        zeros(soft[1], 0, 0, 1, lanes)
        for i in range(0, lanes, LANES):
            store(soft[0], i, lowest)
        k_base, v_base = b * k_at[0] + group * k_at[2], b * v_at[0] + group * v_at[2]
        ranges = far, logs, b * far_at[0] + head * far_at[1] + query // far_sizes[2] * far_at[2], far_sizes
        origin = (shift + query) % step
        cursor = (sight[0][0], 0, 0)
        while True:
            cursor, n, kind, lane, active, key, gap = next_tile(
                cursor, sight, lanes, edges, origin, step, dilation, ranges, n_keys, keys, facts
            )
            if n == 0:
                break
            if active == 0:
                continue
            if gap:
                attend(
                    k, k_base + key * k_at[1], gap * k_at[1], v, v_base + key * v_at[1], gap * v_at[1], n, lane,
                    active, count, width, queries, kind, facts, limits, scores, soft, out,
                )  # fmt: skip
            else:
                pack(k, k_base, k_at[1], keys, n, width, few_k)
                pack(v, v_base, v_at[1], keys, n, width, few_v)
                attend(
                    few_k, 0, width, few_v, 0, width, n, lane, active, count, width, queries, kind, facts, limits,
                    scores, soft, out,
                )  # fmt: skip
        y_at = ((b * n_queries + query) * n_heads + head) * width
        lse_at = (b * n_heads + head) * n_queries + query
        finish(soft, out, count, width, y, y_at, step * n_heads * width, lse, lse_at, step)
