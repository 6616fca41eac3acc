"""Batches out of tables: the endless training stream, the finite evaluation batches, the hash of what was trained on.

Shape letters: B sequences, L tokens per sequence.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

if TYPE_CHECKING:
    import datasets

Batch = dict[str, Any]
"""`inputs`, `targets` and, where documents are packed, `segment_ids`; `slices`; see `DataModule`."""
IGNORE = -100
"""Target of a position that is neither learnt nor scored."""
SLICE_PREFIX = "slice_"
ANSWERS = "answers"
"""Among the slices, a list per row: for each label, in order, where in the row its answer stands."""
SEQUENCES = ("inputs", "targets", "segment_ids")


class EndlessBatches(IterableDataset, ABC):
    """Training batches without end; batch i is a function of i and of the arguments of a subclass alone.

    Args:
        start: index of the first batch to give.
        rank: this process gets rows rank, rank + world_size, ... of each batch.
        world_size: number of processes that share each batch; divides the number of its rows.
    """

    def __init__(self, *, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.start = start
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def whole(self, index: int) -> Batch:
        """Batch `index`, the rows of all processes."""

    def batch(self, index: int) -> Batch:
        """This process's share of batch `index`, with the `digest` of the whole batch."""
        whole = self.whole(index)
        return _rows(whole, slice(self.rank, None, self.world_size)) | {"digest": digest(whole)}

    def __iter__(self) -> Iterator[Batch]:
        # The loader takes the workers' batches in turn, so worker w of n must give batches w, w + n, ...
        worker = get_worker_info()
        index, step = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.batch(index)
            index += step


class BatchStream(EndlessBatches):
    """Endless training batches; batch i is a function of (tables, batch size, seed, i) alone.

    An epoch has every row once, in batches of one table each. The last batch of a table is filled up with rows from
    its beginning, so that all batches are full. Without a seed the tables and rows come in their own order; with one,
    rows are permuted within their table and batches across tables, anew in each epoch.

    Args:
        tables: the rows, in Arrow format.
        batch_size: rows per batch over all processes.
        seed: of the order; None keeps the order of the tables.
        start: index of the first batch to give.
        rank: this process gets rows rank, rank + world_size, ... of each batch.
        world_size: number of processes that share each batch; divides `batch_size`.
    """

    def __init__(
        self,
        tables: list[datasets.Dataset],
        batch_size: int,
        *,
        seed: int | None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(start=start, rank=rank, world_size=world_size)
        self.tables = tables
        self.batch_size = batch_size
        self.seed = seed
        self._slots = [(table, first) for table, rows in enumerate(tables) for first in range(0, len(rows), batch_size)]

    def whole(self, index: int) -> Batch:
        """Batch `index`, the rows of all processes."""
        epoch, position = divmod(index, len(self._slots))
        order = _order(self.seed, epoch, 0, len(self._slots))
        table, first = self._slots[position if order is None else order[position]]
        rows = np.arange(first, first + self.batch_size) % len(self.tables[table])
        permutation = _order(self.seed, epoch, 1 + table, len(self.tables[table]))
        if permutation is not None:
            rows = permutation[rows]
        return to_batch(self.tables[table][rows])


class EvalBatches:
    """All rows of some tables once, in order, in batches of one table each.

    Every process gets equally many rows, because collective operations would hang otherwise: one that would have a row
    less gets a copy of a row with all targets ignored.

    Args:
        tables: the rows, in Arrow format.
        batch_size: rows per batch over all processes; a table's last batch may be smaller.
        rank: this process gets rows rank, rank + world_size, ... of each batch.
        world_size: number of processes that share each batch.
    """

    def __init__(self, tables: list[datasets.Dataset], batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.tables = tables
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return sum(-(-len(table) // self.batch_size) for table in self.tables)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._share, self.whole())

    def whole(self) -> Iterator[Batch]:
        """The batches, the rows of all processes."""
        for table in self.tables:
            for first in range(0, len(table), self.batch_size):
                yield to_batch(table[first : first + self.batch_size])

    def _share(self, whole: Batch) -> Batch:
        size = len(whole["inputs"])
        wanted = torch.arange(self.rank, -(-size // self.world_size) * self.world_size, self.world_size)
        share = _rows(whole, wanted.clamp(max=size - 1))
        share["targets"][wanted >= size] = IGNORE
        return share


class BatchHash:
    """A running hash of training batches: equal for equal batches in equal order, on whatever device.

    Args:
        state: `state` of an earlier hash, to continue it.

    Attributes:
        state: the hash so far, 64 hexadecimal digits.
    """

    def __init__(self, state: str = "0" * 64) -> None:
        self.state = state

    def update(self, batch: Batch) -> None:
        """Chains one batch: its `digest` where it carries one (the whole batch, before devices shared it)."""
        link = batch.get("digest") or digest(batch)
        self.state = hashlib.sha256(bytes.fromhex(self.state) + bytes.fromhex(link)).hexdigest()


def digest(batch: Batch) -> str:
    """SHA-256 of a batch's `inputs`, `targets` and, if any, `segment_ids`, in hexadecimal digits."""
    total = hashlib.sha256()
    for name in SEQUENCES:
        if name in batch:
            array = batch[name].cpu().numpy().astype("<i8")
            total.update(f"{name}{array.shape}".encode())
            total.update(array.tobytes())
    return total.hexdigest()


def to_batch(table: Any) -> Batch:
    """Rows of a `pyarrow.Table` (columns as in `Source`) as a batch of int64 tensors."""
    columns = {name: _to_tensor(table[name]) for name in table.column_names}
    batch: Batch = {name: columns[name] for name in SEQUENCES if name in columns}
    batch["slices"] = {
        name.removeprefix(SLICE_PREFIX): column for name, column in columns.items() if name.startswith(SLICE_PREFIX)
    }
    return batch


def _to_tensor(column: Any) -> Tensor:
    array = column.combine_chunks()
    shape: tuple[int, ...] = (len(array),)
    if hasattr(array, "flatten"):  # a list column: (B, L)
        shape, array = (len(array), -1), array.flatten()
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).astype(np.int64).reshape(shape))


def _rows(batch: Batch, rows: slice | Tensor) -> Batch:
    sequences = {name: batch[name][rows] for name in SEQUENCES if name in batch}
    return sequences | {"slices": {name: values[rows] for name, values in batch["slices"].items()}}


@lru_cache(maxsize=32)
def _order(seed: int | None, epoch: int, part: int, size: int) -> np.ndarray | None:
    """The order of `size` things in an epoch; None for their own order.

    Made from raw generator output, which numpy promises never to change, unlike `Generator.permutation`.
    """
    if seed is None:
        return None
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch, part])).random_raw(size)
    return np.argsort(raw, kind="stable")
