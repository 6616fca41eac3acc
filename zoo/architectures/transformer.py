"""The baseline: a pre-norm Transformer with rotary positions, grouped-query attention and SwiGLU.

The form of Llama (Touvron et al. 2023, arXiv 2302.13971); grouped queries (Ainslie et al. 2023, arXiv 2305.13245);
the optional sliding window is that of Mistral (Jiang et al. 2023, arXiv 2310.06825).

Letters: B batch, T time, S cached keys, D d_model, H query heads, G key/value heads, K head width, W window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import ModelConfig
from zoo.layers.feed_forward import SwiGLU
from zoo.layers.rotary import rotary_angles, rotate
from zoo.mixer import Mixer
from zoo.registry import register
from zoo.settings import setting

QUERY_BLOCK = 512
"""Queries per call where a mask is needed: keeps the mask's memory linear in T."""


@dataclass(kw_only=True)
class TransformerConfig(ModelConfig):
    """Settings of the Transformer."""

    n_heads: int = setting(4, "query heads", minimum=1)
    n_kv_heads: int | None = setting(None, "key/value heads (grouped-query attention); null: n_heads", minimum=1)
    d_ff: int | None = setting(None, "width of the feed-forward; null: 8/3 d_model, up to a multiple of 16", minimum=1)
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", above=0)
    window: int | None = setting(None, "a token sees this many last tokens, itself included; null: all", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % (2 * self.n_heads):
            self.fail("d_model", f"expected a multiple of 2 n_heads = {2 * self.n_heads}: rotary heads have even width")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            self.fail("n_kv_heads", f"expected a divisor of n_heads={self.n_heads}")


class KVCache(NamedTuple):
    """Keys and values of the tokens that later tokens may still see."""

    k: Tensor
    """(B, S, G, K), rotated by absolute position."""
    v: Tensor
    """(B, S, G, K)."""
    position: Tensor
    """(B,) int64: number of tokens read so far."""
    start: Tensor
    """(B,) int64: position at which the current document began."""


@register("transformer", config=TransformerConfig)
class Attention(Mixer):
    """Transformer: causal softmax attention with rotary positions, then SwiGLU."""

    both_ways = True

    @classmethod
    def sublayers(cls, config: TransformerConfig, layer: int) -> list[Mixer]:
        """Attention, then the feed-forward."""
        d_ff = config.d_ff or 16 * math.ceil(8 * config.d_model / 3 / 16)
        return [cls(config, layer), SwiGLU(config, layer, d_ff)]

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.head_dim = config.d_model // config.n_heads
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.window = config.window
        self.causal = config.causal
        self.rope_base = config.rope_base
        heads = self.n_heads + 2 * self.n_kv_heads
        self.qkv_proj = nn.Linear(config.d_model, heads * self.head_dim, bias=False)  # queries, keys, values
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        nn.init.normal_(self.qkv_proj.weight, std=0.02)
        nn.init.normal_(self.out_proj.weight, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(
        self, x: Tensor, state: KVCache | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        batch, length, _ = x.shape
        positions = torch.arange(length, device=x.device)  # (T,)
        if state is not None:
            positions = state.position[:, None] + positions  # (B, T)
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2G, K)
        cos, sin = rotary_angles(positions, self.head_dim, self.rope_base)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        q, k = rotate(qk, cos, sin).split([self.n_heads, self.n_kv_heads], dim=2)  # (B, T, H, K), (B, T, G, K)

        # Time is counted from the first token of this call, cached keys are at negative times; (B, T) or None.
        document_start = None if segment_ids is None else _segment_starts(segment_ids)
        if state is not None:
            cached_start = (state.start - state.position)[:, None].expand(batch, length)
            if segment_ids is None or document_start is None:
                document_start = cached_start
            else:
                document_start = torch.where(segment_ids == segment_ids[:, :1], cached_start, document_start)
            k, v = torch.cat((state.k, k), dim=1), torch.cat((state.v, v), dim=1)  # (B, S + T, G, K)

        y = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), document_start)  # (B, H, T, K)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)
        if state is None or document_start is None:
            return y, None
        keep = k.shape[1] if self.window is None else min(k.shape[1], self.window - 1)
        forget = k.shape[1] - keep
        if forget:  # a copy, so that the memory of forgotten keys is given back
            k, v = k[:, forget:].clone(), v[:, forget:].clone()
        return y, KVCache(k, v, state.position + length, state.position + document_start[:, -1])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None) -> Tensor:
        """Softmax attention of the last T of S + T tokens.

        Args:
            q: (B, H, T, K).
            k: (B, G, S + T, K).
            v: (B, G, S + T, K).
            document_start: (B, T) time of the first token that each query may see, counted from the first query; or
                None where all may be seen.
        """
        length, cached = q.shape[2], k.shape[2] - q.shape[2]
        grouped = self.n_heads != self.n_kv_heads
        if not self.causal:
            times = torch.arange(length, device=q.device)
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
            if self.window is not None:
                seen = (times - times[:, None]).abs() < self.window
            if document_start is not None:
                seen = seen & (document_start[:, None, :, None] == document_start[:, None, None])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        if document_start is None and not cached and (self.window is None or length <= self.window):
            # The CPU's flash kernel reads contiguous heads up to 4% faster than it takes to make them so.
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        blocks = []
        for begin, end, first in self._query_blocks(length, cached):
            key_times = torch.arange(first, end, device=q.device)
            query_times = torch.arange(begin, end, device=q.device)[:, None]
            mask = key_times <= query_times  # (t, s)
            if self.window is not None:
                mask &= key_times > query_times - self.window
            if document_start is not None:
                mask = mask & (key_times >= document_start[:, None, begin:end, None])  # (B, 1, t, s)
            keys = slice(first + cached, end + cached)
            blocks.append(
                F.scaled_dot_product_attention(
                    q[:, :, begin:end], k[:, :, keys], v[:, :, keys], attn_mask=mask, enable_gqa=grouped
                )
            )
        return torch.cat(blocks, dim=2)

    def _query_blocks(self, length: int, cached: int) -> list[tuple[int, int, int]]:
        """Blocks of queries [begin, end) with the first key time that any of them may see."""
        step = QUERY_BLOCK if self.window is None else min(QUERY_BLOCK, max(self.window, 64))
        blocks = []
        for begin in range(0, length, step):
            first = -cached if self.window is None else max(-cached, begin - self.window + 1)
            blocks.append((begin, min(begin + step, length), first))
        return blocks

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache."""
        shape = (batch_size, 0, self.n_kv_heads, self.head_dim)
        return KVCache(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch_size, device=device, dtype=torch.int64),
            torch.zeros(batch_size, device=device, dtype=torch.int64),
        )

    def reset_state(self, state: KVCache, rows: Tensor) -> KVCache:
        """Starts a new document in those rows: what is cached stays, and is no longer seen."""
        return state._replace(start=torch.where(rows, state.position, state.start))

    def flops(self, seq_len: int) -> int:
        """Two projections and the scores that are computed: half of them without a window, blocks with one."""
        projections = self.qkv_proj.weight.numel() + self.out_proj.weight.numel()
        if self.window is None or seq_len <= self.window:
            scores = seq_len * (seq_len + 1) // 2
        else:
            scores = sum((end - begin) * (end - first) for begin, end, first in self._query_blocks(seq_len, 0))
        return 2 * seq_len * projections + 4 * scores * self.n_heads * self.head_dim

    def state_size(self, seq_len: int) -> int:
        """Keys and values of all tokens, or of the last W - 1, and two counters."""
        keys = seq_len if self.window is None else min(seq_len, self.window - 1)
        return 2 * keys * self.n_kv_heads * self.head_dim + 2


def _segment_starts(segment_ids: Tensor) -> Tensor:
    """Time at which the document of each token begins; (B, T) to (B, T)."""
    times = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return torch.cummax(torch.where(begins, times, 0), dim=1).values
