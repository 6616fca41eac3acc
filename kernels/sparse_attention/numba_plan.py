"""Which tiles of queries there are, and how they are dealt to tasks of equal work; for the numba backend.

Nothing here depends on the number of threads, so neither do the results.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools

import numpy as np

from zoo.kernels.simd import jit
from zoo.kernels.sparse_attention.numba_tiles import QUERIES


@functools.lru_cache(maxsize=64)
def tiles(
    n_queries: int, n_heads: int, n_groups: int, dilation: tuple[int, ...], tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lists the tiles of queries: those of one key/value head together, and among them in order of their queries.

    Args:
        n_queries: T.
        n_heads: H.
        n_groups: G.
        dilation: Per head, the distance of a tile's queries.
        tile: Queries that have far keys in common; 0 where there are no far keys.

    Returns:
        (tiles, 4): head, first query, distance and number of its queries. (G + 1,): where each key/value head begins.
    """
    table = []
    for head, step in enumerate(dilation):
        if tile:
            offsets = np.arange(0, tile, QUERIES)
            first = (np.arange(0, n_queries, tile)[:, None] + offsets).reshape(-1)
            room = np.tile(np.minimum(tile - offsets, QUERIES), -(-n_queries // tile))
        else:
            first = (np.arange(0, n_queries, QUERIES * step)[:, None] + np.arange(min(step, n_queries))).reshape(-1)
            room = np.full(len(first), QUERIES)
        room = np.minimum(room, -(-(n_queries - first) // step))
        own = np.stack([np.full(len(first), head), first, np.full(len(first), step), room], axis=1)
        table.append(own[room > 0])
    rows = np.concatenate(table).astype(np.int64)
    group = rows[:, 0] * n_groups // n_heads
    order = np.lexsort((rows[:, 0], rows[:, 1], group))
    return np.ascontiguousarray(rows[order]), np.searchsorted(group[order], np.arange(n_groups + 1))


@jit
def measure(n_rows, shift, n_keys, tiles, lo, hi, span_at, far, far_sizes, far_at, reach):
    """For each row of the batch and tile: work, first key that its queries may see and the one after the last."""
    n_tiles = len(tiles)
    for entry in range(n_rows * n_tiles):
        b, tile = divmod(entry, n_tiles)
        head, query, step, count = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2], tiles[tile, 3]
        low, high = n_keys, np.int64(0)
        for t in range(query, query + count * step, step):
            begin, end = lo[b * span_at[0][0] + t * span_at[0][1]], hi[b * span_at[1][0] + t * span_at[1][1]]
            if begin < end:
                low, high = min(low, begin), max(high, end)
        work = max(high - low, 0) // step
        if far_sizes[0]:
            row = b * far_at[0] + head * far_at[1] + query // far_sizes[2] * far_at[2]
            for m in range(far_sizes[0]):
                begin = far[row + m]
                if begin >= 0:
                    end = min(begin + far_sizes[1], n_keys)
                    work += end - begin
                    low, high = min(low, begin), max(high, end)
        reach[entry, 0], reach[entry, 1], reach[entry, 2] = (work + QUERIES) * QUERIES, low, max(low, high)


@jit
def cut(reach, lists, n_parts, cuts, ranges):
    """Cuts each list of entries into `n_parts` runs of about equal work.

    Args:
        reach: See `measure`; repeated where the rows of the batch are alike.
        lists: Where each list begins, and the end of the last.
        n_parts: Runs per list.
        cuts: Written: where each run begins, and the end of the last.
        ranges: Written, (runs, 2): first key that a run may see, and how many from it on.

    Returns:
        The work of all lists.
    """
    everything = 0
    for i in range(len(lists) - 1):
        total = 0
        for entry in range(lists[i], lists[i + 1]):
            total += reach[entry % len(reach), 0]
        everything += total
        entry, done = lists[i], 0
        for part in range(n_parts):
            run = i * n_parts + part
            cuts[run] = entry
            low, high = np.int64(1) << 40, np.int64(0)
            while entry < lists[i + 1] and (part == n_parts - 1 or done * n_parts < total * (part + 1)):
                row = reach[entry % len(reach)]
                done += row[0]
                if row[1] < row[2]:
                    low, high = min(low, row[1]), max(high, row[2])
                entry += 1
            ranges[run, 0], ranges[run, 1] = min(low, high), high - min(low, high)
    cuts[len(cuts) - 1] = lists[len(lists) - 1]
    return everything
