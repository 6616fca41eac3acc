"""Transformer-XL: segments with a memory of the segments before (Dai et al. 2019, arXiv 1901.02860).

The memory of a layer is what its attention read in older segments, its normalised inputs, and no gradient goes to them:
nothing in it depends on what the layer computes. So all segments of a sequence are computed at once.

Letters: B batch, T time, D d_model, H heads, K head width, N segments or parts of one (tiles), Q queries of a tile,
L = N Q, R tokens that the state holds, M slots of memory of all tiles, S distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.documents import document_begins, document_ends
from zoo.kernels import Segments, linear, relative_attention, relative_attention_flops
from zoo.layers.attention import Documents, HeadsConfig
from zoo.layers.linear import Linear
from zoo.layers.relative import project_twice, relative_positions, sinusoids
from zoo.layers.tiles import tile_documents, whole_document
from zoo.mixer import Mixer, no_weight_decay
from zoo.registry import register
from zoo.settings import setting

LONGEST = 2**20
"""Largest segment and memory: their inputs are the state."""


@dataclass(kw_only=True)
class TransformerXLConfig(HeadsConfig):
    """Settings of Transformer-XL."""

    segment: int = setting(
        128, "tokens of a segment, counted from the beginning of each document", minimum=1, maximum=LONGEST
    )
    memory: int = setting(
        128, "last tokens before the segment that it sees, without a gradient to them", minimum=0, maximum=LONGEST
    )


class TransformerXLState(NamedTuple):
    """What a layer carries from token to token."""

    recent: Tensor
    """(B, R, D): inputs of the last tokens, the newest last: the memory, and the segment so far."""
    position: Tensor
    """(B,) int64: how many tokens of the document were read."""


class Past(NamedTuple):
    """What is left of tokens older than the memory."""

    slots: Tensor
    """(B, some, D), the newest last."""
    starts: Tensor
    """(B|1, N) int64: first slot that each tile sees."""
    lengths: Tensor
    """(B|1, N) int64: how many of them."""


class Tiles(NamedTuple):
    """Where segments lie. Places are indices into what the state holds and the new tokens after it."""

    first: Tensor
    """(B|1, N) int64: where the tile's document begins; negative where that is longer ago than the state holds."""
    last: Tensor
    """(B|1, N) int64: one past the document's last token that is known."""
    row: Tensor
    """(B|1, N) int64: which segment of its document the tile lies in."""
    begin: Tensor
    """(B|1, N) int64: where that segment begins."""
    head: Tensor
    """(B|1, N) int64: where the tile's first query stands."""
    counts: Tensor
    """(B|1, N) int64: how many queries it has; 0 where a row has fewer tiles."""
    queries: Tensor | None
    """(B, L) int64: time of each place among the tiles; None: as they come, the last tile filled up with zeros."""
    places: Tensor | None
    """(B, T) int64: place of each token among the tiles."""
    width: int
    """Q."""

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) by tile, (B, N, Q, D)."""
        if self.queries is None:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % self.width))
        else:
            x = x.gather(1, self.queries[..., None].expand(-1, -1, x.shape[2]))
        return x.unflatten(1, (-1, self.width))

    def joined(self, x: Tensor, length: int) -> Tensor:
        """The inverse of `split`."""
        x = x.flatten(1, 2)
        if self.places is None:
            return x[:, :length]
        return x.gather(1, self.places[..., None].expand(-1, -1, x.shape[2]))


@register("transformer_xl", config=TransformerXLConfig)
class TransformerXL(Mixer):
    """Transformer-XL: attention to the segment and to a memory of those before, by relative positions."""

    shares = True

    @classmethod
    def sublayers(cls, config: Any, layer: int) -> list[Mixer]:
        """Attention, then the feed-forward."""
        return [cls(config, layer), config.make_feed_forward(layer)]

    def __init__(self, config: TransformerXLConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer = layer
        self.d_model, self.n_heads = config.d_model, config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.segment, self.memory = config.segment, config.memory
        self.backend = config.backend
        self.qkv_proj = Linear(config.d_model, 3 * config.d_model, bias=config.bias)  # queries, keys, values
        self.position_proj = Linear(config.d_model, config.d_model, bias=False)  # of what stands for a distance
        self.out_proj = Linear(config.d_model, config.d_model, bias=config.bias)
        self.content_bias = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        no_weight_decay(self.content_bias, self.position_bias)
        nn.init.normal_(self.qkv_proj.weight, std=0.02)
        nn.init.normal_(self.position_proj.weight, std=0.02)
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
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`.

        `Model.diagnose` gets "memory_mass/<layer>", (B, H, 3): the shares of each row's attention, mean over its
        tokens, that go to the compressed memory, to the memory and to the segment itself.
        """
        begins = self._begins(x, state, segment_ids)
        tiles = self._tiles(x, state, segment_ids, begins)
        shared = {} if shared is None else shared
        past = self._compress(x, state, tiles, shared)
        few = state is not None and x.shape[1] * self.n_heads < self.d_model
        inputs = self._folded(x, state, tiles, past) if few else self._projected(x, state, tiles, past)
        segments = self._segments(x, state, tiles, past)
        y, lse = self._call(inputs, segments)
        if "diagnostics" in shared:
            shared["diagnostics"][f"memory_mass/{self.layer}"] = self._mass(inputs, segments, lse)
        if few:
            value, bias = self._heads_of(2)
            y = torch.einsum("bnqhd,hkd->bnqhk", y, value)
            y = y if bias is None else y + bias
        y = self.out_proj(tiles.joined(y.flatten(3), x.shape[1]))
        return y, None if state is None or begins is None else self._next_state(x, state, begins, tiles, past)

    def _begins(self, x: Tensor, state: Any, segment_ids: Tensor | None) -> Tensor | None:
        """Time at which the document of each token begins, (B, T); None: all tokens are of one, with the first."""
        begins = None if segment_ids is None else document_begins(segment_ids)
        if state is None:
            return begins
        before = -state.position[:, None].expand(x.shape[:2])
        return before if begins is None else torch.where(begins == 0, before, begins)

    def _tiles(self, x: Tensor, state: Any, segment_ids: Tensor | None, begins: Tensor | None) -> Tiles:
        length, held = x.shape[1], 0 if state is None else state.recent.shape[1]
        if begins is None:
            laid = whole_document(length, self.segment, x.device)
            head = laid.row * self.segment
            counts = (length - head).clamp(max=self.segment)
            return Tiles(laid.first, laid.last, laid.row, head, head, counts, None, None, laid.tile)
        ends = None if segment_ids is None else document_ends(segment_ids)
        laid, places = tile_documents(Documents(begins, ends), held, length, self.segment)
        counts = (laid.at >= 0).unflatten(1, (-1, laid.tile)).sum(-1)
        begin, head = laid.first + laid.row * self.segment, laid.at[:, :: laid.tile]
        queries = (laid.at - held).clamp(min=0)
        return Tiles(laid.first, laid.last, laid.row, begin, head, counts, queries, places, laid.tile)

    def _compress(self, x: Tensor, state: Any, tiles: Tiles, shared: dict[str, Any]) -> Past | None:
        """What is left of tokens older than the memory; nothing here."""
        return None

    def _past(self, slots: Tensor, held: int, tiles: Tiles) -> Past | None:
        """Which of those slots, the first `held` of which are the state's, each tile sees."""
        return None

    def _segments(self, x: Tensor, state: Any, tiles: Tiles, past: Past | None) -> Segments:
        """What each tile sees of the slots that `_memory` lists: compressed ones, memory, its segment before it."""
        none = torch.zeros_like(tiles.begin)
        memory = torch.maximum(tiles.first, tiles.begin - self.memory)
        behind = x.shape[1]  # the new tokens, and what the state holds before them
        part = none if state is None else tiles.begin + behind + self.segment - 1
        if state is not None:
            behind += state.recent.shape[1] + self.segment - 1
        compressed = (none, none) if past is None else (past.starts + behind, past.lengths)
        starts = torch.stack((compressed[0], memory, part), dim=-1)
        lengths = torch.stack((compressed[1], tiles.begin - memory, tiles.head - tiles.begin), dim=-1)
        return Segments(starts, lengths * (tiles.counts[..., None] > 0), tiles.counts)

    def _memory(self, x: Tensor, state: Any, past: Past | None) -> list[tuple[Tensor, bool]]:
        """Slots of inputs, (B, some, D) each, and whether a gradient goes to them: as part of a segment alone."""
        slots = [(x, False)]
        if state is not None:
            kept = state.recent.shape[1] - self.segment + 1
            slots = [(state.recent, False), *slots, (state.recent[:, kept:], True)]
        return slots if past is None else [*slots, (past.slots, False)]

    def _projected(self, x: Tensor, state: Any, tiles: Tiles, past: Past | None) -> tuple[Tensor, ...]:
        """Queries, keys, values and positions: what `relative_attention` takes, in heads of width K."""
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        own, past_kv = project_twice(x, weight, bias, 2 * self.d_model)
        q, k, v = tiles.split(own).unflatten(-1, (3, self.n_heads, -1)).unbind(3)  # (B, N, Q, H, K)
        kept_weight, kept_bias = weight[self.d_model :], None if bias is None else bias[self.d_model :]
        parts = [
            past_kv if slots is x else linear(slots if taught else slots.detach(), kept_weight, kept_bias)
            for slots, taught in self._memory(x, state, past)
        ]
        memory = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (B, M, 2 D)
        memory_k, memory_v = memory.unflatten(-1, (2, self.n_heads, -1)).unbind(2)
        r = relative_positions(self.position_proj.weight, self._distances(x, state)).unflatten(-1, (self.n_heads, -1))
        return (
            q + self.content_bias.to(q.dtype),
            q + self.position_bias.to(q.dtype),
            k,
            v,
            memory_k,
            memory_v,
            r.to(q.dtype),
        )

    def _folded(self, x: Tensor, state: Any, tiles: Tiles, past: Past | None) -> tuple[Tensor, ...]:
        """The same for few queries: they are projected to what keys come from, one head of width D for all of them.

        (W_q x) . (W_k h) = (W_k^T W_q x) . h, and the mean of values is the value of the mean. Biases of keys change
        all logits of a query alike, so that none is needed.
        """
        weight, bias = self._heads_of(0)
        q = torch.einsum("bnqd,hkd->bnqhk", tiles.split(x), weight)
        q = q if bias is None else q + bias
        content = torch.einsum("bnqhk,hkd->bnqhd", q + self.content_bias.to(q.dtype), self._heads_of(1)[0])
        weight = self.position_proj.weight.unflatten(0, (self.n_heads, -1))
        position = torch.einsum("bnqhk,hkd->bnqhd", q + self.position_bias.to(q.dtype), weight)
        own = tiles.split(x)[:, :, :, None]
        parts = [slots if taught else slots.detach() for slots, taught in self._memory(x, state, past)]
        memory = torch.cat(parts, dim=1)[:, :, None]  # (B, M, 1, D)
        r = sinusoids(self._distances(x, state), self.d_model, device=x.device, dtype=x.dtype)[:, None]
        return content, position, own, own, memory, memory, r

    def _heads_of(self, part: int) -> tuple[Tensor, Tensor | None]:
        """The weights, (H, K, D), and biases, (H, K), of queries, keys or values."""
        shape = (3, self.n_heads, self.head_dim)
        bias = self.qkv_proj.bias
        return self.qkv_proj.weight.unflatten(0, shape)[part], None if bias is None else bias.unflatten(0, shape)[part]

    @property
    def reach(self) -> int:
        """The most slots that a query sees, itself included."""
        return self.memory + self.segment

    def _distances(self, x: Tensor, state: Any) -> int:
        """How many distances may occur."""
        # Without a state there are no more slots than tokens.
        return self.reach if state is not None else min(self.reach, x.shape[1])

    def _mass(self, inputs: tuple[Tensor, ...], segments: Segments, lse: Tensor) -> Tensor:
        """See `forward`."""
        there = lse > -torch.inf  # (B, N, Q, H)
        shares = []  # of the memory and the segment, then of the segment alone, (B, H) each
        for seen in ((0, 1, 1), (0, 0, 1)):
            fewer = segments._replace(lengths=segments.lengths * torch.tensor(seen, device=lse.device))
            _, part = self._call(inputs, fewer)
            shares.append(torch.where(there, (part - lse).exp(), 0.0).sum((1, 2)) / there.sum((1, 2)))
        return torch.stack((1 - shares[0], shares[0] - shares[1], shares[1]), dim=-1)

    def _call(self, inputs: tuple[Tensor, ...], segments: Segments) -> tuple[Tensor, Tensor]:
        q, p, k, v, memory_k, memory_v, r = inputs
        scale = self.head_dim**-0.5
        return relative_attention(q, p, k, v, memory_k, memory_v, r, segments, scale=scale, backend=self.backend)

    def _next_state(self, x: Tensor, state: Any, begins: Tensor, tiles: Tiles, past: Past | None) -> Any:
        return TransformerXLState(self._recent(x, state), x.shape[1] - begins[:, -1])

    def _recent(self, x: Tensor, state: Any) -> Tensor:
        return torch.cat((state.recent, x), dim=1)[:, x.shape[1] :].clone()  # a view would keep all of it

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """No token before."""
        recent = torch.zeros(batch_size, self.memory + self.segment - 1, self.d_model, device=device, dtype=dtype)
        return TransformerXLState(recent, torch.zeros(batch_size, device=device, dtype=torch.int64))

    def flops(self, seq_len: int) -> int:
        """Four projections, and three products for each slot that a query sees."""
        x = torch.empty(1, seq_len, 0)
        tiles = self._tiles(x, None, None, None)
        segments = self._segments(x, None, tiles, self._past(x, 0, tiles))
        projections = self.qkv_proj.weight.numel() + self.out_proj.weight.numel()
        attention = relative_attention_flops(segments, 1, self.n_heads, self.head_dim)
        return 2 * seq_len * projections + attention

    def state_size(self, seq_len: int) -> int:
        """Inputs of the memory and of a segment, and a counter, whatever the length."""
        return (self.memory + self.segment - 1) * self.d_model + 1
