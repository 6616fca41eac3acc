"""Compressive Transformer: what leaves the memory is kept, compressed (Rae et al. 2019, arXiv 1911.05507).

At the end of each segment the oldest tokens of the memory, as many as it has too many, are evicted: each c of them
become one slot of the compressed memory. Evictions depend on the inputs alone, so they too are computed at once.

Letters: B batch, T time, D d_model, H heads, K head width, N tiles, E evictions, s tokens of a segment, S = C c slots
of old memories (those evicted at the end of a segment, and zeros in front), C compressed ones, c rate, M compressed
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.architectures.transformer_xl import LONGEST, Past, Tiles, TransformerXL, TransformerXLConfig
from zoo.kernels import Pattern, linear, sparse_attention
from zoo.layers.compression import COMPRESSIONS, LEARNT, make_compression, most_used
from zoo.layers.linear import Linear
from zoo.layers.relative import relative_positions
from zoo.mixer import add_loss, taught_apart
from zoo.registry import register
from zoo.settings import setting


@dataclass(kw_only=True)
class CompressiveConfig(TransformerXLConfig):
    """Settings of the Compressive Transformer."""

    compressed_memory: int = setting(
        128, "compressed slots before the memory that a segment sees", minimum=1, maximum=LONGEST
    )
    rate: int = setting(4, "tokens that become one slot", minimum=1, maximum=LONGEST)
    compression: str = setting("mean", "how: conv and dilated are learnt, by `loss` alone", choices=COMPRESSIONS)
    loss: str | None = setting(
        None,
        "what compressions learn by: attention to them like that to what they stand for, or its reconstruction by a "
        "decoder; null: reconstruction where the compression learns, else none",
        choices=("reconstruction", "autoencoding", "none"),
    )

    @property
    def loss_name(self) -> str | None:
        """The auxiliary loss, if there is one."""
        chosen = self.loss or ("reconstruction" if self.compression in LEARNT else "none")
        return None if chosen == "none" else chosen


class CompressiveState(NamedTuple):
    """What a layer carries from token to token."""

    recent: Tensor
    """(B, R, D): inputs of the last tokens, the newest last: the memory, and the segment so far."""
    compressed: Tensor
    """(B, M, D): the compressed memory, the newest last."""
    position: Tensor
    """(B,) int64: how many tokens of the document were read."""


class Evictions(NamedTuple):
    """Ends of segments at which tokens leave the memory. Places are those of `Tiles`."""

    rows: Tensor
    """(E,) int64: row of the batch."""
    tiles: Tensor
    """(E,) int64: number of the tile that ends the segment."""
    begin: Tensor
    """(E,) int64: where the segment begins."""
    first: Tensor
    """(E,) int64: where its document begins."""

    def take(self, inputs: Tensor, offset: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs, (B, some, D), from `offset` tokens after the segment's beginning on: (E, count, D).

        Those before the document's beginning are zeros; (E, count) bool says which are not.
        """
        places = self.begin[:, None] + torch.arange(offset, offset + count, device=inputs.device)
        there = places >= self.first[:, None]
        return inputs[self.rows[:, None], places.clamp(min=0)] * there[..., None], there


@register("compressive", config=CompressiveConfig)
class Compressive(TransformerXL):
    """Compressive Transformer: Transformer-XL with a second memory, of what leaves the first one, compressed."""

    def __init__(self, config: CompressiveConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.n_compressed, self.rate, self.loss = config.compressed_memory, config.rate, config.loss_name
        self.n_made = -(-config.segment // config.rate)  # C
        self.n_old = self.n_made * config.rate  # S
        # The first eviction of a document comes at the end of this segment, and may be a short one.
        self.first_eviction = config.memory // config.segment
        short = (self.first_eviction + 1) * config.segment - config.memory
        self.n_lacking = self.n_made - -(-short // config.rate)
        self.compression = make_compression(config.compression, config.d_model, config.rate)
        self.decoder = None
        if self.loss == "autoencoding":
            self.decoder = Linear(config.d_model, config.rate * config.d_model, bias=False)
        taught_apart(*self._learning())

    @property
    def reach(self) -> int:
        """The most slots that a query sees, itself included."""
        return self.memory + self.segment + self.n_compressed  # not through super(), which torch.compile cannot follow

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        segment_ids: Tensor | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Any]:
        """Maps (B, T, D) to (B, T, D); see `TransformerXL.forward`.

        The auxiliary loss goes to `shared["losses"]` under its name: the mean over the evictions of this call, each the
        Frobenius norm of a difference. It teaches the compression alone, and nothing else does.
        """
        y, next_state = super().forward(x, state, segment_ids, shared)
        if torch.is_grad_enabled():  # a gradient of zero, or training in parallel would wait for one
            y = y + sum(p.flatten()[:0].sum() for p in self._learning())
        return y, next_state

    def _learning(self) -> list[nn.Parameter]:
        """What the auxiliary loss teaches."""
        parts = [part for part in (self.compression, self.decoder) if part is not None]
        return [p for part in parts for p in part.parameters()]

    def _compress(self, x: Tensor, state: Any, tiles: Tiles, shared: dict[str, Any]) -> Past | None:
        """See `TransformerXL._compress`."""
        wanted = self.loss is not None and "losses" in shared
        inputs = x.detach() if state is None else torch.cat((state.recent, x), dim=1).detach()
        before = inputs[:, :0] if state is None else state.compressed.detach()
        evictions = self._evictions(x, tiles, wanted)
        if not len(evictions.rows):
            if wanted:
                add_loss(shared, str(self.loss), x.new_zeros(()))
            return None if state is None else self._past(before, before.shape[1], tiles)
        old, there = evictions.take(inputs, self.segment - self.memory - self.n_old, self.n_old)
        there &= torch.arange(self.n_old, device=x.device) >= self.n_old - self.segment
        old = old * there[..., None]
        kept = there.unflatten(1, (self.n_made, -1)).any(-1)  # (E, C)
        blocks = evictions.rows, evictions.tiles - self._skipped(tiles)
        new = x.new_zeros(x.shape[0], tiles.row.shape[1] - self._skipped(tiles), self.n_made, self.d_model)
        if self.compression is None:
            for number in range(new.shape[1]):  # what is kept depends on what was kept before
                at = (blocks[1] == number).nonzero()[:, 0]
                past = self._past(torch.cat((before, new.flatten(1, 2)), dim=1), before.shape[1], tiles)
                usage = self._usage(inputs, Evictions(*(part[at] for part in evictions)), past)
                usage = F.pad(usage, (self.n_old - self.segment, 0)).masked_fill(~there[at], -torch.inf)
                chosen = most_used(old[at], usage, kept[at].sum(1), self.n_made)
                new = new.index_put((blocks[0][at], blocks[1][at]), chosen)
            made = new[blocks]
        else:
            made = self.compression(old, kept.repeat_interleave(self.rate, 1)) * kept[..., None]
            new = new.index_put(blocks, made.detach().to(x.dtype))
        if wanted:
            add_loss(shared, str(self.loss), self._loss(inputs, evictions, old, there, made, kept))
        if tiles.queries is None:
            new = new[:, :-1]  # nothing comes after the last tile
        return self._past(torch.cat((before, new.flatten(1, 2)), dim=1), before.shape[1], tiles)

    def _skipped(self, tiles: Tiles) -> int:
        """How many tiles in front have no slots, because nothing is evicted yet."""
        return min(self.first_eviction, tiles.row.shape[1]) if tiles.queries is None else 0

    def _evictions(self, x: Tensor, tiles: Tiles, wanted: bool) -> Evictions:
        """Those that later tiles or the next state see, and, if a loss is wanted, all of this call."""
        if tiles.queries is None:  # sizes that a compiler knows
            last = x.shape[1] // self.segment if wanted else tiles.row.shape[1] - 1
            numbers = torch.arange(self.first_eviction, max(last, self.first_eviction), device=x.device)
            rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(numbers.shape[0])
            numbers = numbers.repeat(x.shape[0])
            return Evictions(rows, numbers, numbers * self.segment, torch.zeros_like(numbers))
        rows, numbers = (self._complete(tiles) & (tiles.row >= self.first_eviction)).nonzero(as_tuple=True)
        return Evictions(rows, numbers, tiles.begin[rows, numbers], tiles.first[rows, numbers])

    def _complete(self, tiles: Tiles) -> Tensor:
        """Which tiles end a segment, (B, N) bool."""
        return (tiles.begin + self.segment <= tiles.last) & (tiles.counts > 0)

    def _past(self, slots: Tensor, held: int, tiles: Tiles) -> Past:
        """See `TransformerXL._past`."""
        count = (tiles.row - self.first_eviction).clamp(min=0) * self.n_made - self.n_lacking
        lengths = count.clamp(min=0, max=self.n_compressed)  # (B|1, N)
        numbers = torch.arange(tiles.row.shape[1], device=slots.device) - self._skipped(tiles)
        return Past(slots, held + numbers * self.n_made - lengths, lengths)

    @torch.no_grad()
    def _usage(self, inputs: Tensor, evictions: Evictions, past: Past) -> Tensor:
        """The attention that each token evicted gets from its last segment, mean over queries and heads, (E, s)."""
        lengths = past.lengths.expand(inputs.shape[0], -1)[evictions.rows, evictions.tiles]
        ends = (past.starts + past.lengths).expand(inputs.shape[0], -1)[evictions.rows, evictions.tiles]
        at = torch.arange(-self.n_compressed, 0, device=inputs.device)
        compressed = past.slots[evictions.rows[:, None], (ends[:, None] + at).clamp(min=0, max=past.slots.shape[1] - 1)]
        tokens, there = evictions.take(inputs, -self.memory, self.memory + self.segment)
        slots = torch.cat((compressed, tokens), dim=1)  # (E, reach, D)
        there = torch.cat((-at <= lengths[:, None], there), dim=1)
        (w_q, b_q), (w_k, b_k), _ = (self._part(part) for part in range(3))
        q = self._heads(linear(tokens[:, self.memory :], w_q, b_q))  # (E, s, H, K)
        k = self._heads(linear(slots, w_k, b_k))
        r = self._heads(relative_positions(self.position_proj.weight, self.reach)).to(q.dtype)
        by_distance = torch.einsum("eqhk,shk->ehqs", q + self.position_bias.to(q.dtype), r)
        own = torch.arange(self.segment, device=inputs.device)
        distances = own[:, None] + self.reach - self.segment - torch.arange(self.reach, device=inputs.device)
        index = distances.clamp(min=0).expand(*by_distance.shape[:2], -1, -1)
        logits = torch.einsum("eqhk,eshk->ehqs", q + self.content_bias.to(q.dtype), k)
        logits = (logits + by_distance.gather(-1, index)) * self.head_dim**-0.5
        shares = logits.masked_fill(~there[:, None, None] | (distances < 0), -torch.inf).softmax(-1)
        return shares.mean((1, 2))[:, self.n_compressed : self.n_compressed + self.segment]

    def _loss(
        self, inputs: Tensor, evictions: Evictions, old: Tensor, there: Tensor, new: Tensor, kept: Tensor
    ) -> Tensor:
        """The auxiliary loss of some evictions: of old slots that are `there` and new ones that are `kept`."""
        if self.decoder is not None:
            difference = (self.decoder(new).unflatten(-1, (self.rate, -1)).flatten(1, 2) - old) * there[..., None]
        else:
            weight, bias = self._part(0)
            queries = self._heads(linear(evictions.take(inputs, 0, self.segment)[0], weight, bias))
            difference = self._content(queries, old, there) - self._content(queries, new, kept)
        return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()

    def _content(self, queries: Tensor, slots: Tensor, there: Tensor) -> Tensor:
        """What queries (E, s, H, K) draw by content alone from the slots that are there: (E, s, H, K)."""
        k, v = (self._heads(linear(slots, *self._part(part))) for part in (1, 2))
        first = (~there).sum(1, keepdim=True).expand(queries.shape[:2])
        pattern = Pattern(first, torch.full_like(first, slots.shape[1]))
        return sparse_attention(queries, k, v, pattern, backend=self.backend)

    def _part(self, part: int) -> tuple[Tensor, Tensor | None]:
        """The weight, (D, D), and bias of queries, keys or values, to which no gradient goes."""
        rows, bias = slice(part * self.d_model, (part + 1) * self.d_model), self.qkv_proj.bias
        return self.qkv_proj.weight[rows].detach(), None if bias is None else bias[rows].detach()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def _next_state(self, x: Tensor, state: Any, begins: Tensor, tiles: Tiles, past: Past | None) -> CompressiveState:
        compressed = state.compressed
        if past is not None and past.slots.shape[1] > self.n_compressed:
            last = (tiles.counts > 0).sum(1, keepdim=True) - 1
            done = last + self._complete(tiles).gather(1, last)  # (B, 1) tiles before the next token's
            at = done * self.n_made + torch.arange(self.n_compressed, device=x.device)
            compressed = past.slots.gather(1, at[..., None].expand(-1, -1, self.d_model))
        return CompressiveState(self._recent(x, state), compressed, x.shape[1] - begins[:, -1])

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> CompressiveState:
        """No token before."""
        recent, position = super().init_state(batch_size, device=device, dtype=dtype)
        compressed = torch.zeros(batch_size, self.n_compressed, self.d_model, device=device, dtype=dtype)
        return CompressiveState(recent, compressed, position)

    def flops(self, seq_len: int) -> int:
        """Those of Transformer-XL, evictions but the last segment's, and keys and values of what they leave."""
        evictions = max(0, -(-seq_len // self.segment) - 1 - self.first_eviction)
        if self.compression is None:
            usage = 2 * (self.segment + self.reach) * self.d_model**2
            usage += 4 * self.segment * self.reach * self.d_model
        else:
            usage = self.compression.flops(self.n_old)
        return super().flops(seq_len) + evictions * (usage + 4 * self.n_made * self.d_model**2)

    def state_size(self, seq_len: int) -> int:
        """Inputs of both memories and of a segment, and a counter, whatever the length."""
        return super().state_size(seq_len) + self.n_compressed * self.d_model
