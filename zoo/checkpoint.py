"""Saving and loading models as a folder of config.json and model.safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zoo._version import __version__
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.model import Model, create_model

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save_pretrained(model: Model, folder: str | os.PathLike[str], *, tokenizer: dict[str, Any] | None = None) -> None:
    """Writes a model so that `load_pretrained` gives back the same one, bit for bit.

    Args:
        model: The model.
        folder: Where to write; made if missing, an older model in it is replaced.
        tokenizer: How text becomes tokens, as the data describe it; kept for `generate`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "architecture": model.architecture,
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer,
        "zoo_version": __version__,
    }
    # Each file is complete or absent, also when the process is killed while it writes.
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / f"{WEIGHTS}.part", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.part", folder / WEIGHTS)
    (folder / f"{CONFIG}.part").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / f"{CONFIG}.part", folder / CONFIG)


def load_pretrained(
    folder: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Model:
    """Loads a model from a folder that `save_pretrained` or a training run wrote.

    Args:
        folder: The model's folder, or the run's folder that has it in `model/`.
        device: Where to put the model; the CPU unless said.
        dtype: Type of the weights; as saved unless said.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: No model there, a damaged file, or weights that do not fit the config.
    """
    folder = model_folder(folder)
    description = read_description(folder)
    try:
        model = create_model(description["architecture"], **description["config"])
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model ({error}): copy or train it again") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({error}): copy or train the model again") from error
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its {CONFIG} ({description['architecture']}): "
            f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(tensor.shape)}, "
                f"its {CONFIG} wants {tuple(expected[name].shape)}"
            )
    model.load_state_dict(weights)
    return model.to(device=device, dtype=dtype).eval()


def model_settings(name: str) -> tuple[str, dict[str, Any]]:
    """The architecture of a model that `load_pretrained` would load, and the settings that it was built with.

    Raises:
        CheckpointError: No model there.
    """
    model = load_pretrained(name)
    return model.architecture, dataclasses.asdict(model.config)


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


def read_description(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        CheckpointError: Not JSON, or not one of the zoo's.
    """
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error}): copy or train the model again") from error
    kinds = {"architecture": str, "config": dict, "tokenizer": dict | None}
    for key, kind in kinds.items():
        if not isinstance(description, dict) or not isinstance(description.get(key), kind):
            raise CheckpointError(
                f"{folder / CONFIG} was not written by the zoo, or changed since: {key} is missing or of the wrong "
                f"kind; copy or train the model again"
            )
    return description
