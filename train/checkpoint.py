"""Checkpoints that a kill at any moment leaves usable: one file per validation, complete or absent."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from zoo.kernels.errors import CheckpointError
from zoo.train.folder import CHECKPOINT_FILES
from zoo.train.module import SequenceModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames. Lightning's own writer moves the file from another folder instead.

    Args:
        module: What is saved, and what a checkpoint must fit when one is read.
    """

    def __init__(self, module: SequenceModule) -> None:
        super().__init__()
        self.module = module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint to a local path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except Exception:
            part.unlink(missing_ok=True)  # half a file would keep a full disk full
            raise

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; see the function of that name."""
        return load_checkpoint(Path(path), self.module)


def load_checkpoint(path: Path, module: SequenceModule) -> dict[str, Any]:
    """Reads a checkpoint of `module` onto the CPU.

    Raises:
        CheckpointError: It cannot be read, is no checkpoint of a run, or is one of another model.
    """
    mend = "delete it, the one before it is used then"
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): {mend}") from error
    if not isinstance(checkpoint, dict) or _KEYS - checkpoint.keys():
        what = f"a dictionary of {list(checkpoint)[:4]}" if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(f"{path} holds {what}, not the checkpoint of a run: {mend}")
    expected, found = _shapes(module.state_dict()), _shapes(checkpoint["state_dict"])
    if found != expected:
        name = sorted(found.items() ^ expected.items())[0][0]
        raise CheckpointError(
            f"{path} holds another model ({checkpoint.get('architecture', 'unnamed')}: {name} "
            f"{found.get(name, 'absent')}) than this run's ({module.model.architecture}: "
            f"{expected.get(name, 'absent')}): {mend}"
        )
    return checkpoint


_KEYS = frozenset({"state_dict", "optimizer_states", "callbacks", "results", "pytorch-lightning_version"})


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


class Checkpoints(L.Callback):
    """Saves the run after each validation; keeps the newest few and the best by validation loss.

    Lightning's ModelCheckpoint would need two instances for that, which write twice and each save the other's state of
    one checkpoint earlier; a resumed run could then keep other files than an undisturbed one.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.best_step = -1
        self.best: dict[str, float] = {}
        """Validation metrics of the best checkpoint."""

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:09d}.ckpt"

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Saves, if this validation belongs to training."""
        if trainer.state.fn != "fit":
            return
        assert isinstance(module, SequenceModule)
        val = module.results["val"]
        if self.best_step < 0 or val.get("loss", math.inf) < self.best.get("loss", math.inf):
            self.best_step, self.best = trainer.global_step, val
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves the run as it stands and deletes what need not be kept."""
        trainer.save_checkpoint(self.path(trainer.global_step))
        if not trainer.is_global_zero:
            return
        files = sorted(self.folder.glob(CHECKPOINT_FILES))
        for file in files[: -self.keep]:
            if file != self.path(self.best_step):
                file.unlink()
        for leftover in self.folder.glob("*.part"):
            leftover.unlink()

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoint is the best so far."""
        return {"best_step": self.best_step, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from an earlier process."""
        self.best_step, self.best = state_dict["best_step"], state_dict["best"]
