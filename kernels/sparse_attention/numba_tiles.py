"""What the forward and the backward loops of the numba backend share: tiles of queries and keys, and their masks.

A tile is up to QUERIES queries of one head. Scores are kept transposed, a row per key and a lane per query: then
neither keys nor values are ever transposed, and the softmax needs no sum or maximum across lanes.

A head with dilation d and no far keys is worked on in classes: the queries of a tile are d apart, and so are their
keys, which are numbered within their class. Everywhere else neighbours are 1 apart, and a dilation is a mask.

Arrays are flat. The limits of a tile's queries are floats, so that they compare in vectors: five rows of QUERIES
numbers. The facts about a tile's keys are three rows of KEYS numbers.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, M far ranges.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from zoo.kernels.matrix import clear, copy, transpose
from zoo.kernels.simd import LANES, absolute, at_most, broadcast, inlined, jit, load, splat, store, where_negative

QUERIES = 64
"""Queries of a tile: four vectors, the width at which products are fastest."""

KEYS = 64
"""Keys of a tile: with the queries' half of a product it still fits the first-level cache."""

STRIP = 16
"""Keys of a tile at the edge of the intervals: a short one is seen by fewer of the queries."""

# Rows of the limits: first and last near key, first and last far key, phase of the dilation.
LOW, HIGH, FIRST, LAST, PHASE = (QUERIES * row for row in range(5))
LIMITS = 5 * QUERIES

# Rows of the facts about keys: position, log2 of how often it counts, phase of the dilation.
POSITION, WEIGHT, KEY_PHASE = (KEYS * row for row in range(3))
FACTS = 3 * KEYS

# How a tile of keys is masked; DILATED comes on top of NEAR or FAR.
OPEN, NEAR, FAR, DILATED = 0, 1, 2, 4


@inlined
def whole(size):
    """`size` rounded up to whole vectors."""
    return -(-size // LANES) * LANES


@inlined
def fours(size):
    """`size` rounded up to the height that products come in."""
    return -(-size // 4) * 4


@jit
def load_queries(source, at, row, count, width, factor, rows, columns):
    """Copies factor * queries to scratch, zeros where a vector is not full, and transposes them."""
    copy(source, at, row, count, width, rows, 0, width, factor)
    clear(rows, count * width, (whole(count) - count) * width)
    transpose(rows, 0, width, whole(count), width, columns, 0, QUERIES)


@jit
def read_limits(spans, span_at, b, tile, shift, dilation, limits, edges):
    """Fills the limits of a tile's queries, in class numbers, and finds what can be said of all of them.

    Args:
        spans: The arrays lo, hi, first, last.
        span_at: Their strides over B and T.
        b: Row of the batch.
        tile: First query, distance and number of the queries.
        shift: S - T.
        dilation: That is left to the masks.
        limits: Written.
        edges: Written: for each vector of queries the first near key of any and the one after the last.

    Returns:
        Four intervals, in class numbers: near keys that any query sees, that all of them see, far keys that any query
        may see, that all of them may.
    """
    lo, hi, first, last = spans
    query, step, count = tile
    origin = (shift + query) % step
    none = np.int64(1) << 40
    some, all_, far_some, far_all = (none, -none), (-none, none), (none, -none), (-none, none)
    for i in range(whole(count)):
        limits[LOW + i], limits[HIGH + i] = -np.inf, np.inf
        limits[FIRST + i], limits[LAST + i] = -np.inf, np.inf
        limits[PHASE + i] = 0.0
    for i in range(0, whole(count), LANES):
        edge = (none, -none)
        for lane in range(i, min(count, i + LANES)):
            t = query + lane * step
            begin, end = lo[b * span_at[0][0] + t * span_at[0][1]], hi[b * span_at[1][0] + t * span_at[1][1]]
            if step > 1:
                begin, end = -((origin - begin) // step), -((origin - end) // step)
            if begin < end:
                limits[LOW + lane], limits[HIGH + lane] = begin, end - 1
                edge = (min(edge[0], begin), max(edge[1], end))
            else:
                limits[LOW + lane], limits[HIGH + lane] = np.inf, -np.inf
                begin, end = none, -none
            all_ = (max(all_[0], begin), min(all_[1], end))
            begin, end = first[b * span_at[2][0] + t * span_at[2][1]], last[b * span_at[3][0] + t * span_at[3][1]]
            limits[FIRST + lane], limits[LAST + lane] = begin, end - 1
            far_some = (min(far_some[0], begin), max(far_some[1], end))
            far_all = (max(far_all[0], begin), min(far_all[1], end))
            if dilation > 1:
                limits[PHASE + lane] = (shift + t) % dilation
        edges[i // LANES * 2], edges[i // LANES * 2 + 1] = edge
        some = (min(some[0], edge[0]), max(some[1], edge[1]))
    return some, all_, far_some, far_all


@jit
def _next_near(at, some, all_, lanes, edges):
    """The tile of near keys that begins at `at`: how many keys, whether masked, the first lane and how many lanes."""
    if at >= all_[0] and at + KEYS <= min(all_[1], some[1]):
        return KEYS, OPEN, 0, lanes
    stop = min(at + STRIP, some[1])
    if at < all_[0] < stop:
        stop = all_[0]
    begin, end = lanes, 0
    for i in range(0, lanes, LANES):
        if edges[i // LANES * 2] < stop and edges[i // LANES * 2 + 1] > at:
            begin, end = min(begin, i), i + LANES
    is_open = at >= all_[0] and stop <= all_[1]
    return stop - at, OPEN if is_open else NEAR, begin, max(end - begin, 0)


@jit
def _next_far(m, r, sight, ranges, n_keys, dilation, keys, facts):
    """Collects up to KEYS far keys that any query sees, from key r of range m on; see `next_tile`.

    Returns where to go on, how many keys they are, how they are masked, and whether they lie behind each other.
    """
    some, all_, far_some, far_all = sight
    far, logs, first_range, (n_ranges, length, _) = ranges
    n, kind, straight = 0, OPEN, True
    while m < n_ranges and n < KEYS:
        start = far[first_range + m]
        weight = logs[first_range + m] if logs.size else logs.dtype.type(0)
        stop = min(start + length, n_keys, far_some[1])
        key = max(start + r, far_some[0])
        if start < 0 or weight == -np.inf:
            key = stop
        while key < stop and n < KEYS:
            if dilation == 1 and all_[0] <= key < all_[1]:
                key = all_[1]  # a near key for all of them, and none of them counts it twice
                continue
            if weight != 0.0 or some[0] <= key < some[1] or key < far_all[0] or key >= far_all[1]:
                kind = FAR
            straight &= n == 0 or keys[n - 1] + 1 == key
            keys[n] = key
            facts[POSITION + n], facts[WEIGHT + n] = key, weight
            n += 1
            key += 1
        if key < stop:
            r = key - start
        else:
            m, r = m + 1, 0
    return m, r, n, kind, straight


@jit
def next_tile(cursor, sight, lanes, edges, origin, step, dilation, ranges, n_keys, keys, facts):
    """Finds the next keys that any query of a tile sees: first the near ones, then those of the far ranges.

    Args:
        cursor: (near key, far range, key within it) to go on at.
        sight: What `read_limits` returned.
        lanes: Lanes of the tile.
        edges: See `read_limits`.
        origin: First key of the tile's class.
        step: Distance of the class's keys.
        dilation: That is left to the masks.
        ranges: The arrays of far ranges and of the base-2 logarithms of their counts (empty where each counts once),
            where those of this tile begin, and (M, keys per range, queries per row).
        n_keys: S.
        keys: Written where the keys do not lie evenly.
        facts: Written where they are masked.

    Returns:
        The cursor behind them; how many they are, 0 at the end; how they are masked; the first lane that sees any and
        how many lanes; the first key; their distance, 0 where they do not lie evenly or are no multiple of 4.
    """
    at, m, r = cursor
    if at < sight[0][1]:
        n, kind, lane, active = _next_near(at, sight[0], sight[1], lanes, edges)
        key, gap = origin + at * step, step
        cursor = (at + n, m, r)
        if dilation > 1:
            kind = NEAR
        if kind != OPEN:
            for i in range(n):
                facts[POSITION + i] = at + i
        if n % 4:
            for i in range(n):
                keys[i] = key + i * step
    else:
        m, r, n, kind, straight = _next_far(m, r, sight, ranges, n_keys, dilation, keys, facts)
        lane, active, key, gap = 0, lanes, keys[0], np.int64(straight)
        cursor = (at, m, r)
    if dilation > 1 and kind != OPEN:
        kind |= DILATED
        for i in range(n):
            facts[KEY_PHASE + i] = np.int64(facts[POSITION + i]) % dilation
    if n % 4:
        gap = 0
    return cursor, n, kind, lane, active, key, gap


@jit
def pack(source, at, row, keys, n, width, out):
    """Copies the rows of some keys to scratch."""
    for r in range(n):
        a, o = at + keys[r] * row, r * width
        for c in range(0, width, LANES):
            store(out, o + c, load(source, a + c))


@jit
def unpack(source, n, width, keys, out, at, row):
    """Adds rows of scratch to those of some keys."""
    for r in range(n):
        a, o = r * width, at + keys[r] * row
        for c in range(0, width, LANES):
            store(out, o + c, load(out, o + c) + load(source, a + c))


@jit
def zeros(out, at, row, height, width):
    """Clears rows of whole vectors."""
    zero = splat(out.dtype.type(0.0))
    for r in range(height):
        for c in range(at + r * row, at + r * row + width, LANES):
            store(out, c, zero)


@inlined
def _seen(kind, facts, r, limits, lane):
    """Not negative in the lanes whose query sees key r."""
    position = broadcast(facts, POSITION + r)
    near = at_most(position - load(limits, LOW + lane), load(limits, HIGH + lane) - position)
    if kind & DILATED:
        near = at_most(near, 0.0 - absolute(broadcast(facts, KEY_PHASE + r) - load(limits, PHASE + lane)))
    if kind & NEAR:
        return near
    far = at_most(position - load(limits, FIRST + lane), load(limits, LAST + lane) - position)
    return at_most(far, -1.0 - near)


@jit
def mask(scores, n, lane, lanes, kind, facts, limits):
    """Puts -inf where a query does not see a key, and counts far keys as often as they count."""
    hidden = splat(scores.dtype.type(-np.inf))
    for i in range(lane, lane + lanes, LANES):
        if kind == NEAR:  # by far the most frequent, so it has a loop without a choice in it
            low, high = load(limits, LOW + i), load(limits, HIGH + i)
            for r in range(n):
                position = broadcast(facts, POSITION + r)
                score = load(scores, r * QUERIES + i)
                seen = at_most(position - low, high - position)
                store(scores, r * QUERIES + i, where_negative(seen, hidden, score))
        else:
            for r in range(n):
                score = load(scores, r * QUERIES + i)
                if kind & FAR:
                    score = score + broadcast(facts, WEIGHT + r)
                store(scores, r * QUERIES + i, where_negative(_seen(kind, facts, r, limits, i), hidden, score))
