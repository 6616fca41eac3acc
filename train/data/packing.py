"""Documents packed into windows of one length, none of them padded but the last.

All documents in a row form one stream of tokens, cut every `seq_len` tokens. A window's target is the stream's next
token, the one after the window included, so each token but a document's first is predicted exactly once, whatever the
window length: losses per byte are comparable between packings. Where the next token belongs to another document the
target is ignored. `segment_ids` number the documents of a window from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from zoo.train.data.stream import IGNORE

# A document's targets, numbers and sizes take 24 bytes per token: a long one is expanded piece by piece.
_PIECE = 1 << 20


def pack(documents: Iterable[tuple[np.ndarray, np.ndarray]], seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    """Cuts documents into windows.

    Args:
        documents: for each, its tokens (T,) and the bytes that each token stands for (T,).
        seq_len: tokens per window, at least 1.

    Yields:
        Rows: `inputs`, `targets` (ignored: -100), `segment_ids`, each (seq_len,) int64; `document` (), the number among
        all of the window's first document; and `target_bytes` (), the bytes that the window's targets stand for. The
        last window is filled up with token 0 as a segment of its own, its targets ignored.
    """
    parts: list[np.ndarray] = []
    held = 0
    number = -1
    for number, (tokens, sizes) in enumerate(documents):
        for start in range(0, len(tokens), _PIECE):
            parts.append(_expand(tokens, sizes, number, start))
            held += parts[-1].shape[1]
            if held >= seq_len:
                stream = np.concatenate(parts, axis=1)
                whole = held - held % seq_len
                yield from _windows(stream[:, :whole], seq_len)
                parts = [stream[:, whole:]]
                held -= whole
    if held:
        filling = np.repeat([[0], [IGNORE], [number + 1], [0]], seq_len - held, axis=1)
        yield from _windows(np.concatenate([*parts, filling], axis=1), seq_len)


def _expand(tokens: np.ndarray, sizes: np.ndarray, number: int, start: int) -> np.ndarray:
    """Rows input, target, document number, bytes of the target (4, n) for the piece of a document at `start`."""
    piece = tokens[start : start + _PIECE]
    expanded = np.empty((4, len(piece)), dtype=np.int64)
    following = slice(start + 1, start + 1 + len(piece))
    ahead = len(tokens[following])  # one less than the piece where the document ends
    expanded[0] = piece
    expanded[1, :ahead], expanded[1, ahead:] = tokens[following], IGNORE
    expanded[2] = number
    expanded[3, :ahead], expanded[3, ahead:] = sizes[following], 0
    return expanded


def _windows(stream: np.ndarray, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
    for window in stream.reshape(4, -1, seq_len).swapaxes(0, 1):  # (4, W * L) -> W times (4, L)
        inputs, targets, numbers, sizes = window
        yield {
            "inputs": inputs,
            "targets": targets,
            "segment_ids": numbers - numbers[0],
            "document": numbers[0],
            "target_bytes": sizes.sum(),
        }
