"""Generating tokens with any causal architecture: prefill once, then one step per token on the carried state.

Letters: B batch, T prompt length, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError
from zoo.model import Model


def stream(
    model: Model,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yields one new token per row at a time.

    Args:
        model: Any causal architecture.
        tokens: The prompt, (B, T), T >= 1.
        max_new_tokens: How many tokens to make.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw among the k most likely tokens only.
        top_p: Draw among the fewest tokens whose probabilities reach p (arXiv 1904.09751).
        seed: Seed of the draws, which touch no other random state.

    Yields:
        The next token of each row, (B,).

    Raises:
        ConfigError: A setting lies outside its range.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is not valid: expected at least 0")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature:g} is not valid: expected at least 0 (0: the most likely token)")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} is not valid: expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p:g} is not valid: expected more than 0 and at most 1")
    return _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, seed)


@torch.inference_mode()
def _stream(
    model: Model,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[Tensor]:
    generator = torch.Generator(tokens.device).manual_seed(seed)
    state = model.init_state(tokens.shape[0])
    for _ in range(max_new_tokens):
        logits, state, _ = model(tokens, state=state)
        last = logits[:, -1].float()  # (B, V)
        if temperature == 0:
            token = last.argmax(-1)
        else:
            probabilities = _keep_likely(last / temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        yield token
        tokens = token[:, None]


def generate(
    model: Model,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Tensor:
    """The prompt followed by `max_new_tokens` generated tokens, (B, T + max_new_tokens); see `stream`."""
    new = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    )
    return torch.cat([tokens, *(token[:, None] for token in new)], dim=1)


def _keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
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
