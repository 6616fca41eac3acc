"""Longformer (Beltagy et al. 2020, arXiv 2004.05150): a sliding window, dilated or not, and a few global tokens.

Letters: B batch, T time, S cached keys, D d_model, H query heads, G key/value heads, K head width, W reach of the
window, P global tokens, N tiles of queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.documents import first_tokens
from zoo.kernels import sparse_attention
from zoo.kernels.sparse_attention import Pattern, visible_pairs
from zoo.layers.attention import FARTHEST, Attention, AttentionConfig, Documents, window_pattern
from zoo.layers.linear import Linear
from zoo.registry import register
from zoo.settings import setting

TILE = 64
"""Queries for which far keys are listed together."""


@dataclass(kw_only=True)
class LongformerConfig(AttentionConfig):
    """Settings of Longformer."""

    window: int = setting(
        256, "a token sees this many tokens to each side (causal: before it), and itself", minimum=1, maximum=FARTHEST
    )
    window_growth: float = setting(1.0, "factor of the window from each block to the next", above=0)
    windows: list[int] | None = setting(None, "the window of each block, in place of window and window_growth")
    dilation: int = setting(
        1, "see every so-many-th token only, in a window as many times as wide", minimum=1, maximum=FARTHEST
    )
    dilations: list[int] | None = setting(None, "the dilation of each block, in place of dilation")
    dilated_heads: int | None = setting(None, "how many heads, the last ones, are dilated; null: all", minimum=0)
    n_global: int | None = setting(
        None, "first tokens of a document that all its tokens see; null: 0, or 1 if not causal", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("windows", "dilations"):
            values = getattr(self, name)
            if values is not None and (len(values) != self.n_layers or min(values) < 1 or max(values) > FARTHEST):
                self.fail(name, f"expected {self.n_layers} numbers, one per block, from 1 to {FARTHEST}")
        doublings = (self.n_layers - 1) * math.log2(self.window_growth)
        if self.windows is None and math.log2(self.window) + doublings > math.log2(FARTHEST):
            self.fail("window_growth", f"expected windows of at most {FARTHEST}")
        if self.dilated_heads is not None:
            heads_per_group = self.n_heads // (self.n_kv_heads or self.n_heads)
            if self.dilated_heads > self.n_heads or self.dilated_heads % heads_per_group:
                expected = f"expected at most n_heads={self.n_heads}"
                if heads_per_group > 1:
                    expected += f" and a multiple of {heads_per_group}, the query heads per key/value head"
                self.fail("dilated_heads", expected)
        narrowest = min(self.reach(layer) for layer in range(self.n_layers))
        if self.n_global is not None and self.n_global > narrowest:
            self.fail("n_global", f"expected at most the narrowest window, {narrowest}")

    def reach(self, layer: int) -> int:
        """How many keys a token of that block sees to each side."""
        return self.windows[layer] if self.windows else max(1, round(self.window * self.window_growth**layer))

    def head_dilations(self, layer: int) -> list[tuple[int, int]]:
        """Runs of heads of that block with one dilation: (number of heads, dilation)."""
        dilation = self.dilations[layer] if self.dilations else self.dilation
        dilated = self.n_heads if self.dilated_heads is None else self.dilated_heads
        runs = [(self.n_heads - dilated, 1), (dilated, dilation)] if dilation > 1 else [(self.n_heads, 1)]
        return [run for run in runs if run[0]]


class LongformerState(NamedTuple):
    """The keys and values that later tokens may still see: those of the global tokens, and of the window."""

    global_k: Tensor
    """(B, P, G, K): the document's first tokens; zeros for those not read yet."""
    global_v: Tensor
    """(B, P, G, K)."""
    k: Tensor
    """(B, S, G, K), S <= W times the largest dilation, rotated as in `KVCache`."""
    v: Tensor
    """(B, S, G, K)."""
    position: Tensor
    """(B,) int64: number of tokens read so far."""
    start: Tensor
    """(B,) int64: position at which the current document began."""


class GlobalQueries(nn.Module):
    """What global tokens draw from all tokens of their document, by projections of their own and without positions.

    They are few and see everything, so instead of projecting all T tokens to keys and values, each of their queries
    goes back through the projection to the width of x: q (W x) = (q W) x, and sum p (W x) = W (sum p x).
    """

    def __init__(self, config: LongformerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.query = Linear(config.d_model, config.d_model, bias=config.bias)
        # A bias would move all scores of a query alike, which a softmax does not see.
        self.key = Linear(config.d_model, config.d_model, bias=False)
        self.value = Linear(config.d_model, config.d_model, bias=config.bias)
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """Maps x (B, T, D), times of the global tokens (B, P) and what they see (B, P, T) bool to (B, P, H, K)."""
        chosen = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))  # (B, P, D)
        q = self.query(chosen).unflatten(-1, (self.n_heads, -1))  # (B, P, H, K)
        to_keys, to_values = (w.weight.unflatten(0, (self.n_heads, -1)) for w in (self.key, self.value))  # (H, K, D)
        q = torch.einsum("bphk,hkd->bphd", q, to_keys).flatten(1, 2)[:, None]  # (B, 1, PH, D)
        if mask is not None:
            mask = mask.repeat_interleave(self.n_heads, dim=1)[:, None]  # (B, 1, PH, T)
        scale = to_keys.shape[1] ** -0.5
        drawn = F.scaled_dot_product_attention(q, x[:, None], x[:, None], attn_mask=mask, scale=scale)
        drawn = drawn[:, 0].unflatten(1, (-1, self.n_heads))  # (B, P, H, D)
        z = torch.einsum("bphd,hkd->bphk", drawn, to_values)
        return z if self.value.bias is None else z + self.value.bias.unflatten(0, (self.n_heads, -1))

    def flops(self, seq_len: int, n_global: int) -> int:
        """Three projections of the global tokens, and two products as wide as the model with each token."""
        d_model = self.query.in_features
        return 6 * n_global * d_model**2 + 4 * n_global * self.n_heads * d_model * seq_len


@register("longformer", config=LongformerConfig)
class Longformer(Attention):
    """Longformer: attention in a sliding window and to a few global tokens, then a feed-forward."""

    state = LongformerState
    shares = True

    def __init__(self, config: LongformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.reach = config.reach(layer)
        self.runs = config.head_dilations(layer)
        self.span: int = self.reach * max(dilation for _, dilation in self.runs)
        self.n_global = (0 if config.causal else 1) if config.n_global is None else config.n_global
        self.global_queries = None if config.causal else GlobalQueries(config)
        self.global_tokens = not config.causal  # which tokens are global must be known from the past alone

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """See `Attention.attend`; with a state, the keys begin with the P of the global tokens (`_with_cache`)."""
        per_group = self.n_heads // self.n_kv_heads
        parts, head = [], 0
        for count, dilation in self.runs:  # windows that reach differently far cannot share a call
            heads, groups = slice(head, head + count), slice(head // per_group, (head + count) // per_group)
            pattern = self.pattern(q.shape[1], k.shape[1], documents, dilation, count, q.device)
            parts.append(
                sparse_attention(q[:, :, heads], k[:, :, groups], v[:, :, groups], pattern, backend=self.backend)
            )
            head += count
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return y if self.global_queries is None else self._with_global_queries(self.global_queries, x, y, documents)

    def pattern(
        self, length: int, n_keys: int, documents: Documents, dilation: int, n_heads: int, device: torch.device
    ) -> Pattern:
        """Which keys the heads of one dilation see; what global tokens of the bidirectional form see is not in it.

        Args:
            length: T.
            n_keys: T, or with a state P + S + T.
            documents: What bounds the sight of the queries.
            dilation: Of these heads.
            n_heads: How many they are.
            device: Of the pattern.
        """
        slots = self.n_global if n_keys > length else 0
        cached, reach = n_keys - length - slots, self.reach * dilation
        near = window_pattern(length, cached, documents, left=reach, right=0 if self.causal else reach, device=device)
        lo, hi = near.lo + slots, near.hi + slots
        dilations = (dilation,) * n_heads if dilation > 1 else None
        begins = torch.zeros(1, length, dtype=torch.int64, device=device)
        first = begins if documents.begins is None else documents.begins
        if slots:  # global tokens that left the window are at hand as the first keys, and then none of them elsewhere
            lo = torch.where(first < -cached, torch.maximum(lo, first + cached + 2 * slots), lo)
        first = torch.where(first >= -cached, first + cached + slots, 0)  # (B|1, T), as keys
        last = hi if self.causal else documents.ends
        if documents.marks is not None:
            return Pattern(lo, hi, dilations, *_marked_keys(documents.marks, first, last, TILE), first=first, last=last)
        if not self.n_global:
            return Pattern(lo, hi, dilations)
        if documents.begins is None:
            far, far_length = begins[:, ::TILE, None], self.n_global  # (1, N, 1)
        else:
            # A query sees the first tokens of its document as near keys, or it stands further than the window from
            # them, and then so does, in the same document, one of the queries a window apart in its tile.
            step = self.reach + 1 if dilation == 1 else 1
            far_length = self.n_global if dilation == 1 else 1
            places = torch.arange(0, length, TILE, device=device)[:, None]
            places = (places + torch.arange(0, min(TILE, length), step, device=device)).clamp(max=length - 1)  # (N, M)
            ends = torch.full_like(first, length) if documents.ends is None else documents.ends
            opens, closes = first[:, places], (ends + cached + slots)[:, places]  # (B|1, N, M)
            opens = opens.masked_fill(F.pad(opens[..., 1:] == opens[..., :-1], (1, 0)), n_keys)  # listed already
            far = opens[..., None] + torch.arange(0, self.n_global, far_length, device=device)
            # What would reach into the next document is left out: all of so short a document is near.
            far = far.masked_fill(far + far_length > closes[..., None], -1).flatten(2)
        return Pattern(lo, hi, dilations, far[:, None], TILE, far_length, first=first, last=last)

    def is_global(self, place: Tensor, size: Tensor) -> Tensor:
        """See `Attention.is_global`; the data mark none."""
        return place < self.n_global

    def _with_global_queries(self, queries: GlobalQueries, x: Tensor, y: Tensor, documents: Documents) -> Tensor:
        """Puts what global tokens draw from their whole document in the place of `y` (B, T, H, K)."""
        batch, length, _ = x.shape
        if documents.marks is None and documents.begins is None:
            places = torch.arange(min(self.n_global, length), device=x.device).expand(batch, -1)  # (B, P)
            z = queries(x, places, None).to(y.dtype) if self.n_global else y[:, :0]
            return torch.cat((z, y[:, z.shape[1] :]), dim=1)
        times = torch.arange(length, device=x.device)[None]  # (1, T)
        begins = torch.zeros_like(times) if documents.begins is None else documents.begins
        ends = torch.full_like(times, length) if documents.ends is None else documents.ends
        marks = times - begins < self.n_global if documents.marks is None else documents.marks
        marks = marks.expand(batch, -1)
        places = _places(marks).clamp(min=0)  # (B, P)
        if not places.shape[1]:
            return y
        low, high = (edge.expand(batch, -1).gather(1, places)[..., None] for edge in (begins, ends))  # (B, P, 1)
        z = queries(x, places, (times[:, None] >= low) & (times[:, None] < high)).to(y.dtype)
        rank = (marks.cumsum(1) - 1).clamp(min=0)[..., None, None].expand_as(y)  # (B, T, H, K)
        return torch.where(marks[..., None, None], z.gather(1, rank), y)

    def _with_cache(self, state: LongformerState, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((state.global_k, state.k, k), dim=1), torch.cat((state.global_v, state.v, v), dim=1)

    def _cached_positions(self, state: LongformerState) -> Tensor:
        first = state.start[:, None] + torch.arange(self.n_global, device=state.k.device)
        return torch.cat((first, super()._cached_positions(state)), dim=1)

    def _remember(self, state: LongformerState, k: Tensor, v: Tensor, begins: Tensor) -> LongformerState:
        length = begins.shape[1]
        before, new = (state.global_k, state.global_v), (k[:, -length:], v[:, -length:])
        global_k, global_v = (first_tokens(*pair, begins[:, -1:]) for pair in zip(before, new, strict=True))
        kept = min(k.shape[1] - self.n_global, self.span)
        k, v = (t[:, t.shape[1] - kept :].clone() for t in (k, v))
        return LongformerState(global_k, global_v, k, v, state.position + length, state.position + begins[:, -1])

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LongformerState:
        """Nothing read."""
        cache = super().init_state(batch_size, device=device, dtype=dtype)
        empty = cache.k.new_zeros(batch_size, self.n_global, self.n_kv_heads, self.head_dim)
        return LongformerState(empty, empty.clone(), *cache)

    def flops(self, seq_len: int) -> int:
        """As for any attention, and in the bidirectional form what the global tokens draw."""
        of_all = super().flops(seq_len)
        return of_all + (self.global_queries.flops(seq_len, min(self.n_global, seq_len)) if self.global_queries else 0)

    def pairs(self, seq_len: int) -> int:
        """See `Attention.pairs`; counted."""
        cpu = torch.device("cpu")
        return sum(
            visible_pairs(self.pattern(seq_len, seq_len, Documents(None, None), dilation, count, cpu), count, seq_len)
            for count, dilation in self.runs
        )

    def state_size(self, seq_len: int) -> int:
        """Keys and values of the window and of the global tokens, and two counters."""
        keys = self.n_global + min(seq_len, self.span)
        return 2 * keys * self.n_kv_heads * self.head_dim + 2


def _places(marks: Tensor) -> Tensor:
    """Times of the marked tokens of each row, (B, T) to (B, P); -1 where a row has fewer than another."""
    most = int(marks.sum(1).max())
    order = (~marks).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return order.masked_fill(~marks.gather(1, order), -1)


def _marked_keys(marks: Tensor, first: Tensor, last: Tensor | None, tile: int) -> tuple[Tensor, int, int]:
    """The marked tokens as far keys: `far`, `tile` and `far_length` of a `Pattern`.

    Those that no query of a tile can see, because they belong to another document, are left out of it.
    """
    length = marks.shape[1]
    places = _places(marks)[:, None]  # (B, 1, P)
    last = torch.full_like(first, length) if last is None else last
    low = first[:, ::tile, None]  # (B|1, N, 1)
    ends = torch.arange(tile - 1, length + tile - 1, tile, device=marks.device).clamp(max=length - 1)
    high = last[:, ends, None]
    far = torch.where((places >= low) & (places < high), places, -1)  # (B, N, P)
    return far[:, None], tile, 1
