"""Reading few blocks of a long text: those whose landmarks a token's query likes best (arXiv 2305.16300, section 3.3).

A query that has n blocks before its own, of which it may read k < n, stands in slot k + 1 of N places each, whatever
n is: the k last blocks are scored in slots 1 to k and all older ones in slot 0, and those that were chosen stand in the
order of their age in slots 0 to k - 1, from the first of the last blocks on one slot further. So no distance is ever
longer than k + 2 blocks. With n <= k blocks before it nothing is chosen, and block m stands in slot m, as in training.

This holds for each token by itself, so that it does not matter in which pieces a text is read.

Letters: B batch, S slots of a call, T those of a part of it, l block size, N = l + 1, C blocks, k blocks read, H query
heads, G key/value heads, U = H / G, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.settings import Settings, setting

if TYPE_CHECKING:
    from zoo.layers.rotary import Rotary

AGING = 2.0**-16
"""What a landmark's logit loses with each block that is younger, so that the youngest of equals is read.

In the first layer all landmarks are equal, and those in slot 0 stand alike. Rounding must not choose among them, or it
would matter in which pieces a text is read. Of 1,000 blocks the oldest loses 0.015.
"""

NUMBERS = 1 << 22
"""Numbers of the largest tensor while a part of the queries is worked on, wherever one query has fewer."""


@dataclass(kw_only=True)
class Retrieval(Settings):
    """Which blocks are read where no gradients are asked for; in training always all."""

    top_k: int | None = setting(
        None, "blocks that a token reads beside its own, without gradients; null: all", minimum=1
    )
    retrieval: str = setting(
        "head", "who chooses them: each head, or each token by the largest share of any head", choices=("head", "token")
    )
    memory_device: str | None = setting(
        None,
        "where keys and values of whole blocks are kept: cpu (main memory), or null: with the model",
        choices=("cpu",),
    )


@dataclass
class Blocks:
    """The blocks of a call, and who may choose which.

    Attributes:
        landmarks: (B, C, G, K): keys of the landmarks, rotated by their place in their block.
        k: (B, C, l, G, K), likewise, on any device.
        v: (B, C, l, G, K), on that device.
        own: (B, S): the block in which each query stands; where it is not whole yet, C or beyond.
        before: (B, S): how many blocks of its document are before that; they stand right before it.
    """

    landmarks: Tensor
    k: Tensor
    v: Tensor
    own: Tensor
    before: Tensor

    def part(self, start: int, stop: int) -> Blocks:
        """For some of the queries."""
        spans = (x[:, start:stop] for x in (self.own, self.before))
        return Blocks(self.landmarks, self.k, self.v, *spans)


def moved(x: Tensor, distance: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotates x (B, T, H, K) on by a distance; the factor of a scaling is in what is rotated already."""
    if rotary is None:
        return x
    factor = rotary.angles(torch.zeros(1, dtype=torch.int64), None, torch.float64)[0][0, 0].item()  # cosine of nothing
    x = rotary(x, distance)
    return x if factor == 1 else x / factor


def retrieve(
    q: Tensor, blocks: Blocks, settings: Retrieval, rotary: Rotary | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws from the blocks that queries choose.

    Args:
        q: (B, S, H, K), rotated by their places in their blocks.
        blocks: To choose from, C >= 1.
        settings: `top_k` is not None.
        rotary: What rotates.
        scale: Of the logits.

    Returns:
        What was drawn, (B, S, H, K); the log-sum-exp of the chosen landmarks' logits, (B, S, H), -inf where none was;
        and which, (B, S, H, k), numbers in the document in order, -1 behind the last.
    """
    n_batch, n_queries, n_heads, width = q.shape
    assert settings.top_k is not None
    count = min(settings.top_k, blocks.k.shape[1])
    each = n_batch * n_heads * max(count * (blocks.k.shape[2] + 1) * width, blocks.k.shape[1])
    step = max(1, NUMBERS // each)
    parts = []
    for start in range(0, n_queries, step):
        stop = min(start + step, n_queries)
        with torch.autocast(q.device.type, enabled=False):
            parts.append(_Part(q[:, start:stop], blocks.part(start, stop), settings, rotary, scale).read())
    drawn, lse, chosen = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return drawn, lse, chosen


class _Part:
    def __init__(self, q: Tensor, blocks: Blocks, settings: Retrieval, rotary: Rotary | None, scale: float) -> None:
        self.dtype = state_dtype(q)
        self.q, self.blocks, self.rotary = q.to(self.dtype), blocks, rotary
        self.settings, self.scale = settings, scale
        self.size = blocks.k.shape[2] + 1
        assert settings.top_k is not None
        self.count = min(settings.top_k, blocks.k.shape[1])
        self.few = blocks.before.clamp(max=settings.top_k)  # (B, T): min(n, k)
        self.skips = (blocks.before > settings.top_k).long()  # (B, T): 1 where there are more blocks than are read
        self.slot = self.few + self.skips  # (B, T): of the query

    def moved(self, x: Tensor, slots: Tensor) -> Tensor:
        return moved(x, slots * self.size, self.rotary)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `retrieve`."""
        scores = self.scores()
        if self.settings.retrieval == "token":
            # all heads of a token choose alike; logarithms, so that small shares stay in order
            scores = scores.log_softmax(-1).amax(2, keepdim=True).expand_as(scores)
        best = scores.topk(self.count, dim=-1)
        n_blocks = scores.shape[-1]
        chosen = torch.where(best.values > -torch.inf, best.indices, n_blocks)
        chosen = chosen.sort(dim=-1).values  # (B, T, H, k), by age
        there = chosen < n_blocks
        numbers = chosen - (self.blocks.own - self.blocks.before)[..., None, None]  # in the document
        first_near = (self.blocks.before - self.few)[..., None, None]
        slots = torch.arange(self.count, device=chosen.device) + self.skips[..., None, None] * (numbers >= first_near)
        drawn, lse = self.draw(chosen.clamp(max=n_blocks - 1), there, slots)
        return drawn, lse, numbers.masked_fill(~there, -1)

    def scores(self) -> Tensor:
        """Of all landmarks with all queries, (B, T, H, C); -inf for those that a query may not choose."""
        blocks = self.blocks
        landmarks = blocks.landmarks.to(self.dtype)
        n_blocks, device = landmarks.shape[1], landmarks.device
        q = self.moved(self.q, self.slot).unflatten(2, (landmarks.shape[2], -1))
        scores = torch.einsum("btguk,bcgk->btguc", q, landmarks).flatten(2, 3)

        # The last min(n, k) blocks stand elsewhere.
        near = torch.arange(self.count, device=device)
        index = (blocks.own - self.few)[..., None] + near  # (B, T, k)
        index = torch.where(near < self.few[..., None], index, n_blocks)  # one column too many takes what is not there
        rows = torch.arange(len(q), device=device)[:, None, None]
        own = landmarks[rows, index.clamp(max=n_blocks - 1)]  # (B, T, k, G, K)
        slots = near + self.skips[..., None]  # (B, T, k)
        own = self.moved(own.flatten(1, 2), slots.flatten(1, 2)).view_as(own)
        near_scores = torch.einsum("btguk,btjgk->btguj", q, own).flatten(2, 3)
        scores = torch.cat((scores, scores[..., :1]), -1)
        scores = scores.scatter(3, index[:, :, None].expand_as(near_scores), near_scores)[..., :-1]

        age = blocks.own[..., None] - torch.arange(n_blocks, device=device)  # (B, T, C)
        free = (age >= 1) & (age <= blocks.before[..., None])
        scores = scores * self.scale - AGING * age[:, :, None]
        return scores.masked_fill(~free[:, :, None], -torch.inf)

    def draw(self, chosen: Tensor, there: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Attends to chosen blocks (B, T, H, k) that stand in those slots; see `retrieve`."""
        blocks, device = self.blocks, self.q.device
        n_shared = chosen.shape[2] // blocks.landmarks.shape[2]
        rows = torch.arange(len(chosen), device=device)[:, None, None, None]
        heads = (torch.arange(chosen.shape[2], device=device) // n_shared)[:, None]
        landmarks = blocks.landmarks[rows, chosen, heads].to(self.dtype)  # (B, T, H, k, K)
        held = blocks.k.device
        at = (rows.to(held), chosen.to(held), slice(None), heads.to(held))
        k, v = (x[at].to(device, self.dtype) for x in (blocks.k, blocks.v))  # (B, T, H, k, l, K)
        # Not the keys, of which there are many, but the queries are moved, by as far as they stand behind each block.
        q = self.q[..., None, :].expand(*chosen.shape, -1)
        away = self.slot[..., None, None] - slots
        q = self.moved(q.flatten(2, 3), away.flatten(2, 3)).view(q.shape)
        outer = (q * landmarks).sum(-1) * self.scale
        outer = outer.masked_fill(~there, -torch.inf)  # (B, T, H, k)
        lse = outer.logsumexp(-1)
        inner = (torch.einsum("bthjk,bthjnk->bthjn", q, k) * self.scale).softmax(-1)
        weights = (outer - lse.clamp(min=torch.finfo(self.dtype).min)[..., None]).exp()
        return torch.einsum("bthjn,bthjnk->bthk", inner * weights[..., None], v), lse
