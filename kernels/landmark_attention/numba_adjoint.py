"""The backward loops of the numba backend: the weights again from the scores and the log-sum-exp, block by block.

With e the product of a value and the gradient of y, a token's score gets its weight times what e is above its mean: the
mean over the block where the query reaches that through its landmark, over everything in the query's own block. The
landmark's score gets the block's weight times what the mean over the block is above that over everything.

A task is a run of tiles of queries of one row of the batch and one key/value head. Where several tasks share the keys
of a head, each has sums of its own for the keys that it sees, and `reduce` of sparse attention adds them up.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from zoo.kernels.landmark_attention.numba_tiles import SIGHT, kinds, lanes_of, next_run, score, weigh
from zoo.kernels.matrix import add_product, copy
from zoo.kernels.simd import LANES, LOG2_E, exp2, jit, load, scratch, store, where_negative
from zoo.kernels.sparse_attention.numba_adjoint import read_sums
from zoo.kernels.sparse_attention.numba_tiles import QUERIES, fours, load_queries, whole, zeros


@jit
def adjoin(scores, grads, tokens, rows, block, lane, lanes, hidden, sight, sums):
    """Turns a block's scores into weights, and the products of values and the gradient of y into scores' gradients.

    Args:
        scores: The last of the `rows` is the landmark, where there are more rows than tokens.
        grads: Like scores.
        tokens: Ordinary tokens.
        rows: Keys.
        block: Its number.
        lane: First lane.
        lanes: How many.
        hidden: Whether it is the own block of any query.
        sight: See `next_run`.
        sums: See `read_sums` of sparse attention.
    """
    for i in range(lane, lane + lanes, LANES):
        own, seen = kinds(block, sight, i)
        zero = own * 0.0
        mark = load(scores, tokens * QUERIES + i)
        most, added = weigh(scores, tokens, i, own, hidden, sight)
        mean = zero
        for r in range(tokens):
            mean = mean + load(scores, r * QUERIES + i) * load(grads, r * QUERIES + i)
        mean = mean / added
        less = load(sums, QUERIES + i)  # minus the mean over everything
        of_block = where_negative(seen, exp2(mark + load(sums, i)), zero)
        share = where_negative(own, exp2(most + load(sums, i)), of_block / added)
        of_block = where_negative(own, zero, of_block)
        middle = where_negative(own, less, zero - mean)
        for r in range(tokens):
            weight = load(scores, r * QUERIES + i) * share
            store(scores, r * QUERIES + i, weight)
            store(grads, r * QUERIES + i, (load(grads, r * QUERIES + i) + middle) * weight)
        for r in range(tokens, fours(rows)):
            store(scores, r * QUERIES + i, zero)
            store(grads, r * QUERIES + i, zero)
        if rows > tokens:
            store(grads, tokens * QUERIES + i, of_block * (mean + less))


@jit
def backward(
    first, last, sizes, factor, cuts, tiles, q, q_at, k, k_at, v, v_at, slots, begins, ends, spans_at, y, lse, dy,
    ranges, starts, d_row, dq, dk, dv,
):  # fmt: skip
    """Runs the tasks; see `numba_backend` for the arguments."""
    n_queries, n_heads, n_groups, width, size, n_tiles = sizes
    q_rows, q_columns = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    dy_rows, dy_columns = scratch(QUERIES * width, q), scratch(QUERIES * width, q)
    scores, grads = scratch(fours(size) * QUERIES, q), scratch(fours(size) * QUERIES, q)
    own_dq = scratch(QUERIES * width, q)
    sight, sums = scratch(SIGHT, q), scratch(2 * QUERIES, q)

    for task in range(first, last):
        # The rows of three more keys may get zeros added.
        zeros(dk, starts[task], d_row, ranges[task, 1] + 3, width)
        zeros(dv, starts[task], d_row, ranges[task, 1] + 3, width)
        base = starts[task] - ranges[task, 0] * d_row
        for entry in range(cuts[task], cuts[task + 1]):
            b, tile = divmod(entry, n_tiles)
            head, query, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 3]
            group = head * n_groups // n_heads
            q_row = b * q_at[0] + query * q_at[1] + head * q_at[2]
            load_queries(q, q_row, q_at[1], count, width, factor, q_rows, q_columns)
            for i in range(0, width * QUERIES, LANES):
                store(q_columns, i, load(q_columns, i) * LOG2_E)
            y_at, y_row = ((b * n_queries + query) * n_heads + head) * width, n_heads * width
            load_queries(dy, y_at, y_row, count, width, 1.0, dy_rows, dy_columns)
            lse_at = (b * n_heads + head) * n_queries + query
            read_sums(lse, lse_at, 1, dy_rows, y, y_at, y_row, count, width, sums)
            zeros(own_dq, 0, width, whole(count), width)
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
                    k_at_block, v_at_block, d_at = k_base + at * k_at[1], v_base + at * v_at[1], base + at * d_row
                    # As if the tile were full: a few queries are worth no path of their own here.
                    score(k, k_at_block, k_at[1], rows, lane, lanes, QUERIES, width, (q_rows, q_columns), scores)
                    score(v, v_at_block, v_at[1], tokens, lane, lanes, QUERIES, width, (dy_rows, dy_columns), grads)
                    adjoin(scores, grads, tokens, rows, block, lane, lanes, own, sight, sums)
                    depth = min(lane + lanes, count) - lane
                    add_product(
                        dv, d_at, d_row, fours(tokens), width, scores, lane, QUERIES, 1, dy_rows, lane * width, width,
                        depth,
                    )  # fmt: skip
                    add_product(
                        dk, d_at, d_row, fours(rows), width, grads, lane, QUERIES, 1, q_rows, lane * width, width, depth
                    )
                    add_product(
                        own_dq, lane * width, width, fours(depth), width, grads, lane, 1, QUERIES, k, k_at_block,
                        k_at[1], rows,
                    )  # fmt: skip
            copy(own_dq, 0, width, count, width, dq, y_at, y_row, factor)
