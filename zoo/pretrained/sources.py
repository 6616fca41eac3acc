"""Where a model lies: in a folder or file, among the bundled ones, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from zoo.codec import ask_hub
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.pretrained.variants import BUNDLED, variants

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w.-]+)*")

SETTINGS = [CONFIG, "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"]
SETTINGS += ["tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "README.md"]
FILES_OF_WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")
LONGEST = 4096
"""Characters of a path, in most systems."""
SAFE = ["model*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a name of a model or folder is.

    Raises:
        ConfigError: It can be neither.
    """
    if isinstance(name, str | os.PathLike) and 0 < len(os.fspath(name)) <= LONGEST:
        try:
            return Path(name).expanduser()
        except (TypeError, RuntimeError):  # bytes; the home of nobody
            pass
    told = repr(name) if len(repr(name)) <= 99 else f"{repr(name)[:99]}..."
    raise ConfigError(f"{told} names no model and no folder: expected a path, a variant or an id on the hub, as text")


def locate(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file of a model, downloaded if need be.

    Args:
        name: See `zoo.load_pretrained`.
        revision: On the hub.

    Raises:
        CheckpointError: There is none.
    """
    path = as_path(name)
    if os.path.isfile(path):  # which, unlike that of Path, has no error for names that no file can have
        if path.suffix not in FILES_OF_WEIGHTS:
            raise CheckpointError(
                f"{path} is no file of weights: give the folder that holds {CONFIG} and the weights, here {path.parent}"
            )
        return path
    if os.path.isdir(path):
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
    lower = {each.lower(): each for each in known}
    near = [each for each in lower if each.startswith(text.lower())] or difflib.get_close_matches(text.lower(), lower)
    near = [lower[each] for each in near[:3]]
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise CheckpointError(
        f"no folder {str(name)!r}, and no variant of that name: {guess}`zoo list --pretrained` shows all"
    )


def _in_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.pth"))
    if not files or (folder / CONFIG).is_file():
        return model_folder(folder)
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds {' and '.join(file.name for file in files)}: give the path of one")
    return files[0]


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
        if os.path.isfile(place / CONFIG):
            return place
    what = f"{folder} holds no model" if folder.is_dir() else f"no folder {str(folder)!r}"
    raise CheckpointError(f"{what}: expected {CONFIG} and {WEIGHTS}, as a finished run has them in its model/ folder")
