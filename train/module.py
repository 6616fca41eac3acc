"""The one LightningModule that trains every architecture.

Letters: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.model import Model, ModelOutput, ModelState
from zoo.train.data.stream import IGNORE, Batch
from zoo.train.errors import NonFiniteError
from zoo.train.metrics import TokenMetrics
from zoo.train.objectives import Objective
from zoo.train.optim import OptimConfig, build_optimizer, first_nonfinite_gradient


class _MicroBatch(NamedTuple):
    """What a step was made from, to run it again."""

    batch: Batch
    number: int
    state: ModelState | None
    losses: dict[str, Tensor]


def _taught_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters with a gradient: first what the labels teach, then, if any, what auxiliary losses alone do."""
    groups: list[list[nn.Parameter]] = [[], []]
    for parameter in model.parameters():
        if parameter.grad is not None:
            groups[getattr(parameter, "_taught_apart", False)].append(parameter)
    return groups if groups[1] else groups[:1]


class SequenceModule(L.LightningModule):
    """Cross-entropy on the labelled positions plus the model's auxiliary losses.

    Args:
        model: Any model of the zoo; it knows nothing of Lightning.
        optim: Optimiser settings, with `lr` decided.
        max_steps: Optimiser steps of the whole run, which the schedule spans.
        seed: Every training step draws its random numbers (dropout) from this seed and its own number alone, so that
            neither validation nor a restart changes them.
        objective: What is learnt from a batch; its labels as they are unless said.
        slice_values: Slices of the data and every value each can take.
        joint_slices: Slices by which the data are split together.
        bytes_per_label: For "val" and "test" the bytes of text that one label stands for; empty where the data are no
            text.
        carries: Whether each row of a batch goes on where the batch before it ended. The model's state then goes along
            from batch to batch, without gradients (truncated back-propagation through time); validation and test have
            one of their own, fresh in each pass.
    """

    def __init__(
        self,
        model: Model,
        optim: OptimConfig,
        *,
        max_steps: int,
        seed: int,
        objective: Objective | None = None,
        slice_values: Mapping[str, Sequence[int]] | None = None,
        joint_slices: Sequence[Sequence[str]] = (),
        bytes_per_label: Mapping[str, float] | None = None,
        carries: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.max_steps = max_steps
        self.seed = seed
        self.objective = objective or Objective()
        sizes = bytes_per_label or {}
        self.scores = nn.ModuleDict(
            {
                split: TokenMetrics(
                    slice_values, sizes.get(split), joint=joint_slices, perplexity=self.objective.perplexity
                )
                for split in ("val", "test")
            }
        )
        self.results: dict[str, dict[str, float]] = {}
        """Metrics by split: "train" of the last optimiser step, "val" and "test" of the last pass."""
        self.carries = carries
        self._states: dict[str, ModelState] = {}  # by split: what the rows of the last batch came to
        self._pending: list[_MicroBatch] = []  # since the last optimiser step

    def forward(self, batch: Batch, state: ModelState | None = None) -> ModelOutput:
        """The model's output for a prepared batch, its logits as the objective reads them."""
        segment_ids = batch.get("segment_ids")
        output = cast(ModelOutput, self.model(batch["inputs"], state=state, segment_ids=segment_ids))
        return output._replace(logits=self.objective.read_out(output.logits, segment_ids))

    def losses(self, batch: Batch, output: ModelOutput) -> dict[str, Tensor]:
        """The terms of the training loss by name, "cross_entropy" first."""
        logits = output.logits.flatten(0, 1).float()  # (B*L, V)
        targets = batch["targets"].flatten()  # (B*L,)
        # Written out because the mean of no labels at all is NaN; such a batch must teach nothing instead.
        labels = (targets != IGNORE).sum().clamp(min=1)
        cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / labels
        return {"cross_entropy": cross_entropy, **output.losses}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the step."""
        self._seed_step(batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        batch = self.objective.prepare(batch, "train", batch_idx)
        state = self.incoming("train", batch)
        output = self(batch, state)
        self._keep("train", output.state)
        losses = self.losses(batch, output)
        told = {name: loss.detach() for name, loss in losses.items()}
        self._pending.append(_MicroBatch(batch, batch_idx, state, told))
        return torch.stack(list(losses.values())).sum()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient, notes losses and norm, and refuses the step if one of them is not finite.

        What auxiliary losses alone teach (`zoo.mixer.taught_apart`) is clipped by a norm of its own; the one of the
        rest is noted.

        This is the only point of a step where the host waits for the device.

        Raises:
            NonFiniteError: The loss of a micro-batch, or the gradient, is not finite. Under fp16 the gradient scaler
                skips steps with a non-finite gradient, so only the loss counts there.
        """
        groups = _taught_together(self.model)
        norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        pending, self._pending = self._pending, []
        names = list(pending[0].losses)
        rows = [torch.stack([each.losses[name].double() for name in names]) for each in pending]
        numbers = torch.cat([torch.stack(rows), torch.stack(norms).double().expand(len(rows), -1)], dim=1).tolist()
        for each, row in zip(pending, numbers, strict=True):
            if not np.isfinite(row[: len(names)]).all():
                culprit = next(name for name, loss in zip(names, row, strict=False) if not np.isfinite(loss))
                raise NonFiniteError(self.global_step + 1, culprit, self._first_nonfinite_layer(each))
        if not np.isfinite(numbers[0][len(names) :]).all() and not self._gradients_are_scaled:
            raise NonFiniteError(self.global_step + 1, "gradient", f"parameter {first_nonfinite_gradient(self.model)}")
        if self.optim.clip is not None:
            for group, norm in zip(groups, norms, strict=True):
                nn.utils.clip_grads_with_norm_(group, self.optim.clip, norm)
        means = np.mean(numbers, axis=0).tolist()
        losses, lr = dict(zip(names, means, strict=False)), optimizer.param_groups[0]["lr"]
        self.results["train"] = {"loss": sum(losses.values()), "grad_norm": means[len(names)], "lr": lr}
        if len(names) > 1:
            self.results["train"] |= losses

    def incoming(self, split: str, batch: Batch) -> ModelState | None:
        """The state that a batch goes on from; None where each batch stands for itself."""
        if not self.carries:
            return None
        if split not in self._states:
            device = batch["inputs"].device
            # What is cached has the type of activations.
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
            return self.model.init_state(len(batch["inputs"]), device=device, dtype=dtype)
        # Trimmed only now: after the step there is nothing to wait for on a GPU.
        return self.model.trim_state(self._states[split])

    def _keep(self, split: str, state: ModelState | None) -> None:
        if state is not None:
            self._states[split] = apply_to_collection(state, Tensor, Tensor.detach)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._score("val", self.objective.prepare(batch, "val", batch_idx))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._score("test", self.objective.prepare(batch, "test", batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Keeps the validation metrics in `results`."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Keeps the test metrics in `results`."""
        self._finish("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds whose weights these are, the state, and the metrics, which may be needed before there are new ones."""
        checkpoint["results"] = self.results
        checkpoint["architecture"] = self.model.architecture
        if "train" in self._states:
            # Tensors alone, as a checkpoint is read without running code: the model knows how they belong together.
            checkpoint["carried"] = _tensors(self._states["train"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the metrics and the state back."""
        self.results = checkpoint["results"]
        if "carried" in checkpoint:
            carried = iter(checkpoint["carried"])
            like = self.model.init_state(1)
            self._states["train"] = apply_to_collection(like, Tensor, lambda leaf: next(carried).to(leaf.device))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the model's own decay groups, its schedule stepped once per optimiser step."""
        optimizer, scheduler = build_optimizer(
            self.model, self.optim, self.max_steps, fused=not self._gradients_are_scaled
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _gradients_are_scaled(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _score(self, split: str, batch: Batch) -> None:
        output = self(batch, self.incoming(split, batch))
        self._keep(split, output.state)
        cast(TokenMetrics, self.scores[split]).update(output.logits, batch["targets"], batch.get("slices"))

    def _finish(self, split: str) -> None:
        metric = cast(TokenMetrics, self.scores[split])
        self.results[split] = metric.compute()
        metric.reset()
        self._states.pop(split, None)

    def _seed_step(self, batch_idx: int) -> None:
        state = np.random.SeedSequence((self.seed, batch_idx, self.global_rank)).generate_state(2, np.uint32)
        random.seed(int(state[0]))
        np.random.seed(int(state[0]))  # noqa: NPY002  (third-party mixers may use the global generator)
        seed = int(state[0]) << 32 | int(state[1])
        # What torch.manual_seed does, without the stack traces it records for devices that are not in use.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @torch.no_grad()
    def _first_nonfinite_layer(self, micro: _MicroBatch) -> str:
        """Where a non-finite number shows first when the step runs again: a parameter, a layer, or the loss."""
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"parameter {name}"
        found: list[str] = []

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensors = [t for t in _tensors(output) if t.is_floating_point()]
                if not found and not all(bool(torch.isfinite(t).all()) for t in tensors):
                    found.append(name)

            return hook

        # A module's hook runs after those of its parts, so the first find is the innermost layer.
        handles = [m.register_forward_hook(look(name)) for name, m in self.model.named_modules() if name]
        try:
            self._seed_step(micro.number)
            # `forward` itself: a compiled model would run past the hooks.
            with self.trainer.precision_plugin.forward_context():
                segment_ids = micro.batch.get("segment_ids")
                output = self.model.forward(micro.batch["inputs"], state=micro.state, segment_ids=segment_ids)
        finally:
            for handle in handles:
                handle.remove()
        if found:
            return f"layer {found[0]}"
        return "the logits" if not torch.isfinite(output.logits).all() else "the loss itself, all layers are finite"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
