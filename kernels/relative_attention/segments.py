"""What each segment of queries sees, in memory linear in the number of segments.

Letters: B batch, N segments, Q queries of a segment, M slots of memory, R runs of them, W most slots
that a segment sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """The memory that each segment sees before itself: runs of slots, the oldest first, which count as neighbours.

    A dimension marked `B|1` may be 1 where all rows are alike.
    """

    starts: Tensor
    """(B|1, N, R) integers: first slot of each run."""
    lengths: Tensor
    """(B|1, N, R) integers from 0: how many slots it has."""
    counts: Tensor
    """(B|1, N) integers from 0 to Q: how many of the segment's queries there are, the first ones."""


def memory_slots(segments: Segments) -> tuple[Tensor, Tensor]:
    """Lists the slots that each segment sees, the newest last.

    Returns:
        Their numbers, (B|1, N, W) int64, 0 where there is none, and whether there is one.
    """
    starts, lengths = segments.starts, segments.lengths
    ends = lengths.cumsum(-1)  # (B|1, N, R)
    total = ends[..., -1:]
    width = int(total.max()) if total.numel() else 0
    at = torch.arange(width, device=starts.device) - width + total  # (B|1, N, W): the oldest slot is at 0
    run = (at[..., None] >= ends[..., None, :]).sum(-1)
    there = at >= 0
    slots = (starts - ends + lengths).gather(-1, run) + at
    return slots * there, there


def visible_pairs(segments: Segments) -> int:
    """How many pairs of a query and something that it sees there are in all B|1 rows, for one head."""
    counts = segments.counts
    return int((counts * segments.lengths.sum(-1) + counts * (counts + 1) // 2).sum())
