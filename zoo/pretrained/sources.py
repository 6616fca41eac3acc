"""Where a model lies: in a folder or file, among the bundled ones, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from zoo.codec import ask_hub
from zoo.kernels.errors import CheckpointError
from zoo.pretrained.variants import BUNDLED, variants

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w.-]+)*")

SETTINGS = [CONFIG, "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"]
SETTINGS += ["tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "README.md"]
SAFE = ["model*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def locate(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file of a model, downloaded if need be.

    Args:
        name: See `zoo.load_pretrained`.
        revision: On the hub.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path)
    text = str(name)
    known = variants()
    if text in known:
        hub_id = known[text].hub_id
        if hub_id is None:
            return BUNDLED / text
        text = hub_id
    if _HUB_ID.fullmatch(text) and ".." not in text:
        return from_hub(text, revision, SAFE, PICKLES)
    if os.sep in str(name):
        return model_folder(path)  # which says that it is not there
    near = difflib.get_close_matches(text, known)
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise CheckpointError(
        f"no folder {str(name)!r}, and no variant of that name: {guess}`zoo list --pretrained` shows all"
    )


def _in_folder(folder: Path) -> Path:
    files = list(folder.glob("*.pth"))
    if len(files) == 1 and not (folder / CONFIG).is_file():
        return files[0]
    return model_folder(folder)


def from_hub(name: str, revision: str | None, *choices: list[str]) -> Path:
    """A snapshot of a repository in the cache, or a file of it, downloaded where it is not there yet.

    Args:
        name: "owner/repository", or with the path of a file behind it.
        revision: Branch, tag or commit; the main branch unless said.
        *choices: Patterns of files; of a repository, the settings and what matches the first of these that has any.

    Raises:
        CheckpointError: The hub does not answer and the cache has it not, or there is no such thing on it.
    """
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

    owner, repository, *file = name.split("/")
    where = f"{owner}/{repository}"
    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            try:
                ask_hub()
            except ConnectionError:
                offline = True  # the cache may do
        if file:
            found = hf_hub_download(where, "/".join(file), revision=revision, local_files_only=offline)
            return Path(found)
        for patterns in choices:
            wanted = [*SETTINGS, *patterns]
            folder = snapshot_download(where, revision=revision, allow_patterns=wanted, local_files_only=offline)
            if any(next(Path(folder).glob(pattern), None) for pattern in patterns):
                break
        return Path(folder)
    except errors.GatedRepoError:
        why = "it asks for an agreement first: give it on the repository's page, and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = f"the hub has no {where}: check the name, or set HF_TOKEN if it is private"
    except errors.RevisionNotFoundError:
        why = f"{where} has no revision {revision!r}: check it"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        why = f"{reason}, and the cache does not hold all of it: connect, or copy it into a folder"
    except errors.EntryNotFoundError:
        why = f"{where} has no file {'/'.join(file)!r}: check the name"
    except (OSError, ValueError) as error:
        why = f"the hub refuses ({type(error).__name__}): check the name and the connection"
    raise CheckpointError(f"no folder {name!r}, and not to be had from the hub: {why}") from None


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
