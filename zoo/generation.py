"""Generating tokens with any causal architecture: prefill in chunks, then one step per token on the carried state.

Letters: B batch, T prompt length, V vocab_size, D d_model, A rows that are not finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError, DataError
from zoo.model import Model, ModelState

Prompts = Tensor | Sequence[Tensor | Sequence[int]]
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How the next token is chosen."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature:g} is not valid: expected a number from 0 (the most likely token) on"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} is not valid: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p:g} is not valid: expected more than 0 and at most 1")

    def __call__(self, logits: Tensor, draws: list[torch.Generator]) -> Tensor:
        """The next token (A,) of each row of logits (A, V); row i draws from `draws[i]` alone."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Without the largest one taken off, a tiny temperature would make infinities of them.
        logits = (logits - logits.amax(-1, keepdim=True)).double() / self.temperature
        probabilities = keep_likely(logits, self.top_k, self.top_p).softmax(-1)
        reached = probabilities.cumsum(-1)  # (A, V)
        # One number per row, made on the CPU: the same on every device, and whatever the other rows draw.
        drawn = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws])  # (A, 1)
        # The first token that reaches further than the number drawn has a probability above 0.
        at = torch.searchsorted(reached, drawn.to(logits.device) * reached[:, -1:], right=True)
        return at[:, 0]


def stream(
    model: Model,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    lengths: Tensor | Sequence[int] | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
    prefill_chunk: int = 4096,
) -> Iterator[Tensor]:
    """Yields one new token per row at a time.

    Every row is generated as if it were alone: shorter prompts are padded on the left with a document of its own,
    which the architecture neither sees nor counts, and each row draws from its own seed. What is left between the two
    is rounding, because matrix products add up differently for another batch. What depends on how a prompt is cut into
    calls (H2O, scalings that grow with the length) is the same only where `prefill_chunk` cuts no prompt.

    Args:
        model: Any causal architecture.
        tokens: The prompts: (B, T) or (T,), T >= 1, or a list of 1-D prompts of different lengths.
        max_new_tokens: How many tokens to make.
        min_new_tokens: Before so many are made, a row makes no stop token.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw among the k most likely tokens only.
        top_p: Draw among the fewest tokens whose probabilities reach p (arXiv 1904.09751).
        seed: Row i draws with seed + i, or with the i-th of several seeds; no other random state is touched.
        lengths: (B,): of row i, the last lengths[i] of its T tokens are the prompt and the others padding.
        stop: Token ids after which a row is finished; it yields that token, and from then on `pad`. When all rows are
            finished, so is the stream.
        pad: What finished rows yield; any number, the model never reads it.
        prefill_chunk: The prompts are read in pieces of so many tokens, which bounds the memory of reading them.

    Yields:
        The next token of each row, (B,), on the model's device.

    Raises:
        ConfigError: A setting lies outside its range, or the model is not causal.
        DataError: An empty prompt, tokens outside the vocabulary, lengths that do not fit, or more tokens than the
            model has learned positions for.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not valid: expected at least 0")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ConfigError(f"min_new_tokens={min_new_tokens} is not valid: expected 0 to max_new_tokens")
    if prefill_chunk < 1:
        raise ConfigError(f"prefill_chunk={prefill_chunk} is not valid: expected at least 1")
    for token in stop:
        if not 0 <= token < model.config.vocab_size:
            raise ConfigError(f"stop token {token} is outside the vocabulary 0..{model.config.vocab_size - 1}")
    if min_new_tokens and len(set(stop)) == model.config.vocab_size:
        raise ConfigError("all tokens are stop tokens: leave one out, or pass min_new_tokens=0")
    choice = _Choice(temperature=temperature, top_k=top_k, top_p=top_p)
    prompts, lengths = left_padded(tokens, lengths)
    model.check_vocabulary(prompts)
    seeds = _seeds(seed, prompts.shape[0])
    longest, known = int(lengths.max()), model.config.max_positions
    if known is not None and longest + max(0, max_new_tokens - 1) > known:
        raise DataError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit max_positions={known}: shorten the "
            f"prompt, make fewer tokens, or build the model with more positions"
        )
    padding = lengths if bool((lengths < prompts.shape[1]).any()) else None
    state = model.init_state(prompts.shape[0])  # which refuses a model that is not causal
    return _stream(
        model, state, prompts, padding, choice, seeds, max_new_tokens, min_new_tokens, list(stop), pad, prefill_chunk
    )


def generate(
    model: Model,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    lengths: Tensor | Sequence[int] | None = None,
    stop: Sequence[int] = (),
    pad: int = 0,
    prefill_chunk: int = 4096,
) -> Tensor:
    """The prompts followed by the generated tokens; arguments and errors are those of `stream`.

    Returns:
        (B, T + N) on the model's device, N = max_new_tokens, or fewer where every row met a stop token before. A list
        of prompts comes back padded on the left with `pad`.
    """
    new = stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        lengths=lengths,
        stop=stop,
        pad=pad,
        prefill_chunk=prefill_chunk,
    )
    shown, kept = left_padded(tokens, lengths)
    if not isinstance(tokens, Tensor):
        shown = torch.where(_is_prompt(shown, kept), shown, pad)
    return torch.cat([shown.to(model.embedding.weight.device), *(token[:, None] for token in new)], dim=1)


@torch.inference_mode()
def _stream(
    model: Model,
    state: ModelState,
    prompts: Tensor,
    lengths: Tensor | None,
    choice: _Choice,
    seeds: list[int],
    max_new_tokens: int,
    min_new_tokens: int,
    stop: list[int],
    pad: int,
    prefill_chunk: int,
) -> Iterator[Tensor]:
    device = model.embedding.weight.device
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = torch.arange(prompts.shape[0], device=device)  # (A,) which rows are not finished
    stops = torch.tensor(stop, dtype=torch.int64, device=device)
    last, state = _prefill(model, state, prompts, lengths, prefill_chunk)  # (A, D)
    for made in range(max_new_tokens):
        logits = model.predict(last)  # (A, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if stop and made < min_new_tokens:
            logits[:, stops] = float("-inf")
        token = choice(logits, draws)  # (A,)
        yield torch.full_like(prompts[:, 0], pad, device=device).index_copy(0, rows, token)
        if stop:
            # A finished row leaves the batch: its positions and its cache grow no more.
            going = (~torch.isin(token, stops)).nonzero()[:, 0]
            if going.numel() < token.numel():
                rows, token, state = rows[going], token[going], take_rows(state, going)
                draws = [draws[i] for i in going.tolist()]
        if not token.numel() or made + 1 == max_new_tokens:
            return
        x, state = _read(model, token[:, None], state, None)
        last = x[:, -1]


def _prefill(
    model: Model, state: ModelState, prompts: Tensor, lengths: Tensor | None, chunk: int
) -> tuple[Tensor, ModelState]:
    """What the model made of each prompt's last token, (B, D), and the state after it."""
    device = model.embedding.weight.device
    # Padding is a document before that of the prompt: documents do not see each other, and each counts from zero.
    ids = None
    if lengths is not None:
        # Padding may be longer than the documents that a model has learned positions for: then it is several.
        longest = model.config.max_positions or prompts.shape[1]
        times = torch.arange(prompts.shape[1], device=prompts.device)
        ids = torch.where(_is_prompt(prompts, lengths), prompts.shape[1], times // longest)  # (B, T)
    x = None
    for begin in range(0, prompts.shape[1], chunk):
        piece = slice(begin, begin + chunk)
        part = None if ids is None else ids[:, piece].to(device)
        x, state = _read(model, prompts[:, piece].to(device), state, part)
        x = x[:, -1].clone()  # a view would keep the whole chunk
    assert x is not None
    return x, state


def _read(model: Model, tokens: Tensor, state: ModelState, segment_ids: Tensor | None) -> tuple[Tensor, ModelState]:
    x, next_state = model.read(tokens, state, segment_ids)
    assert next_state is not None  # one comes out where one goes in
    return x, next_state


def left_padded(tokens: Prompts, lengths: Tensor | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The prompts as one array (B, T), with 0 where there is padding, and their lengths (B,), both on one device.

    Raises:
        DataError: No prompt, an empty one, no integers, or lengths that do not fit.
    """
    if isinstance(tokens, Tensor):
        array = tokens[None] if tokens.ndim == 1 else tokens
        _check_prompt(array, 2)
        array = array.long()
        if lengths is None:
            return array, torch.full((array.shape[0],), array.shape[1], device=array.device)
        known = torch.as_tensor(lengths, device=array.device)
        longest = array.shape[1]
        if known.shape != array.shape[:1] or known.is_floating_point() or known.min() < 1 or known.max() > longest:
            raise DataError(
                f"lengths={known.tolist()} do not fit prompts of shape {tuple(array.shape)}: expected "
                f"{array.shape[0]} integers from 1 to {longest}, how many of each row's last tokens are the prompt"
            )
        return torch.where(_is_prompt(array, known), array, 0), known
    if lengths is not None:
        raise DataError("lengths= belongs to prompts in one array: a list of prompts has lengths of its own")
    prompts = [torch.as_tensor(prompt) for prompt in tokens]
    if not prompts:
        raise DataError("an empty list of prompts: expected at least one")
    for prompt in prompts:
        _check_prompt(prompt, 1)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    array = torch.zeros(len(prompts), int(sizes.max()), dtype=torch.int64, device=prompts[0].device)
    for row, prompt in zip(array, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return array, sizes


def _check_prompt(prompt: Tensor, ndim: int) -> None:
    if prompt.ndim == ndim and not prompt.numel():
        raise DataError("an empty prompt: expected at least one token")
    if prompt.ndim != ndim or prompt.dtype not in (torch.int64, torch.int32):
        expected = "(batch, time), or a list of prompts" if ndim == 2 else "(time,) in a list of prompts"
        raise DataError(
            f"a prompt of shape {tuple(prompt.shape)} and type {prompt.dtype}: expected integer ids of shape {expected}"
        )


def _is_prompt(prompts: Tensor, lengths: Tensor) -> Tensor:
    """Which tokens are no padding, (B, T) bool."""
    times = torch.arange(prompts.shape[1], device=prompts.device)
    return times >= prompts.shape[1] - lengths[:, None]


def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    seeds = [int(s) for s in seed] if isinstance(seed, Sequence) else list(range(seed, seed + rows))
    if len(seeds) != rows:
        raise ConfigError(f"{len(seeds)} seeds for {rows} prompts: pass one per prompt, or one number for all")
    for value in (min(seeds), max(seeds)):
        if not 0 <= value <= _LARGEST_SEED:
            raise ConfigError(f"seed={value} is not valid: expected 0 to {_LARGEST_SEED}")
    return seeds


def take_rows(state: Any, rows: Tensor) -> Any:
    """A state of those batch rows alone, in that order."""
    if isinstance(state, Tensor):
        return state[rows]
    parts = [take_rows(part, rows) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, V) with the unlikely ones at -inf; the most likely token always stays."""
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all more likely tokens
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits
