"""What happens around the steps of a run: the books that the summary is made from, when to stop, and signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from zoo.train.checkpoint import Checkpoints
from zoo.train.config import TrainerConfig
from zoo.train.data import Batch, BatchHash, DataModule
from zoo.train.meters import TrainingMeter
from zoo.train.module import SequenceModule

WARMUP_STEPS = 5
"""Steps after each start that the meter leaves out: kernels are compiled in them and memory pools grow."""


class Books(L.Callback):
    """Counts batches and tokens, chains the batch hash, and measures time and memory; all of it survives a restart.

    Attributes:
        batches: training batches consumed.
        tokens: tokens in them.
        meter: speed and memory of training alone.
        prefix_hashes: the batch hash after 1, 2, 4, 8, ... batches, so that runs of different lengths can be seen to
            have had the same beginning.
    """

    def __init__(self, data: DataModule, device: torch.device, started: float) -> None:
        self.data = data
        self.meter = TrainingMeter(device)
        self.batches = 0
        self.tokens = 0
        self.prefix_hashes: dict[str, str] = {}
        self._hash = BatchHash()
        self._started = started  # time.monotonic() at the start of this process's share
        self._earlier_seconds = 0.0
        self._steps_here = 0

    @property
    def batch_hash(self) -> str:
        """The hash of all batches so far, in order."""
        return self._hash.state

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, those between a kill and a restart left out."""
        return self._earlier_seconds + time.monotonic() - self._started

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Starts the meter once the first steps are over."""
        warm = self._steps_here >= min(WARMUP_STEPS, max(1, (trainer.max_steps or 0) // 2))
        if warm and not self.meter.running:
            self.meter.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Books the batch."""
        tokens = batch["inputs"].numel() * trainer.world_size
        self.meter.add(tokens)
        self.tokens += tokens
        self.batches += 1
        self._steps_here += 1
        self._hash.update(batch)
        if self.batches & (self.batches - 1) == 0:
            self.prefix_hashes[str(self.batches)] = self.batch_hash

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stops the meter: validation and the checkpoint after it are not training."""
        self.meter.stop()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stops the meter."""
        self.meter.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Stops the meter."""
        self.meter.stop()

    def state_dict(self) -> dict[str, Any]:
        """The books."""
        return {
            "batches": self.batches,
            "tokens": self.tokens,
            "batch_hash": self.batch_hash,
            "prefix_hashes": dict(self.prefix_hashes),
            "wall_seconds": self.wall_seconds,
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from an earlier process; the data go on with the batch after the last one booked."""
        self.batches, self.tokens = state_dict["batches"], state_dict["tokens"]
        self._hash = BatchHash(state_dict["batch_hash"])
        self.prefix_hashes = dict(state_dict["prefix_hashes"])
        self._earlier_seconds = state_dict["wall_seconds"]
        self.meter.load_state_dict(state_dict["meter"])
        self.data.start_batch = self.batches


class StopRules(L.Callback):
    """Ends training after the last step, after the time limit, or at the accuracy wanted.

    Ending through `should_stop` makes Lightning validate once more where no validation is due, so that every run ends
    with a validation and a checkpoint of its last step.
    """

    def __init__(self, config: TrainerConfig, books: Books) -> None:
        assert config.max_steps is not None
        self.config = config
        self.max_steps = config.max_steps
        self.books = books

    def _is_over(self, trainer: L.Trainer) -> bool:
        minutes = self.config.max_minutes
        late = minutes is not None and self.books.wall_seconds >= 60 * minutes
        return trainer.global_step > 0 and (late or trainer.global_step >= self.max_steps)

    def _is_learnt(self, module: L.LightningModule) -> bool:
        assert isinstance(module, SequenceModule)
        return self.config.stop_at is not None and module.results.get("val", {}).get("acc", 0.0) >= self.config.stop_at

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A run that was killed between its last checkpoint and its end trains no further."""
        trainer.should_stop = trainer.should_stop or self._is_over(trainer) or self._is_learnt(module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Checks steps and time after each optimiser step."""
        if (batch_idx + 1) % self.config.accumulate == 0:
            trainer.should_stop = trainer.should_stop or self._is_over(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Checks the accuracy."""
        if trainer.state.fn == "fit":
            trainer.should_stop = trainer.should_stop or self._is_learnt(module)


class StopRequested(Exception):
    """A signal asked the run to end; its checkpoint is written."""


class Signals(L.Callback):
    """On Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once.

    Where a validation is due after that step, it runs before the checkpoint is written, as in an undisturbed run.
    """

    def __init__(self, config: TrainerConfig, checkpoints: Checkpoints) -> None:
        self.config = config
        self.checkpoints = checkpoints
        self.requested = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Listens; this late because Lightning puts its own SIGTERM handler in place before."""
        self._listen()

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Listens."""
        self._listen()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Ends a run whose validation has just finished and was saved."""
        if self.requested and self.checkpoints.path(trainer.global_step).exists():
            raise StopRequested

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Saves and ends the run, between optimiser steps only."""
        stepped = (batch_idx + 1) % self.config.accumulate == 0
        assert self.config.val_every is not None
        validates = trainer.should_stop or trainer.global_step % self.config.val_every == 0
        if self.requested and stepped and not validates:
            self.checkpoints.save(trainer)
            raise StopRequested

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Ends the run: the checkpoint of its last step stands already."""
        if self.requested:
            raise StopRequested

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stops listening; not as late as `teardown`, before which Lightning has put back what it found."""
        self._stop_listening()

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stops listening."""
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Stops listening."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread() or self._previous:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handler)

    @property
    def _handler(self) -> Callable[[int, Any], None]:
        def handle(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        return handle
