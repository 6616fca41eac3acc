"""Packed documents: where in its row the document of each token begins and ends.

Letters: B batch, T time, s first tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def document_begins(segment_ids: Tensor) -> Tensor:
    """Time of the first token of each token's document; (B, T) to (B, T) int64."""
    first = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return torch.where(first, _times(segment_ids), 0).cummax(dim=1).values


def document_ends(segment_ids: Tensor) -> Tensor:
    """Time after the last token of each token's document; (B, T) to (B, T) int64."""
    length = segment_ids.shape[1]
    last = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (0, 1), value=True)
    ends = torch.where(last, _times(segment_ids) + 1, length)
    return ends.flip(1).cummin(dim=1).values.flip(1)


def first_tokens(slots: Tensor, new: Tensor, begins: Tensor) -> Tensor:
    """The first tokens of a document once T new ones are read.

    Args:
        slots: (B, s, ...), those that were read before, if it began before.
        new: (B, T, ...).
        begins: (B, 1) time at which the document begins.

    Returns:
        (B, s, ...), zeros for those to come.
    """
    size, length = slots.shape[1], new.shape[1]
    index = torch.arange(size, device=begins.device)
    times = begins + index  # (B, s)
    source = torch.where(times < 0, index, times.clamp(max=length - 1) + size)
    rows = torch.arange(slots.shape[0], device=begins.device)[:, None]
    return torch.cat((slots, new), dim=1)[rows, source] * (times < length)[..., None, None]


def _times(segment_ids: Tensor) -> Tensor:
    return torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
