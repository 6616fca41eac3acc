"""What a model learns from a batch: to predict its labels, hidden tokens, or one label per document.

An objective changes a batch on its way to the model and the logits on their way to the loss, nothing else. The data,
and so the hash of the batches, are the same under every objective.

Letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.documents import document_begins
from zoo.kernels.errors import DataError
from zoo.train.data.stream import IGNORE, Batch


class Objective:
    """The labels as the data have them, each predicted at its own position."""

    name: ClassVar[str] = "causal"
    causal: ClassVar[bool] = True
    """Whether the model reads one way where its settings leave it open."""
    extra_tokens: ClassVar[int] = 0
    """Token ids that the model has beyond those of the data."""
    perplexity: ClassVar[str] = "perplexity"
    """What the exponential of the loss is called."""

    def prepare(self, batch: Batch, split: str, index: int) -> Batch:
        """What the model reads and must predict: `batch`, or a copy with other `inputs` and `targets`.

        Args:
            batch: as the data give it; left as it is.
            split: "train", "val" or "test".
            index: number of the batch in its split.
        """
        return batch

    def read_out(self, logits: Tensor, segment_ids: Tensor | None) -> Tensor:
        """The logits that the loss sees, (B, L, V)."""
        return logits


class Classify(Objective):
    """One label per document, predicted from the mean of the logits over the document.

    As the head is linear, this is mean pooling before a linear classifier.
    """

    name = "classify"
    causal = False

    def prepare(self, batch: Batch, split: str, index: int) -> Batch:
        """The batch as it is.

        Raises:
            DataError: a document has several labels (looked for on the CPU only: a GPU would have to wait).
        """
        if batch["targets"].device.type == "cpu":
            most = int(_labels(batch).max())
            if most > 1:
                raise DataError(
                    f"objective=classify takes one label per document, but a document of these data has {most}: take "
                    f"data such as listops, or leave objective out"
                )
        return batch

    def read_out(self, logits: Tensor, segment_ids: Tensor | None) -> Tensor:
        """The document's mean at each of its positions, in fp32."""
        logits = logits.float()
        if segment_ids is None:
            return logits.mean(1, keepdim=True).expand_as(logits)
        documents = _documents(segment_ids).flatten()  # (B*L,)
        flat = logits.flatten(0, 1)  # (B*L, V)
        sums = torch.zeros_like(flat).index_add(0, documents, flat)
        sizes = torch.zeros_like(flat[:, 0]).index_add(0, documents, torch.ones_like(flat[:, 0]))
        return (sums / sizes.clamp(min=1)[:, None])[documents].view_as(logits)


class Masked(Objective):
    """Tokens hidden at random are predicted from those on both sides (BERT, arXiv 1810.04805).

    Of the tokens chosen, 80 % give way to a mask token, 10 % to a random one, and 10 % stay. A document without any
    label, such as padding, has no token chosen. Which are chosen depends on the seed and the number of the training
    batch alone; validation and test hide the same tokens whatever the seed.

    Args:
        rate: share of the tokens that are chosen.
        vocab_size: V of the data; the mask token is the id behind them.
        seed: of the training batches.
    """

    name = "masked"
    causal = False
    extra_tokens = 1
    # Of masked tokens, so that nobody sets it beside that of next tokens.
    perplexity = "masked_perplexity"

    def __init__(self, rate: float, vocab_size: int, seed: int) -> None:
        self.rate = rate
        self.vocab_size = vocab_size
        self.seed = seed

    def prepare(self, batch: Batch, split: str, index: int) -> Batch:
        """A copy with tokens hidden in `inputs`, and `targets` at these positions alone."""
        inputs = batch["inputs"]  # (B, L)
        chance, kind, choice = (draw.to(inputs.device) for draw in self._draws(tuple(inputs.shape), split, index))
        chosen = (chance < self.rate) & (_labels(batch) > 0)
        replacement = torch.where(kind < 0.8, self.vocab_size, (choice * self.vocab_size).long())
        hidden = chosen & (kind < 0.9)
        return batch | {
            "inputs": torch.where(hidden, replacement, inputs),
            "targets": torch.where(chosen, inputs, IGNORE),
        }

    def _draws(self, shape: tuple[int, ...], split: str, index: int) -> Tensor:
        """Numbers in [0, 1), (3, B, L), float64."""
        place = ("train", "val", "test").index(split)
        seed = self.seed if split == "train" else 0
        # Raw output, as numpy promises never to change it.
        raw = np.random.PCG64(np.random.SeedSequence([seed, place, index])).random_raw((3, *shape))
        return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53)


OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (Objective, Masked, Classify)}
MASK_RATE = 0.15


def make_objective(name: str, vocab_size: int, *, mask_rate: float | None = None, seed: int = 0) -> Objective:
    """The objective of that name.

    Args:
        name: A key of `OBJECTIVES`.
        vocab_size: V of the data.
        mask_rate: Share of the tokens that "masked" hides; `MASK_RATE` unless said.
        seed: Of the training batches.
    """
    kind = OBJECTIVES[name]
    return Masked(mask_rate or MASK_RATE, vocab_size, seed) if kind is Masked else kind()


def _documents(segment_ids: Tensor) -> Tensor:
    """A number below B*L for each token, (B, L), equal for those of one document alone."""
    batch, length = segment_ids.shape
    return document_begins(segment_ids) + length * torch.arange(batch, device=segment_ids.device)[:, None]


def _labels(batch: Batch) -> Tensor:
    """The number of labels in the document of each token, (B, L)."""
    labelled = (batch["targets"] != IGNORE).long()  # (B, L)
    if "segment_ids" not in batch:
        return labelled.sum(1, keepdim=True).expand_as(labelled)
    documents = _documents(batch["segment_ids"]).flatten()
    counts = torch.zeros_like(documents).index_add(0, documents, labelled.flatten())
    return counts[documents].view_as(labelled)
