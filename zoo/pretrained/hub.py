"""Sharing models on the Hugging Face hub, with a card written from the run that trained them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.checkpoint import model_settings, save_pretrained
from zoo.codec import ask_hub
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.model import Model
from zoo.pretrained import longformer
from zoo.pretrained.sources import CONFIG, SETTINGS, locate
from zoo.pretrained.weights import with_index, write_text

CARD = "README.md"


def push_to_hub(
    model: Model | str | os.PathLike[str],
    repo_id: str,
    *,
    format: str = "zoo",
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
    licence: str | None = None,
) -> str:
    """Uploads a model to the Hugging Face hub; the repository is made if need be. Log in before, or set HF_TOKEN.

    Args:
        model: A model, or the folder or name of one as `load_pretrained` takes it. The summary of the run that
            trained it becomes the card, where it lies beside it.
        repo_id: "owner/repository".
        format: Of a model: see `save_pretrained`. A folder goes as it is: settings, tokenizer and weights.
        private: Whether only the owner sees a new repository.
        revision: Branch; the main one unless said.
        message: Of the commit.
        licence: Name of the licence, such as "apache-2.0", for the card.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: There is no such model, or the hub refuses it or does not answer.
        ConfigError: The model cannot be saved in that format, or `repo_id` is none.
    """
    _check_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        summary: dict[str, Any] | None = None
        if isinstance(model, Model):
            save_pretrained(model, folder, format=format)
            architecture = model.architecture
        else:
            source = locate(model)
            if source.is_file():
                raise ConfigError(
                    f"{source} is a file of weights alone: push the model that load_pretrained makes of it"
                )
            architecture, _ = model_settings(str(source))
            for path in (*(path for pattern in SETTINGS for path in source.glob(pattern)), *with_index(source)):
                _link(path, folder / path.name)
            summary = read_summary(source)
        if not (folder / CARD).exists():
            note = longformer.note(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            write_text(folder / CARD, model_card(repo_id, architecture, summary, licence, note))
        return _upload(folder, repo_id, private, revision, message)


def _check_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        if isinstance(repo_id, str) and repo_id.count("/") == 1:
            return
    except HFValidationError:
        pass
    raise ConfigError(f'repo_id={str(repo_id)[:99]!r} is no id on the hub: expected "owner/repository"')


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _upload(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{repo_id} cannot be uploaded while HF_HUB_OFFLINE=1 is set: unset it")
    api = HfApi()
    try:
        ask_hub()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the hub does not take {repo_id} ({_first_line(error)}): check the name, the connection and HF_TOKEN"
        ) from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a run, given its folder or that of its model; None where there is none."""
    for path in (run / "summary.json", run.resolve().parent / "summary.json"):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(summary, dict):
            return summary
    return None


FACTS = {
    "data": "data",
    "objective": "objective",
    "params": "parameters",
    "steps": "steps",
    "tokens": "tokens",
    "seed": "seed",
    "dtype": "precision",
    "device": "device",
    "wall_seconds": "seconds",
    "batch_hash": "hash of the batches",
    "git_commit": "commit",
}
"""What of a summary stands in a card."""


def _told(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


OF_TRAINING = ("lr", "grad_norm")
"""Metrics that say nothing of the model."""


def _figures(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Split, metric and value; those of a slice only where they are not those of the whole."""
    for split, values in (summary.get("metrics") or {}).items():
        if isinstance(values, Mapping):
            for key, value in values.items():
                whole, slice_, _ = key.partition("/")
                repeated = slice_ and values.get(whole) == value
                if isinstance(value, int | float) and key not in OF_TRAINING and not repeated:
                    yield split, key, value


def model_card(
    repo_id: str,
    architecture: str,
    summary: Mapping[str, Any] | None,
    licence: str | None,
    note: str | None = None,
) -> str:
    """The text of a model card.

    Args:
        repo_id: "owner/repository".
        architecture: Of the model.
        summary: Of its run; None where it is not known.
        licence: For the card's header; None leaves it out.
        note: What whoever opens the model must know.
    """
    header = {"library_name": "subquadratic-zoo", "tags": [architecture, "sequence-model"]}
    header |= {} if licence is None else {"license": licence}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines += [f"# {repo_id.partition('/')[2] or repo_id}", ""]
    lines += [f"A model of the architecture `{architecture}`, made with subquadratic-zoo.", ""]
    lines += ["```python", "import zoo", "", f'model = zoo.load_pretrained("{repo_id}")', "```"]
    lines += [] if note is None else ["", note]
    if summary is None:
        return "\n".join(lines) + "\n"
    lines += ["", "## Training", "", "| | |", "|---|---|"]
    lines += [f"| {text} | {_told(summary[key])} |" for key, text in FACTS.items() if summary.get(key) is not None]
    if summary.get("command"):
        lines += ["", "```console", str(summary["command"]), "```"]
    figures = list(_figures(summary))
    if figures:
        lines += ["", "## Results", "", "| split | metric | value |", "|---|---|---|"]
        lines += [f"| {split} | {key} | {value:.5g} |" for split, key, value in figures]
    return "\n".join(lines) + "\n"
