"""What the forward and the backward loops of the numba backend share: blocks of queries, chunks of slots, scores.

A block is up to QUERIES queries of one head of a segment, a chunk up to KEYS slots behind each other. Scores are kept a
row per query. A row is ROW numbers long, in order of distance, the farthest first; the slots of a chunk begin one
number further to the left in each row than in the row before. So a matrix whose rows are ROW numbers apart lies by
distance, the same memory with rows ROW - 1 apart lies by slot, and the shift of Transformer-XL (arXiv 1901.02860,
appendix B) costs nothing: products add to the same numbers in either order.

Shape letters: B batch, N segments, Q queries of a segment, H query heads, G key/value heads, K head width, M slots of
memory, R runs of slots, S distances.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product, clear, copy, transpose
from zoo.kernels.simd import LANES, inlined, jit, splat, store

QUERIES = 64
"""Queries of a block."""

KEYS = 512
"""Slots of a chunk: the more, the fewer distances are computed in vain, QUERIES - 1 for each chunk."""

PANEL = 64
"""Slots of one product: with the queries' half of it they fit the first-level cache."""

ROW = KEYS + QUERIES + LANES
"""Numbers in a row of scores. An odd number of vectors, or rows would share lines of the cache."""

BEFORE, BEHIND = QUERIES, QUERIES + 2 * LANES
"""Zeros before the farthest distance and behind distance 0, which what is masked runs into."""


@inlined
def whole(size):
    """`size` rounded up to whole vectors."""
    return -(-size // LANES) * LANES


@inlined
def fours(size):
    """`size` rounded up to the height that products come in."""
    return -(-size // 4) * 4


@jit
def load_rows(source, at, row, count, width, factor, rows):
    """Copies factor * some rows to scratch, and zeros up to the height that products come in."""
    copy(source, at, row, count, width, rows, 0, width, factor)
    clear(rows, count * width, (fours(count) - count) * width)


@jit
def transpose_panels(source, at, row, n, width, panels):
    """Writes `n` rows as columns, PANEL of them behind each other."""
    for first in range(0, n, PANEL):
        transpose(source, at + first * row, row, min(PANEL, n - first), width, panels, first * width, PANEL)


@jit
def add_by_slot(scores, height, n, rows, panels, width):
    """Adds the products of a block's rows and a chunk's columns."""
    for first in range(0, n, PANEL):
        columns = whole(min(PANEL, n - first))
        add_product(
            scores, height - 1 + first, ROW - 1, height, columns, rows, 0, width, 1, panels, first * width, PANEL, width
        )


@inlined
def distances_of(height, n, distance):
    """How many distances a block's rows have to a chunk's slots: none below 0 is seen."""
    return min(n + height - 1, distance + height)


@jit
def add_by_distance(scores, height, n, rows, r_columns, at, r_row, width):
    """Adds the products of a block's rows and `n` distances, from column `at` on."""
    for first in range(0, n, PANEL):
        columns = whole(min(PANEL, n - first))
        add_product(scores, first, ROW, height, columns, rows, 0, width, 1, r_columns, at + first, r_row, width)


@jit
def fill_rows(scores, height, columns, values):
    """Writes values[i] into row i."""
    for i in range(height):
        value = splat(values[i])
        for j in range(i * ROW, i * ROW + whole(columns), LANES):
            store(scores, j, value)


@jit
def hide(scores, height, n, near, value):
    """Writes `value` where row i does not see a slot: those behind the n-th, or behind slot near + i."""
    for i in range(height):
        start = height - 1 + i * (ROW - 1)
        j, end = min(n, near + i + 1), whole(n)
        while j < end and j % LANES:
            scores[start + j] = value
            j += 1
        for c in range(start + j, start + end, LANES):
            store(scores, c, splat(value))


@inlined
def column_of(distance, n_distances):
    """Where that distance stands among the columns or rows of positions, the farthest first."""
    return BEFORE + n_distances - 1 - distance


@inlined
def next_chunk(cursor, lengths, first, n_runs, slots, block, count):
    """Finds the next slots that a block sees: first those of the runs, then those of its segment.

    Args:
        cursor: Run, and slot in it, to go on at; run `n_runs` is the segment itself.
        lengths: Of the runs, from `first` on.
        first: See `lengths`.
        n_runs: R.
        slots: How many slots there are in the runs from the cursor on.
        block: First query.
        count: Queries of the block.

    Returns:
        The cursor behind them, run and slot at which they begin, how many they are (0 at the end), the slots left, and
        the distance of the block's first query to the first of them.
    """
    run, slot = cursor
    while run < n_runs and slot >= lengths[first + run]:
        run, slot = run + 1, 0
    size = lengths[first + run] if run < n_runs else block + count
    n = max(0, min(np.int64(KEYS), size - slot))
    distance = block + slots if run < n_runs else block - slot
    return (run, slot + n), run, slot, n, slots - n if run < n_runs else slots, distance
