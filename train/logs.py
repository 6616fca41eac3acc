"""Where metrics go while a run is under way: metrics.csv, TensorBoard, the terminal."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zoo.train.callbacks import Books
from zoo.train.data import Batch
from zoo.train.folder import replace_text
from zoo.train.module import SequenceModule


class MetricsFile(Logger):
    """metrics.csv: one row per call, columns added as they appear, appended to so that a kill loses nothing.

    Args:
        path: The file.
        resumed_step: Rows of an earlier process after this step, and of its test, are dropped: they are made again.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                # A row cut short by a kill has no usable step; the test is made again.
                self.rows = [row for row in csv.DictReader(file) if 0 < _step(row) <= resumed_step and not _tests(row)]
        self.columns = ["step"]
        self._write_all()

    @property
    def name(self) -> str:
        """Lightning wants one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning wants one."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds a row."""
        row = {"step": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        self.rows.append(row)
        if row.keys() <= set(self.columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._write_all()

    def _write_all(self) -> None:
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        replace_text(self.path, text.getvalue().replace("\r\n", "\n"))


def _tests(row: dict[str, Any]) -> bool:
    return any(value and str(name).startswith("test/") for name, value in row.items())


def _step(row: dict[str, Any]) -> int:
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):
        return 0


def _losses(train: dict[str, float]) -> str:
    """What the labels cost, which validation is to be compared with, and the auxiliary losses beside it."""
    terms = {name: value for name, value in train.items() if name not in ("loss", "grad_norm", "lr", "cross_entropy")}
    return "  ".join(
        f"{name} {value:.4f}" for name, value in {"loss": train.get("cross_entropy", train["loss"]), **terms}.items()
    )


class RunLog(L.Callback):
    """Sends metrics to the loggers, and tells the person: a live line on a terminal, a line per validation in any case.

    Args:
        console: Where to print.
        books: Speed and time.
        max_steps: Length of the run.
        log_every: Steps between rows of training metrics.
    """

    def __init__(self, console: Console, books: Books, max_steps: int, log_every: int) -> None:
        self.console = console
        self.books = books
        self.max_steps = max_steps
        self.log_every = log_every
        self._logged_step = 0
        self._first_step = 0
        self._begun = 0.0
        self._progress: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Shows the live line."""
        self._begun, self._first_step = time.monotonic(), trainer.global_step
        self._logged_step = trainer.global_step
        if self.console.is_terminal and trainer.is_global_zero:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self._progress.add_task("", total=self.max_steps, completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Logs every few optimiser steps."""
        step = trainer.global_step
        if step == self._logged_step or (step % self.log_every and step != self.max_steps):
            return
        self._logged_step = step
        assert isinstance(module, SequenceModule)
        train = module.results["train"]
        self._log(trainer, {f"train/{name}": value for name, value in train.items()})
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, description=_losses(train))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Logs and prints the validation of a training step."""
        if trainer.state.fn != "fit":
            return
        assert isinstance(module, SequenceModule)
        metrics = {f"val/{name}": value for name, value in module.results["val"].items()}
        speed = self.books.meter.tokens_per_second
        if speed is not None:
            metrics["tokens_per_second"] = speed
        self._log(trainer, metrics)
        if trainer.is_global_zero:
            self.console.print(self._line(trainer.global_step, module.results, speed), highlight=False, soft_wrap=True)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Logs the test."""
        assert isinstance(module, SequenceModule)
        self._log(trainer, {f"test/{name}": value for name, value in module.results["test"].items()})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Takes the live line away."""
        if self._progress is not None:
            self._progress.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Takes the live line away."""
        self.on_train_end(trainer, module)

    def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def _line(self, step: int, results: dict[str, dict[str, float]], speed: float | None) -> str:
        val = results["val"]
        parts = [f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"]
        if "train" in results:
            parts.append(_losses(results["train"]))
        name = "bits_per_byte" if "bits_per_byte" in val else "acc"
        parts.append(f"val loss {val.get('loss', math.nan):.4f}  val {name} {val.get(name, math.nan):.4f}")
        if speed is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        done, left = step - self._first_step, self.max_steps - step
        if done and left:
            minutes, seconds = divmod(round((time.monotonic() - self._begun) / done * left), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)
