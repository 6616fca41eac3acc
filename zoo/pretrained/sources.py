"""Where a model lies: in a folder or file, among the bundled ones, or on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from zoo.kernels.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

BUNDLED = Path(__file__).parent / "bundled"
"""One folder per variant that comes with the package."""


def locate(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file of a model.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    return model_folder(path)


def model_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder with the model's files: the one given, or `model/` inside it.

    Raises:
        CheckpointError: Neither holds a model.
    """
    folder = Path(folder)
    for place in (folder, folder / "model"):
        if (place / CONFIG).is_file():
            return place
    what = f"{folder} holds no model" if folder.is_dir() else f"no folder {str(folder)!r}"
    raise CheckpointError(f"{what}: expected {CONFIG} and {WEIGHTS}, as a finished run has them in its model/ folder")
