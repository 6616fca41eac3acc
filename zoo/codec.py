"""Text to tokens and back: raw bytes, or any tokenizer of the Hugging Face `tokenizers` library."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.kernels.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Long documents are tokenised in pieces, cut after line ends: one Encoding of a whole book takes gigabytes.
_PIECE_CHARACTERS = 1 << 18


class Codec(ABC):
    """Turns text into tokens and back.

    Attributes:
        vocab_size: all token ids are below this.
        unit: "byte" or "token".
    """

    vocab_size: int
    unit: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become replacement characters."""

    @abstractmethod
    def encode_document(self, document: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (T,) of a document, and how many of its bytes each stands for (T,); these add up to its length.

        Raises:
            DataError: the codec needs UTF-8 and the document is none.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, str]:
        """A small dictionary of strings from which `codec_from_dict` makes an equal codec: for checkpoints."""


class ByteCodec(Codec):
    """A token is a byte of the text's UTF-8 form."""

    vocab_size = 256
    unit = "byte"

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some bytes; an id that is no byte (of a model with a larger vocabulary) is no UTF-8 either."""
        return bytes(min(token, 255) for token in tokens).decode(errors="replace")

    def encode_document(self, document: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The bytes, one byte each."""
        tokens = np.frombuffer(document, dtype=np.uint8)
        return tokens, np.broadcast_to(np.int64(1), tokens.shape)

    def to_dict(self) -> dict[str, str]:
        """Names the kind."""
        return {"kind": "bytes"}


class TokenizerCodec(Codec):
    """A tokenizer of the `tokenizers` library, without special tokens added.

    Args:
        definition: the tokenizer's JSON text.
        origin: where it was read, for messages.

    Raises:
        DataError: the text defines no tokenizer.
    """

    unit = "token"

    def __init__(self, definition: str, origin: str = "tokenizer") -> None:
        self.definition = definition
        self.origin = origin
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise DataError(f"data.tokenizer={origin}: the tokenizer has no tokens, train it first")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"data.tokenizer={self.origin}: no tokenizer in the JSON form of the tokenizers library ({error})"
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __getstate__(self) -> dict[str, object]:
        # Only what defines it: pickles are hashed to find data in the cache.
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def encode_document(self, document: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a document and the bytes of each: those from its first character to the next token's.

        Raises:
            DataError: the document is not UTF-8.
        """
        try:
            text = document.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"a document is not UTF-8 at byte {error.start}: convert it, or leave data.tokenizer out to use bytes"
            ) from None
        starts, ids = [], []
        offset = 0
        pieces = _pieces(text)
        for piece, encoding in zip(pieces, self._tokenizer.encode_batch(pieces, add_special_tokens=False), strict=True):
            ids.append(np.array(encoding.ids, dtype=np.int64))
            starts.append(np.array([start for start, _ in encoding.offsets], dtype=np.int64) + offset)
            offset += len(piece)
        tokens = np.concatenate([np.empty(0, dtype=np.int64), *ids])
        if not len(tokens):
            return tokens, tokens
        # Characters before the first token count as its own, and so on to the end: nothing of the text is lost.
        edges = np.concatenate([[0], np.concatenate(starts)[1:], [len(text)]])
        return tokens, np.diff(_byte_offsets(text)[np.maximum.accumulate(edges)])

    def to_dict(self) -> dict[str, str]:
        """Holds the tokenizer's whole definition."""
        return {"kind": "tokenizers", "json": self.definition}


def codec_from_dict(fields: dict[str, str]) -> Codec:
    """The codec that `Codec.to_dict` described.

    Raises:
        DataError: the dictionary is none that `to_dict` makes.
    """
    if not isinstance(fields, dict):
        raise DataError(f"unknown codec {fields!r}: expected what a codec's to_dict makes")
    kind = fields.get("kind")
    if kind == "bytes":
        return ByteCodec()
    if kind == "tokenizers" and "json" in fields:
        return TokenizerCodec(fields["json"])
    raise DataError(f"unknown codec {kind!r}: expected 'bytes', or 'tokenizers' with a definition under 'json'")


def load_tokenizer(name: str) -> TokenizerCodec:
    """The tokenizer in a JSON file, in a folder's `tokenizer.json`, or under a Hugging Face hub id.

    Raises:
        DataError: it is nowhere, or no tokenizer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise DataError(f"data.tokenizer={name}: the folder has no tokenizer.json; name the file or another folder")
        path = path / "tokenizer.json"
    if not path.is_file():
        path = _from_hub(name)
    try:
        definition = path.read_text(encoding="utf-8")
        json.loads(definition)
    except ValueError:
        raise DataError(f"data.tokenizer={name}: {path.name} is no JSON; expected a tokenizer.json") from None
    except OSError as error:
        raise DataError(f"data.tokenizer={name}: cannot be read ({error.strerror})") from None
    return TokenizerCodec(definition, name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        ask_hub()
        return Path(hf_hub_download(name, "tokenizer.json"))
    except (OSError, ValueError) as error:  # HTTP, offline, no such repository or file, no valid id
        raise DataError(
            f"data.tokenizer={name}: no such file, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}); give the path of a tokenizer.json, a reachable hub id, or HF_HUB_OFFLINE=1 for "
            f"one in its cache"
        ) from None


def ask_hub() -> None:
    """Makes sure that the Hugging Face hub answers, whose own functions retry for half a minute before they say so.

    Raises:
        ConnectionError: It does not; HF_HUB_OFFLINE=1 leaves the question out.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever library the hub's package asks with
        raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error


def _pieces(text: str) -> list[str]:
    """Cuts a text after line ends into pieces of about `_PIECE_CHARACTERS`; joined they are the text."""
    pieces, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE_CHARACTERS) + 1
        stop = stop or len(text)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def _byte_offsets(text: str) -> np.ndarray:
    """Where each character begins in the text's UTF-8 form, and where the last one ends: (len(text) + 1,)."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])
