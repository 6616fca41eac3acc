"""Landmark tokens: one behind each block of a document's tokens, which the blocks of the model read and nobody else.

Letters: B batch, T tokens of the model, S slots (tokens and landmarks), D d_model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.documents import document_ends
from zoo.kernels.errors import ConfigError, DataError
from zoo.mixer import Wrapper


class Slots(NamedTuple):
    """What the blocks read, slot by slot; rows that have fewer landmarks than others end with slots of nothing."""

    places: Tensor
    """(B, S) int64: place of the slot in its document, landmarks counted; -1: nothing."""
    marks: Tensor
    """(B, S) bool: which are landmarks."""
    at: Tensor
    """(B, T) int64: where the model's tokens stand."""
    ends: Tensor | None
    """(B, S) int64: slot after the last one of its document; None where a token sees only what came before it."""

    def queries(self, before: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """slots, begins and ends for `landmark_attention`, where `before` keys stand in front of those of the slots."""
        slots = torch.arange(before, before + self.places.shape[1], device=self.places.device)
        ends = None if self.ends is None else self.ends + before
        return torch.where(self.places >= 0, slots, -1), slots - self.places, ends


def slots_of(shared: dict[str, Any] | None) -> Slots:
    """What a `LandmarkTokens` left for the mixers.

    Raises:
        ConfigError: There is none around the blocks.
    """
    if shared is None or "landmarks" not in shared:
        raise ConfigError("landmark attention reads landmarks, which only its own model inserts: use arch=landmark")
    return shared["landmarks"]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, S, ...) by index (B, M): (B, M, ...)."""
    offsets = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=index.device)[:, None]
    return x.flatten(0, 1).index_select(0, (index + offsets).flatten()).unflatten(0, index.shape)


class LandmarkTokens(Wrapper):
    """Inserts a landmark as soon as a block is complete, and takes them out again.

    Where a token sees both sides, the last block of a document gets one too, complete or not: without it, tokens of
    other blocks could not reach it.

    Args:
        d_model: D.
        block_size: Tokens of a block.
        causal: Whether a token sees only what came before it.
        strict: Whether rows must have equal numbers of landmarks where a state is carried: other mixers than those that
            know `Slots` would take slots of nothing for tokens.
    """

    def __init__(self, d_model: int, block_size: int, causal: bool, *, strict: bool = False) -> None:
        super().__init__()
        self.block_size, self.causal, self.strict = block_size, causal, strict
        self.embedding = nn.Embedding(1, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def insert(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, shared: dict[str, Any], *, carried: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `Wrapper.insert`; leaves `Slots` in shared["landmarks"].

        Raises:
            DataError: It is `strict`, and rows differ.
        """
        n_tokens = x.shape[1]
        closes = (positions + 1) % self.block_size == 0
        if not self.causal:
            closes = closes | F.pad(positions[:, 1:] == 0, (0, 1), value=True)
        if not carried and (
            self.causal or segment_ids is None
        ):  # known without a look at numbers, which a GPU would wait for
            most = self.length(n_tokens) - n_tokens
        else:
            fewest, most = (int(x) for x in closes.sum(1).aminmax())
            if self.strict and carried and fewest < most:
                raise DataError(
                    "rows whose blocks end at different tokens cannot be carried on in a hybrid with landmark: "
                    "read each row by itself"
                )
        times = torch.arange(n_tokens, device=x.device).expand_as(positions)
        at = times + closes.cumsum(1) - closes.long()  # (B, T)
        behind = torch.where(closes, at + 1, n_tokens + most)  # the column of those without is cut off
        shape = (*x.shape[:1], n_tokens + most + 1)
        places = positions + positions // self.block_size
        none = torch.full(shape, -1, device=x.device)
        places = none.scatter(1, at, places).scatter(1, behind, places + 1)[:, :-1]
        marks = torch.zeros(shape, dtype=torch.bool, device=x.device).scatter(1, behind, True)[:, :-1]
        source = torch.zeros(shape, dtype=torch.int64, device=x.device).scatter(1, at, times)[:, :-1]
        ends = None
        if not self.causal:
            ends = document_ends(torch.arange(shape[1] - 1, device=x.device) - places)
        shared["landmarks"] = Slots(places, marks, at, ends)
        source = torch.where(marks, source.roll(1, 1), source)  # a landmark is of the document of the token before it
        if segment_ids is not None:  # what is nothing is of no document
            segment_ids = torch.where(places >= 0, take(segment_ids, source), segment_ids[:, -1:] + 1)
        if "global_tokens" in shared:
            shared["global_tokens"] = take(shared["global_tokens"], source) & (places >= 0) & ~marks
        x = torch.where(marks[..., None], self.embedding.weight.to(x.dtype), take(x, source))
        return x, segment_ids

    def remove(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        """See `Wrapper.remove`."""
        return take(x, slots_of(shared).at)

    def length(self, seq_len: int) -> int:
        """See `Wrapper.length`."""
        return seq_len + (seq_len if self.causal else seq_len + self.block_size - 1) // self.block_size
