"""What the forward and the backward loops of the numba backend share: which blocks a tile of queries sees, and how.

A tile is up to QUERIES queries of one head, and a block's scores are kept transposed, as in sparse attention: a row per
key, a lane per query. The queries of a tile may be of several documents; those of one are a run of lanes. What a lane
sees is three rows of QUERIES numbers, floats so that they compare in vectors.

Shape letters: T queries, S keys.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import add_product
from zoo.kernels.simd import (
    LANES,
    absolute,
    at_least,
    exp2,
    inlined,
    jit,
    load,
    splat,
    store,
    total,
    where_negative,
)
from zoo.kernels.sparse_attention.numba_tiles import QUERIES, fours, zeros

# Rows of what a lane sees: number of its own block, how many of that block's tokens, how many blocks there are to see.
OWN, REACH, SEEN = (QUERIES * row for row in range(3))
SIGHT = 3 * QUERIES

FEW = 4
"""Queries so few, as in decoding, that products with a lane per query would mostly compute nothing."""


@jit
def measure(n_rows, tiles, slots, begins, ends, spans_at, reach):
    """For each row of the batch and tile: work, first key that its queries see and the one after the last."""
    n_tiles = len(tiles)
    for entry in range(n_rows * n_tiles):
        b, tile = divmod(entry, n_tiles)
        low, high = np.int64(1) << 40, np.int64(0)
        for t in range(tiles[tile, 1], tiles[tile, 1] + tiles[tile, 3]):
            slot, begin, end = _span(b, t, slots, begins, ends, spans_at)
            if slot >= 0:
                low, high = min(low, begin), max(high, end)
        low = min(low, high)
        reach[entry, 0], reach[entry, 1], reach[entry, 2] = (high - low + QUERIES) * QUERIES, low, high


@inlined
def _span(b, t, slots, begins, ends, spans_at):
    """Slot of a query, and where its document begins and ends."""
    slot = slots[b * spans_at[0][0] + t * spans_at[0][1]]
    begin = begins[b * spans_at[1][0] + t * spans_at[1][1]]
    end = slot + 1
    if ends.size:
        end = ends[b * spans_at[2][0] + t * spans_at[2][1]]
    return slot, begin, end


@jit
def next_run(lane, b, query, count, size, slots, begins, ends, spans_at, sight):
    """Finds the next queries of one document, from `lane` on, and writes what they see; other lanes see nothing.

    Returns:
        The first lane of the run and the one after the last (equal at the end), where the document begins, where the
        sight of its queries ends, and how many blocks that makes.
    """
    while lane < count and slots[b * spans_at[0][0] + (query + lane) * spans_at[0][1]] < 0:
        lane += 1
    first, last_block, stop = lane, np.int64(-1), np.int64(0)
    begin = np.int64(0)
    nothing = splat(sight.dtype.type(-1.0))
    for i in range(0, SIGHT, LANES):
        store(sight, i, nothing)
    while lane < count:
        slot, own_begin, end = _span(b, query + lane, slots, begins, ends, spans_at)
        if lane == first:
            begin = own_begin
        if slot < 0 or own_begin != begin:
            break
        own, place = divmod(slot - begin, size)
        sight[OWN + lane], sight[SEEN + lane] = own, own
        sight[REACH + lane] = min(place + 1, size - 1)
        if ends.size:
            sight[REACH + lane] = min(size, end - begin - own * size) - 1
            sight[SEEN + lane] = -((begin - end) // size)
            last_block = -((begin - end) // size) - 1
        last_block, stop = max(last_block, own), max(stop, end)
        lane += 1
    return first, lane, begin, stop, last_block + 1


@jit
def lanes_of(block, first, last, both_ways, sight):
    """Which lanes of a run see a block: the first vector's and how many; and whether it is any query's own."""
    low, own = last, False
    for lane in range(first, last):
        if both_ways or sight[OWN + lane] >= block:
            low = min(low, lane)
        own |= sight[OWN + lane] == block
    low = low // LANES * LANES
    return low, -(-(last - low) // LANES) * LANES, own


@jit
def score(k, k_at, k_row, rows, lane, lanes, count, width, queries, scores):
    """Scores of `rows` keys, a block and its landmark, with the queries in `lanes` lanes from `lane` on.

    Up to three keys behind them are read as well.
    """
    by_row, by_column = queries
    zeros(scores, lane, QUERIES, fours(rows), lanes)
    if count <= FEW:
        for r in range(rows):
            for i in range(count):
                product = load(k, k_at + r * k_row) * load(by_row, i * width)
                for c in range(LANES, width, LANES):
                    product = product + load(k, k_at + r * k_row + c) * load(by_row, i * width + c)
                scores[r * QUERIES + i] = total(product)
    else:
        add_product(scores, lane, QUERIES, fours(rows), lanes, k, k_at, k_row, 1, by_column, lane, QUERIES, width)


@inlined
def kinds(block, sight, i):
    """Vectors for the lanes from i on, negative: where the block is the query's own, and where it is one to see."""
    own = absolute(load(sight, OWN + i) - block) - 0.5
    return own, where_negative(own, own * 0.0, (block + 0.5) - load(sight, SEEN + i))


@jit
def weigh(scores, tokens, i, own, hidden, sight):
    """Turns the scores of a block's tokens into exponentials relative to the largest of them, for one vector of lanes.

    Returns:
        The largest score and the sum of the exponentials, of the tokens that a lane sees where the block is `own`.
    """
    if hidden:  # some lanes own the block, and see the first tokens of it only
        limit = where_negative(own, load(sight, REACH + i), own * 0.0 + tokens)
        nothing = own * 0.0 - np.inf
        for r in range(tokens):
            store(scores, r * QUERIES + i, where_negative(r + 0.5 - limit, load(scores, r * QUERIES + i), nothing))
    a = load(scores, i)
    b = a
    for r in range(1, tokens - 1, 2):
        a, b = at_least(a, load(scores, r * QUERIES + i)), at_least(b, load(scores, (r + 1) * QUERIES + i))
    most = at_least(at_least(a, b), load(scores, (tokens - 1) * QUERIES + i))
    added = own * 0.0
    for r in range(tokens):
        weight = exp2(load(scores, r * QUERIES + i) - most)
        store(scores, r * QUERIES + i, weight)
        added = added + weight
    return most, added
