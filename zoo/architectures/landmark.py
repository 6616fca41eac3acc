"""Landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300): random access to a text of any length.

Behind each block of tokens stands a landmark. A token sees the tokens of other blocks through what it gives to their
landmarks, and so learns to choose blocks; without gradients it may then read the best few of them only.

Letters: B batch, S slots (tokens and landmarks), T tokens, C blocks, J keys, M landmarks among them, H query heads, G
key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.kernels import landmark_attention, landmark_attention_flops
from zoo.kernels.errors import DataError
from zoo.layers.attention import FARTHEST, Attention, AttentionConfig
from zoo.layers.landmark_memory import LandmarkState, as_slots, grown, remaining
from zoo.layers.landmark_retrieval import Blocks, Retrieval, moved, retrieve
from zoo.layers.landmark_tokens import LandmarkTokens, Slots, slots_of, take
from zoo.mixer import Wrapper
from zoo.registry import register
from zoo.settings import setting


@dataclass(kw_only=True)
class LandmarkConfig(AttentionConfig, Retrieval):
    """Settings of landmark attention."""

    block_size: int = setting(32, "tokens of a block, behind which its landmark stands", minimum=1, maximum=FARTHEST)

    local_layers: int = setting(
        0, "first layers that see their own block only: landmarks know nothing of their blocks there yet", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and not self.causal:
            self.fail("top_k", "expected null where causal=false: blocks are chosen from those that were read before")
        rotary = self.make_rotary()
        if rotary is not None and rotary.grows:
            self.fail("rope_scaling", "expected a type that does not depend on the length: top_k keeps distances short")


@register("landmark", config=LandmarkConfig)
class Landmark(Attention):
    """Landmark attention: tokens of other blocks are reached through the landmarks at their ends."""

    shares = True
    state: ClassVar[type] = LandmarkState

    @classmethod
    def make_wrapper(cls, config: LandmarkConfig) -> Wrapper:
        """What inserts the landmarks."""
        return LandmarkTokens(config.d_model, config.block_size, config.causal)

    def __init__(self, config: LandmarkConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.block_size, self.layer = config.block_size, layer
        self.local = layer < config.local_layers
        self.policy: Retrieval | None = config

    def forward(
        self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None, shared: dict[str, Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Maps (B, S, D) to (B, S, D); see `Mixer.forward`.

        Where no gradients are recorded, a token reads `top_k` blocks, in whole sequences and with a state alike. Shows,
        under `Model.diagnose`, `retrieved/<layer>`: the numbers in the document of the blocks that each token read,
        (B, T, H, k), or (B, T, k) where tokens choose, -1 for none; without `top_k` `landmark_weights/<layer>`: what
        it gave to each block of its document before its own, (B, T, H, C).
        """
        if state is not None and (not isinstance(state, LandmarkState) or state.k.shape[2] != self.block_size):
            raise DataError(
                f"the state is a {type(state).__name__}, of another model or block_size: begin with one from init_state"
            )
        slots = slots_of(shared)
        qk, v = self._project(x)
        shows = (shared or {}).get("diagnostics")
        if state is None and not self._retrieves(qk):
            qk = self._rotated(qk, slots.places)
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
            y = self._see_all(q, k, v, slots, slots.places, shows)
            return self.out_proj(y.flatten(2)), None
        size = self.block_size + 1
        qk = self._rotated(qk, slots.places % size)  # blocks may be read at other places than where they stood
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        held = self.init_state(x.shape[0], device=x.device, dtype=k.dtype) if state is None else state
        after = grown(held, k, v, slots, blocks=not self.local)
        if self.local or self._retrieves(qk):
            y = self._read_few(q, after, slots, shows)
        else:
            old_k, old_v, places = as_slots(held, slots)
            seen = torch.cat((old_k, k), dim=1)
            places = torch.cat((places, slots.places), dim=1)
            seen = moved(seen, places // size * size, self.rotary)
            q = moved(q, slots.places // size * size, self.rotary)
            y = self._see_all(q, seen, torch.cat((old_v, v), dim=1), slots, places, shows)
        return self.out_proj(y.flatten(2)), None if state is None else remaining(after, slots)

    def _retrieves(self, qk: Tensor) -> bool:
        chooses = self.policy is not None and self.policy.top_k is not None
        return chooses and not (torch.is_grad_enabled() and qk.requires_grad)

    def _rotated(self, x: Tensor, places: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary(x, places)

    def _see_all(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Slots, places: Tensor, shows: dict[str, Tensor] | None
    ) -> Tensor:
        """Attends to all blocks; keys of places (B, J), of which those of the slots are the last."""
        at, begins, ends = self._sight(slots, k.shape[1] - slots.places.shape[1])
        y, lse = landmark_attention(
            q, k, v, at, begins, ends, block=self.block_size, backend=self.backend, return_lse=True
        )
        if shows is not None and not self.local:
            shows[f"landmark_weights/{self.layer}"] = self._weights(q, k, lse, slots, places)
        return y

    def _sight(self, slots: Slots, before: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Slots.queries`."""
        at, begins, ends = slots.queries(before)
        if self.local:
            size = self.block_size + 1
            begins = begins + slots.places // size * size
            ends = None if ends is None else torch.minimum(ends, begins + size)
        return at, begins, ends

    def _weights(self, q: Tensor, k: Tensor, lse: Tensor, slots: Slots, places: Tensor) -> Tensor:
        """What tokens gave to the landmarks of the blocks of their documents, (B, T, H, C); see `_see_all`."""
        size = self.block_size + 1
        marks = (places >= 0) & (places % size == self.block_size)
        count = marks.cumsum(1)  # (B, J): landmarks of the row so far, M in all
        index = marks.long().sort(dim=1, descending=True, stable=True).indices[:, : max(1, int(count.max()))]
        q, lse, own = take(q, slots.at), take(lse.transpose(1, 2), slots.at), take(slots.places, slots.at) // size
        groups = q.unflatten(2, (self.n_kv_heads, -1))
        logits = torch.einsum("btguk,bmgk->btgum", groups, take(k, index)).flatten(2, 3) * self.head_dim**-0.5
        first = take(count, slots.at + places.shape[1] - slots.places.shape[1]) - own  # (B, T): of the document
        number = torch.arange(int(own.max()) + 1, device=q.device)  # (C,)
        at = (first[..., None] + number).clamp(max=index.shape[1] - 1)[:, :, None]
        weights = (logits.gather(3, at.expand(-1, -1, self.n_heads, -1)) - lse[..., None]).exp()
        return weights.masked_fill((number >= own[..., None])[:, :, None], 0.0)

    def _read_few(self, q: Tensor, state: LandmarkState, slots: Slots, shows: dict[str, Tensor] | None) -> Tensor:
        """Attends to the own block, and to those that are chosen from a state that has grown."""
        size = self.block_size + 1
        places, offsets = slots.places.clamp(min=0), slots.places.clamp(min=0) % size
        own = slots.queries(state.last_k.shape[1] - places.shape[1])[0]  # behind the tokens of the block that went on
        y, lse = landmark_attention(
            q,
            state.last_k,
            state.last_v,
            own,
            (own - offsets).clamp(min=0),
            block=self.block_size,
            backend=self.backend,
            return_lse=True,
        )
        lse = lse.transpose(1, 2)  # (B, S, H)
        chosen = torch.full((*q.shape[:3], 0), -1, device=q.device)
        if state.k.shape[1] and self.policy is not None:
            before = state.k.shape[1] - slots.marks.sum(1).max() + slots.marks.cumsum(1) - slots.marks.long()
            blocks = Blocks(*state[:3], before, places // size)
            drawn, other, chosen = retrieve(q, blocks, self.policy, self.rotary, self.head_dim**-0.5)
            share = torch.sigmoid((other - lse).nan_to_num(-torch.inf))[..., None]  # (B, S, H, 1)
            y = torch.lerp(y, drawn.to(y.dtype), share.to(y.dtype))
        if shows is not None and self.policy is not None and not self.local:
            chosen = take(chosen, slots.at)
            shows[f"retrieved/{self.layer}"] = chosen[:, :, 0] if self.policy.retrieval == "token" else chosen
        return y

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LandmarkState:
        """Nothing read."""
        held = (self.policy.memory_device if self.policy is not None else None) or device
        one = (self.n_kv_heads, self.head_dim)
        shapes = [(0, *one), (0, self.block_size, *one), (0, self.block_size, *one), (0, *one), (0, *one)]
        devices = (device, held, held, device, device)
        return LandmarkState(
            *(torch.zeros(batch_size, *s, device=d, dtype=dtype) for s, d in zip(shapes, devices, strict=True))
        )

    def reset_state(self, state: LandmarkState, rows: Tensor) -> LandmarkState:
        """As it is: the places of the next tokens tell that what was read is of another document."""
        return state

    def trim_state(self, state: LandmarkState) -> LandmarkState:
        """As it is: blocks of other documents leave when a call ends."""
        return state

    def flops(self, seq_len: int) -> int:
        """Two projections, two products for each token that a query sees, and one for each landmark."""
        projections = self.qkv_proj.weight.numel() + self.out_proj.weight.numel()
        slots = torch.arange(seq_len)[None]
        begins = slots // (self.block_size + 1) * (self.block_size + 1) if self.local else slots * 0
        ends = (begins + self.block_size + 1 if self.local else begins + seq_len).clamp(max=seq_len)
        seen_to = None if self.causal else ends
        seen = landmark_attention_flops(slots, begins, seen_to, self.block_size, self.n_heads, self.head_dim)
        return 2 * seq_len * projections + seen

    def state_size(self, seq_len: int) -> int:
        """Keys and values of all tokens, and keys of the landmarks; in a local layer those of the last tokens."""
        if self.local:
            return 2 * (seq_len % (self.block_size + 1)) * self.n_kv_heads * self.head_dim
        marks = seq_len // (self.block_size + 1)
        return (2 * (seq_len - marks) + marks) * self.n_kv_heads * self.head_dim
