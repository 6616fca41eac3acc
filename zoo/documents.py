"""Packed documents: where in its row the document of each token begins and ends.

Letters: B batch, T time.
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


def _times(segment_ids: Tensor) -> Tensor:
    return torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
