"""The baseline: a Transformer, by default pre-norm with rotary positions, grouped queries and SwiGLU.

The form of Llama (Touvron et al. 2023, arXiv 2302.13971); grouped queries (Ainslie et al. 2023, arXiv 2305.13245);
the optional sliding window is that of Mistral (Jiang et al. 2023, arXiv 2310.06825).

Letters: B batch, T time, S cached keys, H query heads, G key/value heads, K head width, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import sparse_attention
from zoo.layers.attention import FARTHEST, AttentionConfig, Documents, window_pattern
from zoo.layers.cache import CachedAttention
from zoo.registry import register
from zoo.settings import setting


@dataclass(kw_only=True)
class TransformerConfig(AttentionConfig):
    """Settings of the Transformer."""

    window: int | None = setting(
        None,
        "a token sees this many last tokens, itself included (and as many next ones if not causal); null: all",
        minimum=1,
        maximum=FARTHEST,
    )


@register("transformer", config=TransformerConfig)
class Transformer(CachedAttention):
    """Transformer: softmax attention, then a feed-forward, in the form of Llama unless set otherwise."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.window = config.window
        self.span = None if config.window is None else config.window - 1

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """See `Attention.attend`."""
        length, cached = q.shape[1], k.shape[1] - q.shape[1]
        sees_all = documents.begins is None and not cached and (self.window is None or length <= self.window)
        # On a CPU the zoo's own loops take half of the time that torch's attention takes.
        if sees_all and q.device.type != "cpu":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K), (B, G, T, K)
            grouped = self.n_heads != self.n_kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped).transpose(1, 2)
        reach = None if self.window is None else self.window - 1
        right = 0 if self.causal else reach
        pattern = window_pattern(length, cached, documents, left=reach, right=right, device=q.device)
        return sparse_attention(q, k, v, pattern, backend=self.backend)

    def pairs(self, seq_len: int) -> int:
        """All before it and itself, or those in the window."""
        reach = seq_len - 1 if self.window is None else min(seq_len, self.window) - 1
        before = seq_len * (reach + 1) - reach * (reach + 1) // 2  # itself included
        return self.n_heads * (before if self.causal else 2 * before - seq_len)
