"""The log-likelihood of sequences of any length, read chunk by chunk in memory that their length does not change.

Letters: B batch, T time, L tokens of a chunk, O tokens of overlap, D d_model, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError, DataError
from zoo.long_context import has_cache_policy
from zoo.model import Model, ModelState

Array = Tensor | np.ndarray[Any, Any]
Tokens = Array | Iterable[Array]

_SLICE_LOGITS = 1 << 22
"""Logits that exist at once, 16 MiB of them: a chunk times the vocabulary may be gigabytes."""

_OTHER_SHAPE = "segment_ids of another shape than the tokens: expected one id for each token"


def score(
    model: Model,
    tokens: Tokens,
    *,
    chunk: int = 4096,
    overlap: int = 0,
    segment_ids: Tokens | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    carry: bool = True,
) -> Tensor:
    """The log-likelihood of each token given all tokens before it; arguments and errors are those of `stream`.

    Returns:
        (B, T - 1) on the CPU, natural logarithms, float32 or the model's float64: entry t is that of token t + 1. It
        is nan where there is nothing to predict: at the first token of a document, and in padding.
    """
    settings: dict[str, Any] = {"segment_ids": segment_ids, "lengths": lengths}
    return torch.cat(list(stream(model, tokens, chunk=chunk, overlap=overlap, carry=carry, **settings)), dim=1)


def stream(
    model: Model,
    tokens: Tokens,
    *,
    chunk: int = 4096,
    overlap: int = 0,
    segment_ids: Tokens | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    carry: bool = True,
) -> Iterator[Tensor]:
    """Yields what `score` returns chunk by chunk, as it is known.

    Args:
        model: Any causal architecture.
        tokens: Integer ids, (B, T) or (T,): a tensor on any device, an array of numpy, a memory-mapped one too, or
            pieces of either kind one after the other, of any sizes, from an iterator. Only a chunk of them is on the
            model's device, or in memory, at a time.
        chunk: Tokens that the model reads at once. It decides memory and speed, and the result only with what depends
            on how a text is cut into calls: an H2O cache, rotary scalings that grow with the length.
        overlap: Without `carry`, tokens of the last window that are read again as context of the next one.
        segment_ids: In the form of the tokens, non-negative and non-decreasing along T: packed documents.
        lengths: (B,): of row i, the first lengths[i] tokens count and the others are padding, which is not read.
        carry: The state goes from chunk to chunk, and the result is that of the whole sequence at once. False: each
            window of `chunk` tokens is read with no more than `overlap` tokens before what it scores, for models that
            cannot read on, such as those with fewer learned positions than there are tokens.

    Yields:
        (B, L) each, the first one (B, L - 1), on the CPU.

    Raises:
        ConfigError: A setting lies outside its range, or the model is not causal.
        DataError: No tokens, tokens of a wrong kind or outside the vocabulary, segment ids or lengths that do not fit,
            or more tokens than the model has learned positions for.
    """
    if not model.config.causal:
        raise ConfigError(
            f"this {model.architecture} has causal=false: it predicts hidden tokens, not next ones, and so a text has "
            f"no likelihood; score with a model of causal=true"
        )
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} is not valid: expected at least 1")
    if not 0 <= overlap < chunk:
        raise ConfigError(f"overlap={overlap} is not valid: expected 0 to {chunk - 1}, less than chunk={chunk}")
    if overlap and carry:
        raise ConfigError(f"overlap={overlap} is for windows that carry no state: pass carry=false, or no overlap")
    if not carry and has_cache_policy(model):
        raise ConfigError("a cache acts where a state is carried: pass carry=true, or cache=full")
    positions = model.config.max_positions
    if positions is not None and not carry and chunk > positions:
        raise ConfigError(f"chunk={chunk} is more than max_positions={positions}: pass chunk={positions} or less")
    if isinstance(tokens, Tensor | np.ndarray) and carry and segment_ids is None:
        _check_positions(model, _rows(tokens).shape[1])
    known_lengths = None if lengths is None else _checked_lengths(lengths, tokens)
    return _stream(model, tokens, segment_ids, known_lengths, chunk, overlap, carry)


@torch.inference_mode()
def _stream(
    model: Model,
    tokens: Tokens,
    segment_ids: Tokens | None,
    lengths: Tensor | None,
    chunk: int,
    overlap: int,
    carry: bool,
) -> Iterator[Tensor]:
    device = model.embedding.weight.device
    ids_of_pieces = None if segment_ids is None else _pieces(segment_ids, chunk, chunk - overlap, "segment_ids")
    state: ModelState | None = None
    last: Tensor | None = None  # what was made of the last token read, (B, 1, D)
    last_id: Tensor | None = None  # the document that it belongs to, (B, 1)
    context: list[Tensor] = []  # tokens, and ids where there are some, of the overlap
    read = 0
    for piece in _pieces(tokens, chunk, chunk - overlap, "tokens"):
        size = piece.shape[1]
        inside = None if lengths is None else torch.arange(read, read + size) < lengths[:, None]  # (B, L)
        if inside is not None:
            piece = torch.where(inside, piece, 0)
        model.check_vocabulary(piece)
        new = [piece.to(device)]
        ids = None if ids_of_pieces is None else next(ids_of_pieces, None)
        if ids_of_pieces is not None and (ids is None or ids.shape != piece.shape):
            raise DataError(_OTHER_SHAPE)
        if ids is not None:
            new.append(ids.to(device))
        elif carry:
            _check_positions(model, read + size)
        if carry:
            x, state = model.read(new[0], state or model.init_state(piece.shape[0]), *new[1:])  # (B, L, D)
        else:
            window = [torch.cat(pair, dim=1) for pair in zip(context, new, strict=True)] if context else new
            x = model.read(window[0], None, *window[1:])[0][:, -size:]
            context = [part[:, part.shape[1] - overlap :].clone() for part in window]
        # The first token of a chunk is predicted by what was made of the last one before it.
        skipped = 1 if last is None else 0
        before = x[:, :-1] if last is None else torch.cat((last, x[:, :-1]), dim=1)
        scores = _log_likelihood(model, before, new[0][:, skipped:]).cpu()
        if ids is not None:
            ids = ids if last_id is None else torch.cat((last_id, ids), dim=1)
            scores = scores.masked_fill(ids[:, 1:] != ids[:, :-1], float("nan"))
            last_id = ids[:, -1:]
        if inside is not None:
            scores = scores.masked_fill(~inside[:, skipped:], float("nan"))
        yield scores
        last = x[:, -1:].clone()  # a view would keep the whole chunk
        read += size
    if not read:
        raise DataError("no tokens to score: expected at least one")
    if ids_of_pieces is not None and next(ids_of_pieces, None) is not None:
        raise DataError(_OTHER_SHAPE)


def _log_likelihood(model: Model, x: Tensor, targets: Tensor) -> Tensor:
    """Of targets (B, L), what the model made of the tokens before them being x (B, L, D)."""
    at_once = max(1, _SLICE_LOGITS // model.config.vocab_size)
    parts = []
    for some, wanted in zip(x.flatten(0, 1).split(at_once), targets.flatten().split(at_once), strict=True):
        logits = model.predict(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts).view_as(targets)


def _pieces(array: Tokens, first: int, step: int, name: str) -> Iterator[Tensor]:
    """Cuts an array, or an iterator's pieces of any sizes, into `first` times, then `step` by `step`, then the rest."""
    held: list[Tensor] = []
    size, wanted, n_rows = 0, first, None
    for part in [array] if isinstance(array, Tensor | np.ndarray) else array:
        rows = _rows(part, name)
        if n_rows not in (None, rows.shape[0]):
            raise DataError(f"pieces of {n_rows} and of {rows.shape[0]} rows: expected {name} of equally many")
        n_rows, at = rows.shape[0], 0
        while at < rows.shape[1]:
            take = min(wanted - size, rows.shape[1] - at)
            held.append(_as_tensor(rows[:, at : at + take]))
            size, at = size + take, at + take
            if size == wanted:
                yield torch.cat(held, dim=1)
                held, size, wanted = [], 0, step
    if held:
        yield torch.cat(held, dim=1)


def _rows(array: Array, name: str = "tokens") -> Array:
    """(T,) as (1, T), and nothing of it copied."""
    if not isinstance(array, Tensor | np.ndarray):
        raise DataError(f"{name} of type {type(array).__name__}: expected a tensor, an array, or an iterator of such")
    kinds = array.dtype.kind in "iu" if isinstance(array, np.ndarray) else _is_integer(array.dtype)
    if array.ndim not in (1, 2) or not kinds:
        raise DataError(
            f"{name} of shape {tuple(array.shape)} and type {array.dtype}: expected integers of shape (batch, time)"
        )
    return array[None] if array.ndim == 1 else array


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _as_tensor(array: Array) -> Tensor:
    return array.cpu().long() if isinstance(array, Tensor) else torch.from_numpy(array.astype(np.int64))


def _checked_lengths(lengths: Tensor | Sequence[int], tokens: Tokens) -> Tensor:
    if not isinstance(tokens, Tensor | np.ndarray):
        raise DataError("lengths= belongs to tokens in one array: pieces of an iterator have no padding")
    known, shape = torch.as_tensor(lengths).cpu(), tuple(_rows(tokens).shape)
    if known.shape != shape[:1] or known.is_floating_point() or known.min() < 1 or known.max() > shape[1]:
        raise DataError(
            f"lengths={known.tolist()} do not fit tokens of shape {shape}: expected {shape[0]} integers from 1 to "
            f"{shape[1]}, how many of each row's first tokens count"
        )
    return known


def _check_positions(model: Model, time: int) -> None:
    known = model.config.max_positions
    if known is not None and time > known:
        raise DataError(
            f"{time} tokens are more than max_positions={known}: pass carry=false and chunk={known} to score windows, "
            f"or give shorter documents"
        )
