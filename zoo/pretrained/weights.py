"""Files of weights: safetensors, one or in shards with an index, and pickles, which are read without running them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.kernels.errors import CheckpointError

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 2 << 30
"""Weights go into files of at most so many bytes."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class Read(Protocol):
    """Reads the tensor of that name, into memory of its shape where that is given."""

    def __call__(self, name: str, into: Tensor | None = None) -> Tensor:
        """The tensor, which is `into` where that is given."""


class Weights:
    """The tensors in some files, by name.

    Args:
        files: The files.
        where: What to call them in messages.
        described_by: What says which tensors they must hold.

    Raises:
        CheckpointError: A file is missing, damaged, no file of weights, or wants to run code.
    """

    def __init__(self, files: Iterable[Path], where: str | os.PathLike[str], described_by: str) -> None:
        self.where, self.described_by = str(where), described_by
        self.entries: dict[str, Entry] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            with _opened(file) as (entries, _):
                for name, entry in entries.items():
                    if name in self.entries:
                        raise CheckpointError(f"{self.where}: {name} is in two files: copy it again")
                    self.entries[name] = entry
                    self._file[name] = file

    @contextlib.contextmanager
    def reader(self, names: Iterable[str]) -> Iterator[Read]:
        """Opens the files that hold those tensors; yields what reads one.

        Pickles are mapped into memory: what is read of them lives until they are closed, and counts as the process's
        own until then.
        """
        files = {self._file[name] for name in names}
        with contextlib.ExitStack() as stack:
            readers = {file: stack.enter_context(_opened(file))[1] for file in files}

            def read(name: str, into: Tensor | None = None) -> Tensor:
                with _one_line(self._file[name]):
                    return readers[self._file[name]](name, into)

            yield read


def find(folder: Path) -> list[Path]:
    """The files of weights in a folder, in the order of preference of the hub's own libraries.

    Raises:
        CheckpointError: There are none, or a shard that the index names is not there.
    """
    for single, index in ((SAFE, SAFE_INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise CheckpointError(
        f"{folder} holds no weights: expected {SAFE} or {PICKLE}, or one of them in shards with its index"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted(set(names))
        for name in shards:
            # A path in it could lead anywhere.
            if Path(name).name != name or not name:
                raise ValueError(f"{name!r} is no name of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error}): copy it again") from error
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names: copy it again")
    return [index.parent / name for name in shards]


def with_index(folder: Path) -> list[Path]:
    """The files of weights in a folder, and the index that names them where there is one; errors as of `find`."""
    files = find(folder)
    index = folder / (SAFE_INDEX if files[0].suffix == ".safetensors" else PICKLE_INDEX)
    return files if files[0].name in (SAFE, PICKLE) else [*files, index]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[Mapping[str, Entry], Read]]:
    """What a file holds, and what reads a tensor of it."""
    if file.suffix == ".safetensors":
        with contextlib.ExitStack() as stack:
            with _one_line(file):
                with safe_open(file, framework="pt"):  # which checks the header
                    pass
                source = stack.enter_context(file.open("rb", buffering=0))
                begin = 8 + int.from_bytes(source.read(8), "little")
                header = json.loads(source.read(begin - 8))
                header.pop("__metadata__", None)
                entries = {
                    name: Entry(tuple(told["shape"]), _DTYPES.get(told["dtype"], told["dtype"]))
                    for name, told in header.items()
                }

            def read(name: str, into: Tensor | None = None) -> Tensor:
                shape, dtype = entries[name]
                assert isinstance(dtype, torch.dtype)
                direct = into is not None and into.dtype == dtype and into.is_cpu and into.is_contiguous()
                target = into if into is not None and direct else torch.empty(shape, dtype=dtype)
                source.seek(begin + header[name]["data_offsets"][0])
                _fill(target, source)
                return target if into is None or direct else into.copy_(target)

            yield entries, read
        return
    with _one_line(file):
        tensors = _unpickled(file)
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise CheckpointError(f"{file} holds no plain dictionary of tensors, such as a model's state_dict()")
        if not all(isinstance(name, str) for name in tensors):
            raise CheckpointError(f"{file} holds tensors whose names are no text: save a model's state_dict()")
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}  # some save parameters

    def take(name: str, into: Tensor | None = None) -> Tensor:
        return tensors[name] if into is None else into.copy_(tensors[name])

    yield {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}, take


def _fill(tensor: Tensor, source: io.FileIO) -> None:
    """Reads a tensor's bytes straight into its memory: a mapped file would take a fault for each of its pages too."""
    view, at = memoryview(tensor.flatten().view(torch.uint8).numpy()), 0  # type: ignore[arg-type]
    while at < len(view):
        size = source.readinto(view[at:])
        if not size:
            raise EOFError("it ends too early")
        at += size


def _unpickled(file: Path) -> Any:
    # The format of torch before 1.6 is no zip archive and cannot be mapped.
    with warnings.catch_warnings():  # of pickle protocols: what they cannot say is an error all the same
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


@contextlib.contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Turns what the libraries raise about a file into one line."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{file} holds more than tensors, or is damaged; nothing in it was run: get the model as safetensors, "
                f"or from a source that saves tensors alone"
            ) from error
        raise CheckpointError(f"{file} cannot be read (no pickle of tensors): copy it again") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read ({brief(error)}): copy it or train the model again") from error


def brief(error: Exception) -> str:
    """What an error says, in one line that is not long."""
    return re.sub(r"\s+", " ", str(error))[:160] or type(error).__name__


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder; what goes wrong while files are written into it is one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be written ({brief(error)}): choose another folder") from error


def write(folder: Path, planned: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Writes tensors as safetensors, in shards with an index where they are more than fits one file.

    Args:
        folder: Where; earlier safetensors of these names are replaced, and other shards removed.
        planned: All tensors in order, on the meta device.
        tensors: The tensors, in the same order; one file's are in memory at a time.
        limit: Bytes per file.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in planned.items():
        if shards[-1] and size + _bytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    names = (
        [SAFE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        content = {}
        for expected in shard:
            key, tensor = next(stream)
            assert key == expected
            content[key] = tensor.contiguous()
        write_tensors(folder / name, content)
    if len(shards) > 1:
        total = sum(_bytes(tensor) for tensor in planned.values())
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_text(folder / SAFE_INDEX, json.dumps(index, indent=2) + "\n")
    stale = [SAFE, *([SAFE_INDEX] if len(shards) == 1 else [])]
    stale += [path.name for path in folder.glob("model-*-of-*.safetensors")]
    for name in set(stale) - set(names):
        (folder / name).unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file of safetensors that is complete or absent, also when the process is killed while it writes."""
    part = path.with_name(f"{path.name}.part")
    part.touch()
    mode = part.stat().st_mode
    try:
        save_file(tensors, part, metadata={"format": "pt"})
    except Exception:
        part.unlink(missing_ok=True)  # half a file would keep a full disk full
        raise
    part.chmod(mode)  # what the library makes is its owner's alone, whatever the umask
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or absent."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
