"""The forward loops of the numba backend: one softmax over blocks, another inside of each, in one pass over the keys.

A block that is not the query's own has its landmark's score as its logit. Its own block has the log-sum-exp of its
tokens, which is the same as their standing in the first softmax one by one. Scores are to base 2.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.landmark_attention.numba_tiles import SIGHT, kinds, lanes_of, next_run, score, weigh
from zoo.kernels.matrix import add_product, scale
from zoo.kernels.simd import LANES, at_least, exp2, jit, load, scratch, splat, store, total, where_negative
from zoo.kernels.sparse_attention.numba_loops import finish
from zoo.kernels.sparse_attention.numba_tiles import QUERIES, fours, load_queries, whole, zeros


@jit
def absorb(scores, tokens, block, lane, lanes, hidden, sight, soft):
    """Turns a block's scores into shares of all that each query has seen so far.

    Returns whether earlier shares have lost by it for any query; `fades` is then how much.
    """
    top, sums, fades = soft
    changed = False
    for i in range(lane, lane + lanes, LANES):
        own, seen = kinds(block, sight, i)
        mark = load(scores, tokens * QUERIES + i)
        most, added = weigh(scores, tokens, i, own, hidden, sight)
        old = load(top, i)
        zero = old * 0.0
        logit = where_negative(own, most, where_negative(seen, mark, old))
        new = at_least(old, logit)
        # 1 at most: the share of the whole block, or of its largest score where it is the query's own
        share = exp2(logit - new)
        gained = where_negative(own, share * added, where_negative(seen, share, zero))
        share = where_negative(own, share, where_negative(seen, share / added, zero))
        for r in range(tokens):
            store(scores, r * QUERIES + i, load(scores, r * QUERIES + i) * share)
        fade = exp2(old - new)
        store(fades, i, fade)
        store(top, i, new)
        store(sums, i, load(sums, i) * fade + gained)
        changed |= total(new - old) != 0.0
    return changed


@jit
def forward(
    first, last, sizes, factor, cuts, tiles, q, q_at, k, k_at, v, v_at, slots, begins, ends, spans_at, y, lse
):  # fmt: skip
    """Runs the tasks; see `numba_backend` for the arguments."""
    n_queries, n_heads, n_groups, width, size, n_tiles = sizes
    queries = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    out, scores = scratch(QUERIES * width, q), scratch(fours(size) * QUERIES, q)
    soft = scratch(QUERIES, q), scratch(QUERIES, q), scratch(QUERIES, q)
    sight = scratch(SIGHT, q)
    lowest = splat(q.dtype.type(np.finfo(q.dtype).min))  # not -inf: its difference to itself is a number

    for entry in range(cuts[first], cuts[last]):
        b, tile = divmod(entry, n_tiles)
        head, query, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 3]
        group = head * n_groups // n_heads
        q_row = b * q_at[0] + query * q_at[1] + head * q_at[2]
        load_queries(q, q_row, q_at[1], count, width, factor, queries[0], queries[1])
        zeros(out, 0, width, whole(count), width)
        zeros(soft[1], 0, 0, 1, whole(count))
        for i in range(0, whole(count), LANES):
            store(soft[0], i, lowest)
        k_base, v_base = b * k_at[0] + group * k_at[2], b * v_at[0] + group * v_at[2]
        stop = 0
        while True:
            start, stop, begin, end, n_blocks = next_run(
                stop, b, query, count, size, slots, begins, ends, spans_at, sight
            )
            if start == stop:
                break
            for block in range(n_blocks):
                lane, lanes, own = lanes_of(block, start, stop, ends.size > 0, sight)
                at = begin + block * size
                rows = min(size, end - at)
                tokens = rows - 1 if ends.size else min(rows, size - 1)
                score(k, k_base + at * k_at[1], k_at[1], rows, lane, lanes, count, width, queries, scores)
                if absorb(scores, tokens, block, lane, lanes, own, sight, soft):
                    scale(out, lane * width, width, lanes, width, soft[2], lane, 1)
                height = fours(min(lanes, count - lane))
                add_product(
                    out, lane * width, width, height, width, scores, lane, 1, QUERIES, v, v_base + at * v_at[1],
                    v_at[1], tokens,
                )  # fmt: skip
        y_at = ((b * n_queries + query) * n_heads + head) * width
        finish(soft, out, count, width, y, y_at, n_heads * width, lse, (b * n_heads + head) * n_queries + query, 1)
