"""Metrics of a split, over all of it and per slice, as sums that add up over batches and processes.

Letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from zoo.train.data.stream import IGNORE


class TokenMetrics(Metric):
    """Loss, accuracy, exact match, perplexity and bits per byte of the labelled positions.

    `acc` is right labelled positions over all labelled positions; `exact` is the share of examples with every
    labelled position right. Each is also given per slice of the data, named like "acc/num_pairs=4".
    """

    full_state_update = False
    # One row of sums for the whole split, then one per value of each slice: column names below.
    sums: Tensor
    _COLUMNS = ("loss", "right", "labels", "exact", "examples")

    def __init__(
        self,
        slice_values: Mapping[str, Sequence[int]] | None = None,
        bytes_per_label: float | None = None,
        *,
        perplexity: str = "perplexity",
    ) -> None:
        """Declares the sums.

        Args:
            slice_values: Every value that each slice can take; values met in no example give no result.
            bytes_per_label: Bytes of text that one label stands for; None where the data are no text.
            perplexity: What the exponential of the loss is called.
        """
        super().__init__()
        self.slices = {name: list(values) for name, values in (slice_values or {}).items()}
        self.bytes_per_label = bytes_per_label
        self.perplexity = perplexity
        rows = 1 + sum(map(len, self.slices.values()))
        # float64 counts exactly up to 2**53; one tensor costs one reduction between processes.
        self.add_state("sums", torch.zeros(rows, len(self._COLUMNS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, slices: Mapping[str, Tensor] | None = None) -> None:
        """Adds a batch.

        Args:
            logits: (B, L, V).
            targets: (B, L), `IGNORE` where there is no label.
            slices: For each slice the value of each example, (B,).
        """
        labelled = targets != IGNORE  # (B, L)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        right = (logits.argmax(-1) == targets) & labelled  # (B, L)
        labels = labelled.sum(1)  # (B,)
        has_label = labels > 0
        exact = (right.sum(1) == labels) & has_label
        columns = (losses.view_as(targets).sum(1), right.sum(1), labels, exact, has_label)
        per_example = torch.stack([column.double() for column in columns], dim=1)  # (B, 5)
        self.sums[0] += per_example.sum(0)
        row = 1
        for name, values in self.slices.items():
            for value in values:
                if slices is not None and name in slices:
                    self.sums[row] += per_example[slices[name] == value].sum(0)
                row += 1

    def compute(self) -> dict[str, float]:
        """The metrics as plain numbers; a slice without examples is left out, an overflow is infinity."""
        rows = self.sums.tolist()
        names = [f"/{name}={value}" for name, values in self.slices.items() for value in values]
        results: dict[str, float] = {}
        for suffix, sums in zip(["", *names], rows, strict=True):
            loss, right, labels, exact, examples = sums
            if not labels:
                continue
            results[f"loss{suffix}"] = loss / labels
            results[f"acc{suffix}"] = right / labels
            results[f"exact{suffix}"] = exact / examples
            results[f"{self.perplexity}{suffix}"] = _exp(loss / labels)
            if self.bytes_per_label is not None:
                results[f"bits_per_byte{suffix}"] = loss / labels / math.log(2) / self.bytes_per_label
        return results


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
