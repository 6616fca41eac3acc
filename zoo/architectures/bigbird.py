"""BigBird (Zaheer et al. 2020, arXiv 2007.14062): blocks of queries see a window, global and random blocks of keys.

Letters: B batch, T time, S cached keys, H query heads, G key/value heads, K head width, N tiles of queries (each one
block of a document, or a part of it), L places of queries in all tiles, M blocks that a tile sees beside its window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import sparse_attention
from zoo.kernels.errors import DataError
from zoo.kernels.sparse_attention import Pattern, visible_pairs
from zoo.layers.attention import FARTHEST, Attention, AttentionConfig, Documents
from zoo.layers.random_blocks import draw_distinct, transformers_plan
from zoo.layers.tiles import Queries, tile_documents, whole_document
from zoo.registry import register
from zoo.settings import setting


@dataclass(kw_only=True)
class BigBirdConfig(AttentionConfig):
    """Settings of BigBird."""

    block_size: int = setting(64, "tokens per block", minimum=1, maximum=FARTHEST)
    n_window_blocks: int = setting(
        3, "blocks of the window: the last ones, or around a block if not causal", minimum=1, maximum=FARTHEST
    )
    n_global_blocks: int = setting(
        1, "first blocks that all see (and last ones, if not causal)", minimum=0, maximum=FARTHEST
    )
    n_random_blocks: int = setting(
        3, "random blocks that each block sees, of each head its own", minimum=0, maximum=FARTHEST
    )
    random_seed: int = setting(0, "of the random blocks, which never change", minimum=0)
    plan: str = setting(
        "hash",
        "random blocks by hash, or those of transformers (not causal): other ones in training, in evaluation none, but "
        "the first block so many times more, and everything in sequences of up to 2 n_random_blocks + 5 blocks",
        choices=("hash", "transformers"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal and self.n_window_blocks % 2 == 0:
            self.fail("n_window_blocks", "expected an odd number where causal=false: as many blocks on either side")
        if self.plan == "transformers":
            published = (self.causal, self.n_window_blocks, self.n_global_blocks) == (False, 3, 1)
            if not published or self.max_positions is None or self.max_positions % self.block_size:
                self.fail(
                    "plan",
                    "expected hash, or causal=false, n_window_blocks=3, n_global_blocks=1 and max_positions, a "
                    "multiple of block_size",
                )


@register("bigbird", config=BigBirdConfig)
class BigBird(Attention):
    """BigBird: attention of blocks to a window, to global and to random blocks, then a feed-forward."""

    def __init__(self, config: BigBirdConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.block = config.block_size
        self.n_window = config.n_window_blocks
        self.n_global = config.n_global_blocks
        self.n_random = config.n_random_blocks
        self.seed, self.layer = config.random_seed, layer
        self.max_blocks = (config.max_positions or 0) // self.block if config.plan == "transformers" else None

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """See `Attention.attend`."""
        length, cached = q.shape[1], k.shape[1] - q.shape[1]
        if documents.begins is None:
            pattern = self.pattern(whole_document(length, self.block, q.device), length)
            return sparse_attention(q, k, v, pattern, backend=self.backend)
        if self.max_blocks is not None:
            raise DataError("bigbird with plan=transformers takes no segment_ids: give one document per row, unpadded")
        queries, places = tile_documents(documents, cached, length, self.block)
        source = (queries.at - cached).clamp(min=0)[..., None, None].expand(-1, -1, *q.shape[2:])  # (B, L, H, K)
        y = sparse_attention(q.gather(1, source), k, v, self.pattern(queries, cached + length), backend=self.backend)
        return y.gather(1, places[..., None, None].expand_as(q))

    def pattern(self, queries: Queries, n_keys: int) -> Pattern:
        """Which keys those queries see.

        Args:
            queries: In tiles.
            n_keys: S + T.
        """
        first, last, row, block = queries.first, queries.last, queries.row, self.block
        n_blocks = (last - first + block - 1) // block  # (B|1, N)
        side = self.n_window - 1 if self.causal else self.n_window // 2
        lo = torch.maximum(first + (row - side) * block, first)
        hi = last if self.causal else torch.minimum(first + (row + side + 1) * block, last)
        sees_all = torch.zeros_like(row, dtype=torch.bool)
        if not self.causal:
            sees_all = (row < self.n_global) | (row >= n_blocks - self.n_global)
        counts = None
        if self.max_blocks is None:
            far = self._own_plan(row, n_blocks, side, -(-n_keys // block))  # (B|1, H, N, M)
        else:
            far, counts = self._transformers_plan(int(n_blocks[0, 0]))
            sees_all = sees_all | (n_blocks <= 2 * self.n_random + 5)
            lo, hi = torch.zeros_like(lo), torch.zeros_like(hi)  # all listed, as they may count more than once
        lo, hi = torch.where(sees_all, first, lo), torch.where(sees_all, last, hi)
        far = torch.where((far >= 0) & ~sees_all[:, None, :, None], first[:, None, :, None] + far * block, -1)

        size, tile = queries.at.shape[1], queries.tile
        lo, hi, first, last = (t.repeat_interleave(tile, dim=1)[:, :size] for t in (lo, hi, first, last))
        if self.causal:
            hi = last = queries.at + 1
        empty = queries.at < 0
        lo, hi, first, last = (t.masked_fill(empty, 0).clamp(max=n_keys) for t in (lo, hi, first, last))
        return Pattern(lo, hi, None, far, tile, block, counts, first, last)

    def _own_plan(self, row: Tensor, n_blocks: Tensor, side: int, most: int) -> Tensor:
        """Global and random blocks of each tile, by their number in the document; -1: none. (B|1, H, N, M).

        No document has more than `most` blocks: what is asked for beyond that is not listed.
        """
        # Random blocks are drawn from those before the window and, where not causal, those after it, global ones apart.
        end = row if self.causal else n_blocks - self.n_global
        before = (torch.minimum(row - side, end) - self.n_global).clamp(min=0)  # (B|1, N)
        after_window = (row + side + 1).clamp(min=self.n_global)
        after = torch.zeros_like(row) if self.causal else (end - after_window).clamp(min=0)
        drawn = draw_distinct(row, before + after, self.n_heads, min(self.n_random, most), self.seed, self.layer)
        before, after_window = before[:, None, :, None], after_window[:, None, :, None]
        drawn = torch.where(drawn < before, drawn + self.n_global * (drawn >= 0), drawn - before + after_window)

        numbers = torch.arange(min(self.n_global, most), device=row.device)
        known = numbers.expand(*row.shape, -1)  # (B|1, N, g)
        known = torch.where(known < n_blocks[..., None], known, -1)
        if not self.causal:
            from_end = n_blocks[..., None] - 1 - numbers
            known = torch.cat((known, torch.where(from_end >= self.n_global, from_end, -1)), dim=-1)
        return torch.cat((known[:, None].expand(-1, self.n_heads, -1, -1), drawn), dim=-1)

    def _transformers_plan(self, n_blocks: int) -> tuple[Tensor, Tensor]:
        """All blocks that each tile sees, the window included, and how often each counts; (1, H, N, M) each."""
        rows = torch.arange(n_blocks)
        listed = torch.stack((torch.zeros_like(rows), rows - 1, rows, rows + 1, torch.full_like(rows, n_blocks - 1)), 1)
        again = (listed[:, :, None] == listed[:, None, :]).tril(-1).any(-1)  # counted once
        listed = listed.masked_fill(again | (listed < 0) | (listed >= n_blocks), -1).expand(1, self.n_heads, -1, -1)
        counts = torch.ones_like(listed, dtype=torch.float32)
        if n_blocks <= 2 * self.n_random + 5:
            return listed, counts
        if not self.training:
            counts = F.pad(counts[..., 1:], (1, 0), value=1.0 + self.n_random)
            return listed, counts
        assert self.max_blocks is not None
        drawn = transformers_plan(n_blocks, self.block, self.n_random, self.n_heads, self.layer, self.max_blocks)
        listed = torch.cat((listed, drawn[None]), dim=-1)
        return listed, torch.ones_like(listed, dtype=torch.float32)

    def is_global(self, place: Tensor, size: Tensor) -> Tensor:
        """See `Attention.is_global`."""
        row, n_blocks = place // self.block, (size + self.block - 1) // self.block
        return (row < self.n_global) | ((row >= n_blocks - self.n_global) & (not self.causal))

    def is_near(self, query: Tensor, key: Tensor, size: Tensor) -> Tensor:
        """See `Attention.is_near`."""
        side = self.n_window - 1 if self.causal else self.n_window // 2
        near = (query // self.block - key // self.block).abs() <= side
        if self.max_blocks is None:
            return near
        return near | ((size + self.block - 1) // self.block <= 2 * self.n_random + 5)  # all is seen

    def pairs(self, seq_len: int) -> int:
        """See `Attention.pairs`; counted."""
        pattern = self.pattern(whole_document(seq_len, self.block, torch.device("cpu")), seq_len)
        return visible_pairs(pattern, self.n_heads, seq_len)
