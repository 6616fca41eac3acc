"""Softmax attention over keys and values that are kept: what the attention architectures share.

Letters: B batch, T time, S cached keys, D d_model, H query heads, G key/value heads, K head width.

Times count from the first token of a call; what was read before has negative times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.documents import document_begins, document_ends
from zoo.kernels.errors import DataError
from zoo.kernels.sparse_attention import Pattern
from zoo.layers.feed_forward import MLP, SwiGLU
from zoo.layers.linear import Linear
from zoo.layers.rope_scaling import SCALINGS, make_scaling
from zoo.layers.rotary import Rotary
from zoo.mixer import Mixer
from zoo.settings import setting

BERT = {
    "causal": False,
    "norm": "layer",
    "norm_eps": 1e-12,
    "post_norm": True,
    "embedding_norm": True,
    "rotary": False,
    "bias": True,
    "feed_forward": "gelu",
    "mlm_head": "gelu",
}
"""The settings that make an attention architecture an encoder as published (Devlin et al. 2018, arXiv 1810.04805);
`max_positions` is left to the user: `create_model("longformer", vocab_size=..., max_positions=4096, **BERT)`."""


FARTHEST = 2**30
"""Largest window, dilation and block: their products are numbers of 64 bits."""


@dataclass(kw_only=True)
class HeadsConfig(ModelConfig):
    """Settings of blocks of attention and a feed-forward, whatever tells the order of the tokens."""

    n_heads: int = setting(4, "query heads", minimum=1)
    bias: bool = setting(False, "biases in the projections and in the feed-forward")
    feed_forward: str = setting("swiglu", "feed-forward", choices=("swiglu", "gelu", "gelu_tanh"))
    d_ff: int | None = setting(
        None,
        "width of the feed-forward; null: 8/3 d_model for swiglu, up to a multiple of 16, else 4 d_model",
        minimum=1,
    )
    backend: str = setting("auto", "kernel backend: auto, or one that `python -m zoo.kernels` lists")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            self.fail("d_model", f"expected a multiple of n_heads={self.n_heads}")

    def make_feed_forward(self, layer: int) -> Mixer:
        """The feed-forward of a block."""
        if self.feed_forward == "swiglu":
            return SwiGLU(self, layer, self.d_ff or 16 * math.ceil(8 * self.d_model / 3 / 16), bias=self.bias)
        return MLP(self, layer, self.d_ff or 4 * self.d_model, self.feed_forward, bias=self.bias)


@dataclass(kw_only=True)
class AttentionConfig(HeadsConfig):
    """Settings that every attention architecture with a cache of keys and values has."""

    n_kv_heads: int | None = setting(None, "key/value heads (grouped-query attention); null: n_heads", minimum=1)
    qkv_bias: bool | None = setting(None, "biases of queries, keys and values; null: as bias says (Qwen2: true alone)")
    rotary: bool = setting(True, "rotary positions; false: none, or those of max_positions")
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", above=1)
    rope_scaling: dict[str, Any] = setting(
        {}, f"for longer sequences than in training: {{type: yarn, factor: 8}}; types {', '.join(SCALINGS)}"
    )
    trained_length: int | None = setting(
        None, "length of the sequences in training, where rope_scaling begins; null: rope_scaling says it", minimum=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary and self.d_model % (2 * self.n_heads):
            self.fail("d_model", f"expected a multiple of 2 n_heads = {2 * self.n_heads}: rotary heads have even width")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            self.fail("n_kv_heads", f"expected a divisor of n_heads={self.n_heads}")
        if self.rope_scaling and not self.rotary:
            self.fail("rope_scaling", "expected nothing where rotary=false")
        self.make_rotary()

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def make_rotary(self) -> Rotary | None:
        """What rotates queries and keys, if anything does."""
        if not self.rotary:
            return None
        width = self.d_model // self.n_heads
        return Rotary(width, self.rope_base, make_scaling(self.rope_scaling, self.trained_length, width))


class KVCache(NamedTuple):
    """Keys and values of the tokens that later tokens may still see."""

    k: Tensor
    """(B, S, G, K), rotated by absolute position; not yet rotated where the rotation grows with the length."""
    v: Tensor
    """(B, S, G, K)."""
    position: Tensor
    """(B,) int64: number of tokens read so far."""
    start: Tensor
    """(B,) int64: position at which the current document began."""


class Documents(NamedTuple):
    """What bounds the sight of each token, as times."""

    begins: Tensor | None
    """(B, T) time at which the token's document begins; None: all tokens are of one that begins with the first."""
    ends: Tensor | None
    """(B, T) time after the last token of its document; None: T."""
    marks: Tensor | None = None
    """(B, T) bool: the tokens that the data call global; None: the data say nothing."""


class Attention(Mixer):
    """Attention with a cache of all keys and values; subclasses say in `attend` what each query sees."""

    both_ways = True

    state: ClassVar[type] = KVCache
    """What is carried from call to call."""

    @classmethod
    def sublayers(cls, config: Any, layer: int) -> list[Mixer]:
        """Attention, then the feed-forward."""
        return [cls(config, layer), config.make_feed_forward(layer)]

    def __init__(self, config: AttentionConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.head_dim = config.d_model // config.n_heads
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.causal = config.causal
        self.rotary = config.make_rotary()
        self.backend = config.backend
        width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.d_model, width, bias=config.has_qkv_bias)  # queries, keys, values
        self.out_proj = Linear(config.d_model, config.d_model, bias=config.bias)
        nn.init.normal_(self.qkv_proj.weight, std=0.02)
        nn.init.normal_(self.out_proj.weight, std=0.02 / math.sqrt(2 * config.n_layers))
        for projection in (self.qkv_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        segment_ids: Tensor | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Any]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        if state is not None and not isinstance(state, self.state):
            raise DataError(
                f"the state is a {type(state).__name__}, of another model or cache: begin with one from init_state"
            )
        documents = self._documents(x, state, segment_ids, shared)
        qk, v = self._project(x)
        late = state is not None and self.rotary is not None and self.rotary.grows
        if self.rotary is not None and not late:
            qk = self.rotary(qk, self._positions(x, state), self._lengths(x, documents))
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        if state is not None:
            k, v = self._with_cache(state, k, v)  # (B, S + T, G, K)
        seen = k
        if late:
            q, seen = self._rotate_late(x, q, k, state, documents)
        y = self.out_proj(self.attend(x, q, seen, v, documents).flatten(2))  # (B, T, D)
        if state is None or documents.begins is None:
            return y, None
        return y, self._remember(state, k, v, documents.begins)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """What the last T of S + T tokens draw from those that they see.

        Args:
            x: (B, T, D), what queries, keys and values were projected from.
            q: (B, T, H, K).
            k: (B, S + T, G, K).
            v: (B, S + T, G, K).
            documents: What bounds their sight.

        Returns:
            (B, T, H, K).
        """
        raise NotImplementedError

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, H + G, K), values (B, T, G, K)."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        return qk, v

    def _positions(self, x: Tensor, state: Any) -> Tensor:
        """How many tokens were read before each, (T,) or (B, T)."""
        times = torch.arange(x.shape[1], device=x.device)
        return times if state is None else state.position[:, None] + times

    def _lengths(self, x: Tensor, documents: Documents) -> Tensor | None:
        """The length so far of each token's document, (1,) or (B, T), where the rotation needs it."""
        if self.rotary is None or not self.rotary.grows:
            return None
        ends = torch.tensor([x.shape[1]], device=x.device) if documents.ends is None else documents.ends
        return ends if documents.begins is None else ends - documents.begins

    def _rotate_late(self, x: Tensor, q: Tensor, k: Tensor, state: Any, documents: Documents) -> tuple[Tensor, Tensor]:
        """Queries and all keys rotated for the lengths that documents have now."""
        lengths, positions = self._lengths(x, documents), self._positions(x, state)
        assert self.rotary is not None
        assert lengths is not None
        # What is cached and still seen is of the document that goes on.
        cached = self._cached_positions(state)
        of_cached = lengths[:, :1].expand_as(cached)
        q = self.rotary(q, positions, lengths)
        return q, self.rotary(k, torch.cat((cached, positions), dim=1), torch.cat((of_cached, lengths), dim=1))

    def _cached_positions(self, state: Any) -> Tensor:
        """Positions of the cached keys that `_with_cache` puts in front, (B, S)."""
        held = state.k.shape[1]
        return state.position[:, None] - held + torch.arange(held, device=state.k.device)

    def _documents(self, x: Tensor, state: Any, segment_ids: Tensor | None, shared: dict[str, Any] | None) -> Documents:
        begins = None if segment_ids is None else document_begins(segment_ids)
        if state is not None:
            before = (state.start - state.position)[:, None].expand(x.shape[:2])
            begins = before if begins is None else torch.where(begins == 0, before, begins)
        ends = None if segment_ids is None else document_ends(segment_ids)
        return Documents(begins, ends, None if shared is None else shared.get("global_tokens"))

    def _with_cache(self, state: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((state.k, k), dim=1), torch.cat((state.v, v), dim=1)

    def _remember(self, state: Any, k: Tensor, v: Tensor, begins: Tensor) -> Any:
        """The next state, from keys and values old and new."""
        forget = 0 if self.span is None else max(0, k.shape[1] - self.span)
        if forget:  # a copy, so that the memory of forgotten keys is given back
            k, v = k[:, forget:].clone(), v[:, forget:].clone()
        return KVCache(k, v, state.position + begins.shape[1], state.position + begins[:, -1])

    span: int | None = None
    """How many keys back from the next token are kept; None: all."""

    block = 1
    """Tokens of a document that are seen or not seen together, the first ones, the next ones and so on."""

    def is_global(self, place: Tensor, size: Tensor) -> Tensor:
        """Which tokens all of their document see (and which, if not causal, see all of it), for pictures.

        Args:
            place: Of each token in its document, integers of any shape.
            size: Tokens of that document.

        Returns:
            bool.
        """
        return torch.zeros_like(place, dtype=torch.bool)

    def is_near(self, query: Tensor, key: Tensor, size: Tensor) -> Tensor:
        """Which keys a query would see in its window if it saw them, for pictures; arguments as in `is_global`."""
        return torch.ones_like(query + key, dtype=torch.bool)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """An empty cache."""
        shape = (batch_size, 0, self.n_kv_heads, self.head_dim)
        return KVCache(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch_size, device=device, dtype=torch.int64),
            torch.zeros(batch_size, device=device, dtype=torch.int64),
        )

    def reset_state(self, state: Any, rows: Tensor) -> Any:
        """Starts a new document in those rows: what is cached stays, and is no longer seen."""
        return state._replace(start=torch.where(rows, state.position, state.start))

    def trim_state(self, state: Any) -> Any:
        """Without the keys that lie before the document of every row; looks at numbers, for which a GPU waits."""
        forget = state.k.shape[1] - int((state.position - state.start).max())
        if forget <= 0:
            return state
        return state._replace(k=state.k[:, forget:].clone(), v=state.v[:, forget:].clone())

    def flops(self, seq_len: int) -> int:
        """Two projections, and two products for each key that a query sees."""
        projections = self.qkv_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * seq_len * projections + 4 * self.pairs(seq_len) * self.head_dim

    def pairs(self, seq_len: int) -> int:
        """How many pairs of a query and a key that it sees there are in one sequence, over all query heads."""
        raise NotImplementedError

    def state_size(self, seq_len: int) -> int:
        """Keys and values of all tokens, or of the last ones, and two counters."""
        keys = seq_len if self.span is None else min(seq_len, self.span)
        return 2 * keys * self.n_kv_heads * self.head_dim + 2


def window_pattern(
    length: int,
    cached: int,
    documents: Documents,
    *,
    left: int | None,
    right: int | None,
    device: torch.device,
) -> Pattern:
    """A query sees `left` tokens before it, itself and `right` after it, as far as its document goes.

    Args:
        length: T.
        cached: Keys before the first query.
        documents: What bounds their sight.
        left: None: all before it.
        right: None: all after it.
        device: Of the pattern.
    """
    times = torch.arange(length, device=device)[None]  # (1, T)
    lo = torch.full_like(times, -cached) if left is None else times - left
    hi = torch.full_like(times, length) if right is None else times + right + 1
    if documents.begins is not None:
        lo = torch.maximum(lo, documents.begins)
    hi = hi.clamp(max=length) if documents.ends is None else torch.minimum(hi, documents.ends)
    return Pattern((lo + cached).clamp(min=0), hi + cached)
