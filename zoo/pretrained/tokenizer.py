"""How text becomes the tokens of a model that was loaded by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zoo.codec import Codec, TokenizerCodec, codec_from_dict
from zoo.kernels.errors import CheckpointError, DataError
from zoo.pretrained.sources import CONFIG, locate

FILE = "tokenizer.json"
OTHERS = ("tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
"""What slower tokenizers come as; transformers turns them into the form of the tokenizers library."""


def load_tokenizer(name: str | os.PathLike[str], revision: str | None = None) -> Codec:
    """The tokenizer of a model, by the name under which `load_pretrained` finds the model.

    Args:
        name: A folder (ours, a run's, or a published one), a variant, or an id on the hub.
        revision: On the hub.

    Returns:
        A codec: `encode(text)`, `decode(tokens)`, `vocab_size`.

    Raises:
        CheckpointError: There is no such model.
        DataError: It comes without a tokenizer, or with one that cannot be read.
    """
    found = _find(name, revision)
    if isinstance(found, str):
        raise DataError(found)
    return found


def find_tokenizer(name: str | os.PathLike[str], revision: str | None = None) -> Codec | None:
    """As `load_tokenizer`, but None where the model comes without a tokenizer."""
    found = _find(name, revision)
    return None if isinstance(found, str) else found


def describe_tokenizer(folder: Path) -> dict[str, str] | None:
    """What `Codec.to_dict` would say of the tokenizer of a published model; None where it has no `tokenizer.json`."""
    if not (folder / FILE).is_file():
        return None
    try:
        return {"kind": "tokenizers", "json": (folder / FILE).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / FILE} is damaged ({error}): copy it again") from error


def _find(name: str | os.PathLike[str], revision: str | None) -> Codec | str:
    """The tokenizer, or why there is none."""
    place = locate(name, revision)
    if place.is_file():
        return (
            f"{place} is a file of weights without a tokenizer (those of RWKV come with the rwkv package, World models "
            f"have one of their own, which the zoo does not have): give tokens to the model instead of text"
        )
    description = _settings(place)
    if "architecture" in description:
        own = description.get("tokenizer")
        if own is None:
            return f"{place} was not trained on text, or does not say how text becomes tokens"
        return codec_from_dict(own)
    if (place / FILE).is_file():
        return TokenizerCodec((place / FILE).read_text(encoding="utf-8"), str(place / FILE))
    if not any((place / other).is_file() for other in OTHERS):
        return f"{place} comes without a tokenizer: expected {FILE}; put that of the model beside its weights"
    return _through_transformers(place)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error}): copy or train the model again") from error
    return settings if isinstance(settings, dict) else {}


def _through_transformers(folder: Path) -> Codec:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise DataError(
            f"{folder} has no {FILE}, and to convert what it has needs transformers: pip install transformers"
        ) from None
    try:
        # Never code of the repository's own.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        return TokenizerCodec(tokenizer.backend_tokenizer.to_str(), str(folder))
    except Exception as error:  # whatever a tokenizer of any kind raises
        raise DataError(
            f"{folder} has a tokenizer that transformers does not open ({type(error).__name__}): look for a {FILE}"
        ) from error
