"""The last tokens alone, or with the first ones as attention sinks (StreamingLLM: Xiao et al. 2023, arXiv 2309.17453).

With the positions inside the cache, query t stands min(t, s + W - 1) behind a sink's place j, and t - j behind that of
a recent token. So recent keys and sinks need two rotations of the query, and a chunk of queries takes two softmaxes,
joined by their sums: each query sees what it would have seen if the tokens had come one by one.

Letters: B batch, T time, S recent keys kept, s sinks, W window, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.documents import first_tokens
from zoo.kernels import sparse_attention
from zoo.kernels.sparse_attention import Pattern
from zoo.layers.attention import FARTHEST, Documents, KVCache, window_pattern
from zoo.layers.cache import CachedAttention, CachePolicy
from zoo.settings import setting

LARGEST = 2**20
"""Most sinks: room for them is taken from the beginning."""


class StreamingState(NamedTuple):
    """The first and the last tokens of a document, keys rotated by their places in it (as in `KVCache`)."""

    sink_k: Tensor
    """(B, s, G, K): the first tokens; zeros for those not read yet."""
    sink_v: Tensor
    """(B, s, G, K)."""
    k: Tensor
    """(B, S, G, K), S < W."""
    v: Tensor
    """(B, S, G, K)."""
    position: Tensor
    """(B,) int64: number of tokens read so far."""
    start: Tensor
    """(B,) int64: position at which the current document began."""


@dataclass(kw_only=True)
class Window(CachePolicy):
    """A token sees the last ones, itself included."""

    state: ClassVar[type] = StreamingState
    sinks: ClassVar[int] = 0

    window: int = setting(1024, "last tokens that a token sees, itself included", minimum=1, maximum=FARTHEST)

    def init_state(self, attention: CachedAttention, cache: KVCache) -> StreamingState:
        """See `CachePolicy.init_state`."""
        empty = cache.k.new_zeros(cache.k.shape[0], self.sinks, *cache.k.shape[2:])
        return StreamingState(empty, empty.clone(), *cache)

    def made(self, state: StreamingState) -> bool:
        """See `CachePolicy.made`: as many keys as this window has after so many tokens. A GPU is not waited for."""
        fits = state.sink_k.shape[1] == self.sinks
        if not fits or state.position.device.type != "cpu":
            return fits
        return state.k.shape[1] == min(int(state.position[0]), self.window - 1)

    def state_size(self, attention: CachedAttention, seq_len: int) -> int:
        """Keys and values of the sinks and of the window without the token that comes, and two counters."""
        keys = self.sinks + min(seq_len, self.window - 1)
        return 2 * keys * attention.n_kv_heads * attention.head_dim + 2

    def read(
        self, attention: CachedAttention, q: Tensor, k: Tensor, v: Tensor, state: StreamingState, begins: Tensor
    ) -> tuple[Tensor, StreamingState]:
        """See `CachePolicy.read`."""
        if attention.rotary is None or not attention.rotary.grows:
            return self._read(attention, q, k, v, state, begins, None)
        # While the cache fills, the frequencies change from token to token: read together those that share them.
        places = torch.arange(q.shape[1], device=q.device) - begins
        lengths = (places + 1).clamp(max=self.sinks + self.window)  # (B, T)
        stage = attention.rotary.scaling.stage(lengths)
        cuts = (stage[:, 1:] != stage[:, :-1]).any(0).nonzero()[:, 0] + 1
        parts = []
        edges = [0, *cuts.tolist(), q.shape[1]]
        for begin, end in pairwise(edges):
            now = slice(begin, end)
            shared = lengths[:, begin : begin + 1]
            y, state = self._read(attention, q[:, now], k[:, now], v[:, now], state, begins[:, now] - begin, shared)
            parts.append(y)
        return torch.cat(parts, dim=1), state

    def _read(
        self,
        attention: CachedAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: StreamingState,
        begins: Tensor,
        lengths: Tensor | None,
    ) -> tuple[Tensor, StreamingState]:
        """`read` for tokens that share their frequencies; `lengths` (B, 1) has them where they depend on it."""
        length, held = q.shape[1], state.k.shape[1]
        places = torch.arange(length, device=q.device) - begins  # (B, T)
        if not attention.grows:
            k = attention.rotated(k, places, lengths)
        kept_k, kept_v = torch.cat((state.k, k), dim=1), torch.cat((state.v, v), dim=1)  # (B, S + T, G, K)
        near = kept_k
        if attention.grows:
            cached = (state.position - state.start - held)[:, None] + torch.arange(held, device=q.device)
            near = attention.rotated(near, torch.cat((cached, places), dim=1), lengths)
        documents = Documents(begins, None)
        pattern = window_pattern(length, held, documents, left=self.window - 1, right=0, device=q.device)
        near_q = attention.rotated(q, places, lengths)
        y, lse = sparse_attention(near_q, near, kept_v, pattern, backend=attention.backend, return_lse=True)
        if self.sinks and held + length >= self.window:  # else all stands in the window
            z, other = self._to_sinks(attention, q, k, v, state, begins, places, lengths)
            share = torch.sigmoid(other - lse).transpose(1, 2)[..., None]  # (B, T, H, 1)
            y = torch.lerp(y, z, share.to(y.dtype))
        forget = max(0, held + length - (self.window - 1))
        return y, StreamingState(
            first_tokens(state.sink_k, k, begins[:, -1:]),
            first_tokens(state.sink_v, v, begins[:, -1:]),
            kept_k[:, forget:].clone(),
            kept_v[:, forget:].clone(),
            state.position + length,
            state.position + begins[:, -1],
        )

    def _to_sinks(
        self,
        attention: CachedAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: StreamingState,
        begins: Tensor,
        places: Tensor,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What queries draw from the sinks that the window has left behind, (B, T, H, K) and lse (B, H, T)."""
        # The sinks of the document that goes on, then those of documents that begin here, where they stand.
        goes_on = begins[:, :1]
        k = torch.cat((first_tokens(state.sink_k, k, goes_on), k), dim=1)  # (B, s + T, G, K)
        v = torch.cat((first_tokens(state.sink_v, v, goes_on), v), dim=1)
        if attention.grows:
            slots = torch.arange(self.sinks, device=q.device).expand(q.shape[0], -1)
            k = attention.rotated(k, torch.cat((slots, places), dim=1), lengths)
        lo = torch.where(begins == goes_on, 0, begins + self.sinks)
        hi = lo + (places - self.window + 1).clamp(0, self.sinks)
        q = attention.rotated(q, places.clamp(max=self.sinks + self.window - 1), lengths)
        return sparse_attention(q, k, v, Pattern(lo, hi), backend=attention.backend, return_lse=True)


@dataclass(kw_only=True)
class Streaming(Window):
    """A token sees the first tokens, the attention sinks, and the last ones."""

    sinks: int = setting(4, "first tokens of a document that are kept beside the window", minimum=0, maximum=LARGEST)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < self.sinks:
            self.fail("window", f"expected at least sinks={self.sinks}: the cache is smaller than its sinks")
