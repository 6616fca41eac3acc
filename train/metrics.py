"""Metrics of a split, over all of it and per slice, as sums that add up over batches and processes.

Letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import itertools
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
        joint: Sequence[Sequence[str]] = (),
        perplexity: str = "perplexity",
    ) -> None:
        """Declares the sums.

        Args:
            slice_values: Every value that each slice can take; values met in no example give no result.
            bytes_per_label: Bytes of text that one label stands for; None where the data are no text.
            joint: Slices by which the data are split together, named like "acc/seq_len=512,depth=3".
            perplexity: What the exponential of the loss is called.
        """
        super().__init__()
        known = slice_values or {}
        combinations = [
            dict(zip(names, values, strict=True))
            for names in [*([name] for name in known), *joint]
            for values in itertools.product(*(known[name] for name in names))
        ]
        self.parts: list[dict[str, int]] = [{}, *combinations]
        """Values of the slices that an example of each row of `sums` has."""
        self.bytes_per_label = bytes_per_label
        self.perplexity = perplexity
        # float64 counts exactly up to 2**53; one tensor costs one reduction between processes.
        self.add_state(
            "sums", torch.zeros(len(self.parts), len(self._COLUMNS), dtype=torch.float64), dist_reduce_fx="sum"
        )

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
        for row, part in enumerate(self.parts):
            if part.keys() <= (slices or {}).keys():
                chosen = torch.ones_like(has_label)
                for name, value in part.items():
                    chosen &= (slices or {})[name] == value
                self.sums[row] += per_example[chosen].sum(0)

    def compute(self) -> dict[str, float]:
        """The metrics as plain numbers; a slice without examples is left out, an overflow is infinity."""
        rows = self.sums.tolist()
        results: dict[str, float] = {}
        for part, sums in zip(self.parts, rows, strict=True):
            suffix = "/" * bool(part) + ",".join(f"{name}={value}" for name, value in part.items())
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
