"""Queries in tiles, each of which lies in one block of one document.

Letters: B batch, T time, S cached keys, N tiles of queries (each one block of a document, or a part of it), L places of
queries in all tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.layers.attention import Documents


class Queries(NamedTuple):
    """Queries in tiles, each of which lies in one block of one document. Places are indices of keys."""

    at: Tensor
    """(B|1, L) int64: where each query stands; -1 where a tile is not full."""
    first: Tensor
    """(B|1, N) int64: where the tile's document begins."""
    last: Tensor
    """(B|1, N) int64: one past its last token that is known."""
    row: Tensor
    """(B|1, N) int64: which block of its document the tile lies in."""
    tile: int
    """Places in each tile: no more than a block has, nor than there are queries."""


def whole_document(length: int, block: int, device: torch.device) -> Queries:
    """One document whose tokens are all there."""
    row = torch.arange(-(-length // block), device=device)[None]
    at = torch.arange(length, device=device)[None]
    return Queries(at, torch.zeros_like(row), torch.full_like(row, length), row, min(block, length))


def tile_documents(documents: Documents, cached: int, length: int, block: int) -> tuple[Queries, Tensor]:
    """Puts queries into tiles such that each tile lies in one block of one document.

    Returns:
        The tiles, and the place of each query among them, (B, T) int64.
    """
    assert documents.begins is not None
    times = torch.arange(length, device=documents.begins.device).expand_as(documents.begins)
    positions = times - documents.begins  # in their document, (B, T)
    opens = (positions % block == 0) | (times == 0)
    tile = opens.cumsum(1) - 1
    within = times - torch.where(opens, times, 0).cummax(dim=1).values
    width = min(block, length)
    places = tile * width + within
    n_tiles = int(tile[:, -1].max()) + 1
    at = times.new_full((times.shape[0], n_tiles * width), -1).scatter(1, places, times + cached)
    heads = (at[:, ::width] - cached).clamp(min=0)  # the time of each tile's first query, (B, N)
    ends = torch.full_like(times, length) if documents.ends is None else documents.ends
    first, last, position = (t.gather(1, heads) for t in (documents.begins, ends, positions))
    return Queries(at, first + cached, last + cached, position // block, width), places
