"""Running text: batches whose rows go on from one batch to the next, for models that carry their state along.

Letters: W windows, L tokens per window, B rows, N tokens per segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zoo.train.data.stream import IGNORE, SEQUENCES, Batch, EndlessBatches, EvalBatches, to_batch

if TYPE_CHECKING:
    import datasets


class RunningText:
    """The text of a split in segments, in B shares of about one size.

    A share is a run of consecutive windows. Where fewer windows are wanted than there are, the shares stand apart, so
    that few of them still come from all over the split; else one begins where the other ends. Documents have numbers
    of their own in `segment_ids`: one that goes on in the next segment of a row keeps its number there.

    Args:
        windows: W rows, as `Source.windows` gives them.
        rows: B.
        segment_length: N, a divisor of L.
        wanted: windows to keep; None: all.

    Attributes:
        windows: those that are kept.
        n_segments: segments in them.
        starts: (B + 1,) the first segment of each share, and the end.
    """

    def __init__(self, windows: datasets.Dataset, rows: int, segment_length: int, wanted: int | None = None) -> None:
        everything, kept = len(windows), min(len(windows), wanted or len(windows))
        bounds = np.arange(rows + 1) * kept // rows
        share = np.repeat(np.arange(rows), np.diff(bounds))  # (W,), of each window kept
        index = np.arange(kept) + share * (everything - kept) // rows
        self.windows = windows.select(index) if kept < everything else windows
        self.segment_length = segment_length
        self._per_window = windows.features["inputs"].length // segment_length
        self.n_segments = kept * self._per_window
        self.starts = bounds * self._per_window
        # A document that goes on has its number in the split. Where text is left out, numbers begin above all others.
        last = windows[everything - 1 :]
        numbers = int(_documents(last)[0] + to_batch(last)["segment_ids"].max()) + 1
        gaps = np.append(0, np.cumsum(np.diff(index) > 1))  # before each window, (W,)
        self._above = numbers * gaps
        self._round = numbers * (gaps[-1] + 1)

    def read(self, segments: np.ndarray) -> Batch:
        """The batch of some segments, (B,), counted on round after round: behind the last one comes the first."""
        rounds, places = np.divmod(segments, self.n_segments)
        window, piece = np.divmod(places, self._per_window)
        table = self.windows[window]
        batch = to_batch(table)
        times = torch.from_numpy(piece * self.segment_length)[:, None] + torch.arange(self.segment_length)  # (B, N)
        batch |= {name: batch[name].gather(1, times) for name in SEQUENCES}
        numbers = _documents(table) + self._above[window] + self._round * rounds  # (B,)
        batch["segment_ids"] += torch.from_numpy(numbers)[:, None]
        return batch


def _documents(table: Any) -> np.ndarray:
    return table["document"].to_numpy()


class RunningStream(EndlessBatches):
    """Endless training batches of running text: row b reads from the beginning of share b on, round after round.

    No row jumps: at the end of its share it goes on with the next one, and so keeps its state. All rows begin at equal
    distances, and all of the text is read equally often.

    Args:
        text: what to read.
        seed: of the place in the text where the first share begins; None: where the text does.
        start: index of the first batch to give.
        rank: this process gets rows rank, rank + world_size, ... of each batch.
        world_size: number of processes that share each batch.
    """

    def __init__(
        self, text: RunningText, *, seed: int | None, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(start=start, rank=rank, world_size=world_size)
        self.text = text
        # Raw output, as numpy promises never to change it.
        drawn = 0 if seed is None else int(np.random.PCG64(np.random.SeedSequence([seed])).random_raw())
        self._first = text.starts[:-1] + drawn % text.n_segments  # (B,)

    def whole(self, index: int) -> Batch:
        """Batch `index`, the rows of all processes."""
        return self.text.read(self._first + index)


class RunningEval(EvalBatches):
    """All segments of a text once: row b reads share b, in order.

    Args:
        text: what to read.
        rank: this process gets rows rank, rank + world_size, ... of each batch.
        world_size: number of processes that share each batch.
    """

    def __init__(self, text: RunningText, *, rank: int = 0, world_size: int = 1) -> None:
        full = np.diff(text.starts) > 0
        super().__init__([text.windows], int(full.sum()), rank=rank, world_size=world_size)
        self.text = text
        self._starts, self._ends = text.starts[:-1][full], text.starts[1:][full]

    def __len__(self) -> int:
        return int((self._ends - self._starts).max())

    def whole(self) -> Iterator[Batch]:
        """The batches; a row that is through before the others reads its end again, its targets ignored."""
        for step in range(len(self)):
            wanted = self._starts + step
            batch = self.text.read(np.minimum(wanted, self._ends - 1))
            batch["targets"][torch.from_numpy(wanted >= self._ends)] = IGNORE
            yield batch
