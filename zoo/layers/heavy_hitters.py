"""H2O (Zhang et al. 2023, arXiv 2306.14048): the last tokens, and those that attention has weighed most so far.

Keys keep the positions that they were read at. Each key/value head keeps tokens of its own.

Letters: B batch, T time, S kept keys, H query heads, G key/value heads, R = H / G, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.documents import document_ends
from zoo.kernels.checks import state_dtype
from zoo.layers.attention import FARTHEST, KVCache
from zoo.layers.cache import CachedAttention, CachePolicy
from zoo.settings import setting

LOGITS = 1 << 22
"""Logits that are held at once."""


class HeavyHitterState(NamedTuple):
    """The keys that each head keeps, in no order."""

    k: Tensor
    """(B, S, G, K), rotated as in `KVCache`."""
    v: Tensor
    """(B, S, G, K)."""
    scores: Tensor
    """(B, S, G) fp32: sum of the shares of attention that the key got, over queries and query heads."""
    places: Tensor
    """(B, S, G) int64: where in the document the key stands; -1: none."""
    budget: Tensor
    """(B, 2) int64: recent and heavy keys to keep."""
    position: Tensor
    """(B,) int64: number of tokens read so far."""
    start: Tensor
    """(B,) int64: position at which the current document began."""


@dataclass(kw_only=True)
class H2O(CachePolicy):
    """After each call, the last keys stay, and of the older ones those of the highest scores; what goes is forgotten.

    A call's tokens see all that was kept and each other, so that a prompt may be read at once or in chunks, which keep
    less. Numbers of keys may be given as shares of the prompt: the tokens of a document in the call that it begins in.
    """

    state: ClassVar[type] = HeavyHitterState

    recent: int | float = setting(0.1, "last keys to keep: a number from 1, or a share of the prompt such as 0.1")
    heavy: int | float = setting(0.1, "older keys to keep: a number, or a share of the prompt")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("recent", 1), ("heavy", 0)):
            value = getattr(self, name)
            if isinstance(value, float) and not (0 < value <= 1 or value == least == 0):
                self.fail(name, "expected a whole number of keys, or a share of the prompt of more than 0 and up to 1")
            if isinstance(value, int) and not least <= value <= FARTHEST:
                self.fail(name, f"expected a number from {least} to {FARTHEST}, or a share of the prompt such as 0.1")

    def budget(self, prompt: Tensor) -> Tensor:
        """Recent and heavy keys, (B, 2), for prompts of those lengths (B,)."""
        numbers = []
        for value, least in ((self.recent, 1), (self.heavy, 0)):
            share = (prompt * value).round().long() if isinstance(value, float) else torch.full_like(prompt, value)
            numbers.append(share.clamp(min=least))
        return torch.stack(numbers, dim=-1)

    def init_state(self, attention: CachedAttention, cache: KVCache) -> HeavyHitterState:
        """See `CachePolicy.init_state`."""
        empty = cache.k[..., 0]  # (B, 0, G)
        return HeavyHitterState(
            cache.k,
            cache.v,
            empty.to(state_dtype(empty), copy=True),
            empty.long(),
            self.budget(torch.zeros_like(cache.position)),
            cache.position,
            cache.start,
        )

    def reset_state(self, state: HeavyHitterState, rows: Tensor) -> HeavyHitterState:
        """See `CachePolicy.reset_state`."""
        state = super().reset_state(state, rows)
        return state._replace(places=state.places.masked_fill(rows[:, None, None], -1))

    def made(self, state: HeavyHitterState) -> bool:
        """See `CachePolicy.made`: numbers of keys are those of the state; shares may have become any."""
        if state.budget.device.type != "cpu" or not state.k.shape[1]:
            return True
        kept = zip(state.budget[0].tolist(), (self.recent, self.heavy), strict=True)
        return all(isinstance(asked, float) or held == asked for held, asked in kept)

    def state_size(self, attention: CachedAttention, seq_len: int) -> int:
        """Keys, values, scores and places, and four counters; shares are those of a prompt of that length."""
        kept = min(seq_len, int(self.budget(torch.tensor([seq_len])).sum()))
        return kept * attention.n_kv_heads * (2 * attention.head_dim + 2) + 4

    def read(
        self, attention: CachedAttention, q: Tensor, k: Tensor, v: Tensor, state: HeavyHitterState, begins: Tensor
    ) -> tuple[Tensor, HeavyHitterState]:
        """See `CachePolicy.read`."""
        length, heads = q.shape[1], k.shape[2]
        times = torch.arange(length, device=q.device)
        places = times - begins  # (B, T)
        lengths = document_ends(begins) - begins if attention.grows else None  # (B, T)
        q = attention.rotated(q, places, lengths)
        if not attention.grows:
            k = attention.rotated(k, places, lengths)
        kept_k, kept_v = torch.cat((state.k, k), dim=1), torch.cat((state.v, v), dim=1)  # (B, S + T, G, K)
        kept_places = torch.cat((state.places, places[..., None].expand(-1, -1, heads)), dim=1)  # (B, S + T, G)
        keys = kept_k
        if lengths is not None:
            of_cached = lengths[:, :1].expand(-1, state.k.shape[1])
            keys = attention.rotated(keys, kept_places, torch.cat((of_cached, lengths), dim=1)[..., None])
        y, shares = _attend(q, keys, kept_v, state.places >= 0, begins)

        scores = torch.cat((state.scores, state.scores.new_zeros(places.shape[0], length, heads)), dim=1) + shares
        prompt = torch.where(begins[:, -1] >= 0, length - begins[:, -1], 0)
        budget = torch.where(prompt[:, None] > 0, self.budget(prompt), state.budget)
        goes_on = (state.places >= 0) & (begins[:, -1:, None] <= 0)
        alive = torch.cat((goes_on, (times >= begins[:, -1:])[..., None].expand(-1, -1, heads)), dim=1)
        recent = kept_places > (places[:, -1] - budget[:, 0])[:, None, None]
        order = scores.masked_fill(recent, torch.inf).masked_fill(~alive, -torch.inf)
        best, chosen = order.topk(min(order.shape[1], int(budget.sum(-1).max())), dim=1)  # (B, S', G)
        ranks = torch.arange(best.shape[1], device=q.device)[:, None]
        empty = (best == -torch.inf) | (ranks >= budget.sum(-1)[:, None, None])
        return y, HeavyHitterState(
            _choose(kept_k, chosen),
            _choose(kept_v, chosen),
            scores.gather(1, chosen),
            kept_places.gather(1, chosen).masked_fill(empty, -1),
            budget,
            state.position + length,
            state.position + begins[:, -1],
        )


def _choose(x: Tensor, chosen: Tensor) -> Tensor:
    """Of x (B, S + T, G, K) those that each head has chosen, (B, S', G). Takes a seventh of `gather`'s time."""
    batch, size, heads, _ = x.shape
    rows = torch.arange(batch, device=x.device)[:, None, None] * size
    at = (rows + chosen) * heads + torch.arange(heads, device=x.device)
    return x.flatten(0, 2).index_select(0, at.flatten()).unflatten(0, chosen.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of earlier calls and to new ones, a block of queries at a time.

    Args:
        q: (B, T, H, K).
        k: (B, S + T, G, K).
        v: (B, S + T, G, K).
        kept: (B, S, G) bool: which of the first S keys there are; they are of the document that begins first.
        begins: (B, T) time at which each token's document begins.

    Returns:
        (B, T, H, K), and the shares that each key got, (B, S + T, G), in the dtype of states.
    """
    (batch, length, n_heads, width), held, heads = q.shape, kept.shape[1], k.shape[2]
    dtype = state_dtype(q)
    times = torch.arange(length, device=q.device)
    got = torch.zeros(batch, heads, held + length, device=q.device, dtype=dtype)
    drawn = []
    step = max(1, LOGITS // (batch * n_heads * (held + length)))
    for begin in range(0, length, step):
        now, end = slice(begin, begin + step), min(begin + step, length)
        seen_k, seen_v = (t[:, : held + end].to(dtype) for t in (k, v))
        queries = q[:, now].to(dtype).unflatten(2, (heads, -1)) * width**-0.5  # (B, t, G, R, K)
        logits = torch.einsum("btgrk,bsgk->bgrts", queries, seen_k)
        old = (begins[:, now] <= 0)[:, None, :, None] & kept.transpose(1, 2)[:, :, None]  # (B, G, t, S)
        new = (times[:end] <= times[now, None]) & (times[:end] >= begins[:, now, None])  # (B, t, end)
        seen = torch.cat((old, new[:, None].expand(-1, heads, -1, -1)), dim=-1)[:, :, None]  # (B, G, 1, t, S + end)
        shares = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        got[..., : held + end] += shares.sum((2, 3))
        drawn.append(torch.einsum("bgrts,bsgk->btgrk", shares, seen_v).flatten(2, 3))
    return torch.cat(drawn, dim=1).to(q.dtype), got.transpose(1, 2)
