"""Where documents come from, and which of them are for training, validation and test.

Documents go to a split by a hash of their path or text, so that a new one moves no other. Fewer than
`FEW_DOCUMENTS` are too few for that: then each is cut into three consecutive blocks, training first.
"""

from __future__ import annotations

import glob
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.codec import ask_hub
from zoo.kernels.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets

FEW_DOCUMENTS = 100
_HUB_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Shares:
    """How much of the documents goes to validation and to test; the rest is for training."""

    validation: float = 0.05
    test: float = 0.05

    def split_of(self, key: bytes) -> str:
        """The split of the document that has this key."""
        place = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"

    def block(self, document: bytes, split: str) -> bytes:
        """A split's block of a document: training, validation, test in this order, cut between UTF-8 characters."""
        edges = [0, *(_character_start(document, share) for share in (1 - self.validation - self.test, 1 - self.test))]
        first = ("train", "validation", "test").index(split)
        return document[slice(*[*edges, len(document)][first : first + 2])]


def _character_start(document: bytes, share: float) -> int:
    place = round(share * len(document))
    while place < len(document) and document[place] & 0xC0 == 0x80:
        place += 1
    return place


class Corpus(ABC):
    """Documents in three splits. Pickles to the same bytes for the same documents: the cache is found by that.

    Attributes:
        name: what the user called it, for messages.
        digest: changes with the documents.
    """

    name: str
    digest: str

    @abstractmethod
    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split in a fixed order, none of them empty."""


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """Files, each a document of bytes; see `files_corpus`."""

    name: str
    root: str
    files: tuple[str, ...]
    digest: str
    shares: Shares

    def documents(self, split: str) -> Iterator[bytes]:
        """The files of a split by path, or their blocks where there are few files."""
        for file in self.files:
            if len(self.files) < FEW_DOCUMENTS:
                document = self.shares.block(Path(self.root, file).read_bytes(), split)
            elif self.shares.split_of(file.encode()) == split:
                document = Path(self.root, file).read_bytes()
            else:
                continue
            if document:
                yield document


def files_corpus(name: str, root: Path, files: list[Path], shares: Shares) -> FileCorpus:
    """A corpus of the files below `root` that are not empty, in the order of their relative paths.

    Of files with the same content only the first counts, or a training text could be a test text too.

    Raises:
        DataError: there is no file, none with content, or one cannot be read.
    """
    by_content: dict[bytes, str] = {}
    for file in sorted(file.relative_to(root).as_posix() for file in files):
        try:
            content = Path(root, file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{name}: cannot read {Path(root, file)} ({error.strerror}): mend it or leave it out"
            ) from None
        if content:
            by_content.setdefault(hashlib.sha256(content).digest(), file)
    if not by_content:
        found = f"{len(files)} files, all empty" if len(files) > 1 else "an empty file" if files else "no files"
        raise DataError(f"{name}: {found}; expected text in at least one file")
    digest = hashlib.sha256(repr([(file, content.hex()) for content, file in by_content.items()]).encode()).hexdigest()
    return FileCorpus(name, str(root), tuple(by_content.values()), digest, shares)


def path_corpus(path: str, shares: Shares) -> FileCorpus:
    """The corpus of a file, of all files in a folder (hidden ones left out), or of the files a pattern matches.

    Raises:
        DataError: nothing is there, or nothing but emptiness.
    """
    name = f"data.path={path}"
    place = Path(path).expanduser()
    if place.is_file():
        return files_corpus(name, place.parent, [place], shares)
    if place.is_dir():
        visible = (f for f in place.rglob("*") if not any(p.startswith(".") for p in f.relative_to(place).parts))
        return files_corpus(name, place, [file for file in visible if file.is_file()], shares)
    matches = [Path(match) for match in glob.glob(str(place), recursive=True) if Path(match).is_file()]
    if not matches:
        raise DataError(f"{name}: no such file or folder, and no file matches it as a pattern; check the path")
    root = Path(*_common_parts(matches))
    return files_corpus(name, root, matches, shares)


def _common_parts(files: list[Path]) -> list[str]:
    common = []
    for parts in zip(*(file.parent.parts for file in files), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


@dataclass(frozen=True)
class HubCorpus(Corpus):
    """A column of a Hugging Face dataset, each row a document; see `hub_corpus`.

    The dataset's own validation and test splits are used; one that it lacks is taken out of its training split.
    """

    name: str
    hub: str
    config: str | None
    revision: str | None
    column: str
    digest: str
    shares: Shares

    def documents(self, split: str) -> Iterator[bytes]:
        """The rows of the dataset's own split, or those of its training split that fall to `split`."""
        tables = _load_hub(self.name, self.hub, self.config, self.revision)
        own = {wanted: name for wanted, names in _HUB_NAMES.items() for name in names if name in tables}
        left = Shares(
            validation=0.0 if "validation" in own else self.shares.validation,
            test=0.0 if "test" in own else self.shares.test,
        )
        table = tables[own.get(split, own["train"])].select_columns([self.column])
        carved = split == "train" or split not in own
        for row in table:
            document = (row[self.column] or "").encode()
            if carved and len(table) < FEW_DOCUMENTS:
                document = left.block(document, split)
            elif carved and left.split_of(document) != split:
                continue
            if document:
                yield document


def hub_corpus(hub: str, config: str | None, revision: str | None, column: str | None, shares: Shares) -> HubCorpus:
    """The corpus of a dataset on the Hugging Face hub, or in a local folder as `datasets` reads or saves it.

    Args:
        hub: hub id or folder.
        config: the dataset's configuration, where it has several.
        revision: branch, tag or commit on the hub.
        column: the column of text; None: "text", or the only column of strings.
        shares: of the splits that the dataset lacks.

    Raises:
        DataError: the dataset cannot be had, has no training split, or not this column.
    """
    name = f"data.hub={hub}"
    tables = _load_hub(name, hub, config, revision)
    if "train" not in tables:
        raise DataError(f"{name}: has the splits {', '.join(tables)}; expected one called train")
    table = tables["train"]
    strings = [
        c for c, feature in table.features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if column is None:
        if "text" not in strings and len(strings) != 1:
            raise DataError(
                f"{name}: name the column of text with data.column= (of strings: {', '.join(strings) or 'none'})"
            )
        column = "text" if "text" in strings else strings[0]
    elif column not in strings:
        raise DataError(f"{name}: no column of strings data.column={column}: {did_you_mean(column, strings)}")
    digest = hashlib.sha256(repr(sorted((split, t._fingerprint) for split, t in tables.items())).encode()).hexdigest()
    return HubCorpus(name, hub, config, revision, column, digest, shares)


def _load_hub(name: str, hub: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
    import datasets

    folder = Path(hub).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            tables = datasets.load_from_disk(str(folder))
        else:
            if not folder.is_dir():
                ask_hub()
            tables = datasets.load_dataset(str(folder) if folder.is_dir() else hub, config, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: cannot be loaded ({type(error).__name__}: {reason[:160]}); expected a reachable dataset id "
            "(with data.hub_config= where it has several), a local folder, or HF_HUB_OFFLINE=1 and a cached dataset"
        ) from None
    return tables if isinstance(tables, datasets.DatasetDict) else datasets.DatasetDict(train=tables)
