"""Evaluates a model on a split of a dataset, at any length, by the metrics of training.

Letters: B batch, L length, V vocabulary, N labels of the example that has most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError
from zoo.model import Model
from zoo.train.data import DataModule
from zoo.train.data.stream import IGNORE, Batch
from zoo.train.metrics import TokenMetrics
from zoo.train.objectives import Objective

CHUNK = 4096
"""Tokens that a causal model reads at once unless said; it carries its state to the next chunk."""


@torch.no_grad()
def evaluate(
    model: Model,
    data: DataModule,
    *,
    split: str = "test",
    objective: Objective | None = None,
    chunk: int = CHUNK,
    batches: int | None = None,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> dict[str, float]:
    """Metrics of a model, the same as the trainer's own pass over the split gives.

    A causal model reads examples longer than `chunk` piece by piece with its state, so that memory does not grow with
    the length beyond what the state holds; logits are kept where there is a label only.

    Args:
        model: The model, on its device; it is left in the mode it was in.
        data: The dataset.
        split: "validation" or "test".
        objective: What its labels are; those of the data unless said.
        chunk: Tokens read at once.
        batches: Only the first so many batches; None: all.
        progress: Wraps the batches, to show how far it is.

    Returns:
        Metrics by name, per slice as "acc/<slice>=<value>"; see `TokenMetrics`.

    Raises:
        ConfigError: The model's vocabulary is too small for the data, or objective and model look different ways.
        DataError: The objective cannot use the labels of these data.
    """
    objective = objective or Objective()
    source = data.source
    _check(model, source.name, source.vocab_size, objective)
    own_labels = type(objective) is Objective
    metric = TokenMetrics(
        source.slice_values,
        source.bytes_per_label(split) if own_labels else None,
        joint=source.joint_slices,
        perplexity=objective.perplexity,
    )
    device = model.embedding.weight.device
    metric.to(device)
    loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    was_training = model.training
    model.eval()
    try:
        for index, batch in enumerate(progress(loader)):
            if index == batches:
                break
            batch = objective.prepare(_to(batch, device), "val" if split == "validation" else "test", index)
            if own_labels:
                logits, targets = _at_labels(model, batch, chunk)
            else:
                segment_ids = batch.get("segment_ids")
                logits = objective.read_out(model(batch["inputs"], segment_ids=segment_ids).logits, segment_ids)
                targets = batch["targets"]
            metric.update(logits, targets, batch.get("slices"))
    finally:
        model.train(was_training)
    return metric.compute()


def _at_labels(model: Model, batch: Batch, chunk: int) -> tuple[Tensor, Tensor]:
    """Logits (B, N, V) and targets (B, N) of the labelled positions alone, in order, `IGNORE` behind the last."""
    inputs, targets, segment_ids = batch["inputs"], batch["targets"], batch.get("segment_ids")
    length = inputs.shape[1]
    state = None if length <= chunk else model.init_state(inputs.shape[0])
    found = []
    for begin in range(0, length, chunk):
        piece = slice(begin, begin + chunk)
        out = model(inputs[:, piece], state, None if segment_ids is None else segment_ids[:, piece])
        found.append((out.logits[targets[:, piece] != IGNORE], *(targets[:, piece] != IGNORE).nonzero(as_tuple=True)))
        state = out.state
    labelled = targets != IGNORE  # (B, L)
    place = labelled.cumsum(1) - 1  # (B, L): the how-manieth label of its example
    shape = (inputs.shape[0], max(1, int(labelled.sum(1).max())))
    logits = found[0][0].new_zeros(*shape, found[0][0].shape[-1])
    for number, (some, rows, times) in enumerate(found):
        logits[rows, place[rows, times + number * chunk]] = some
    compact = targets.new_full(shape, IGNORE)
    rows, times = labelled.nonzero(as_tuple=True)
    compact[rows, place[rows, times]] = targets[rows, times]
    return logits, compact


def _to(batch: Batch, device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return {key: move(value) for key, value in batch.items()}


def _check(model: Model, data: str, vocab_size: int, objective: Objective) -> None:
    needed = vocab_size + objective.extra_tokens
    if model.config.vocab_size < needed:
        raise ConfigError(
            f"this {model.architecture} knows {model.config.vocab_size} token ids and data={data} needs {needed}: "
            f"evaluate a model that was trained on such data"
        )
    if type(objective) is Objective and not model.config.causal:
        raise ConfigError(
            f"this {model.architecture} has causal=false and would see the tokens it is asked for: say what it "
            f"learnt with objective=masked or objective=classify"
        )
