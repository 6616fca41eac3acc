"""Which random blocks a block of BigBird sees: the zoo's own draws, and the plan that `transformers` makes.

Letters: B batch, H heads, N blocks of queries, R random blocks.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from zoo.kernels.errors import DataError

_NONE = 2**40  # sorts behind every block


def draw_distinct(rows: Tensor, available: Tensor, n_heads: int, n_random: int, seed: int, layer: int) -> Tensor:
    """Draws distinct numbers for each block by hashing (seed, layer, head, block, draw).

    No draw depends on another block or on the length, so a prefix, a chunk and one token see what the whole sees.

    Args:
        rows: Number of each block of queries in its document, (B, N) int64.
        available: How many numbers to draw from, (B, N) int64.
        n_heads: H, each with draws of its own.
        n_random: R.
        seed: Of all draws.
        layer: Number of the layer.

    Returns:
        (B, H, N, R) int64 numbers below `available`; -1 where fewer than R are available.
    """
    heads = torch.arange(n_heads, device=rows.device)[:, None]  # (H, 1)
    available = available[:, None].expand(-1, n_heads, -1)  # (B, H, N)
    drawn = rows.new_empty(*available.shape, 0)
    for turn in range(n_random):
        left = available - turn  # numbers not drawn yet, (B, H, N)
        number = _hash(seed, layer, heads, rows[:, None], turn) % left.clamp(min=1)
        for earlier in drawn.unbind(-1):  # ascending: counts the number among those not drawn
            number = number + (number >= earlier)
        number = torch.where(left > 0, number, _NONE)
        drawn = torch.cat((drawn, number[..., None]), dim=-1).sort(dim=-1).values
    return torch.where(drawn < _NONE, drawn, -1)


def _hash(seed: int, *parts: Tensor | int) -> Tensor:
    """Numbers from 0 to 2^31 - 1, by the finalizer of splitmix64 after each part."""
    state = torch.tensor(_signed(seed * 0x9E3779B97F4A7C15))
    for part in parts:
        state = (state.to(part.device) if isinstance(part, Tensor) else state) + part + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shift(state, 31)
    return _shift(state, 33)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # without the sign


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


@functools.lru_cache(maxsize=256)
def transformers_plan(n_blocks: int, block: int, n_random: int, n_heads: int, layer: int, max_blocks: int) -> Tensor:
    """The random blocks of `transformers`' BigBird in training; numpy's legacy generator, seeded with the layer.

    Two plans, as there: one for lengths of 1,024, 3,072 and 4,096 tokens, and one for all others, whose random blocks
    always lie among the first 2 R + 4. Checked against its index tables by the parity test.

    Args:
        n_blocks: Blocks of the sequence, more than 2 R + 5.
        block: Tokens per block.
        n_random: R.
        n_heads: H.
        layer: Number of the layer.
        max_blocks: Blocks in the longest sequence that the model knows.

    Returns:
        (H, N, R) int64; -1 in the first and the last row, which see everything.

    Raises:
        DataError: A block has fewer than R others to draw from; `transformers` fails there too.
    """
    random = np.random.RandomState(layer)
    plan = np.full((n_heads, n_blocks, n_random), -1, dtype=np.int64)
    if n_blocks * block in (1024, 3072, 4096):
        last = 1024 // block - 1 if 2 * block < 1024 else max_blocks - 1
        for head in range(n_heads):
            for row in range(1, max_blocks - 1):
                drawn = random.permutation(_candidates(row, last, max_blocks))[:n_random]
                if len(drawn) < n_random:
                    raise DataError(
                        f"in {n_blocks * block} tokens, transformers finds fewer than {n_random} random blocks of "
                        f"{block}: set n_random_blocks or block_size lower, or plan=hash"
                    )
                if row < n_blocks - 1:
                    plan[head, row] = drawn
        return torch.from_numpy(plan)
    end = 2 * n_random + 5
    for row in range(1, n_blocks):
        taken = {0, end - 1, row - 1, row, row + 1}
        taken |= {end - 2} if row == 1 else {1} if row == end - 2 else set()
        for head in range(n_heads):
            order = random.permutation(end)
            chosen = [number for number in order if number not in taken][:n_random]
            if row < n_blocks - 1:
                plan[head, row] = chosen
    return torch.from_numpy(plan)


def _candidates(row: int, last: int, max_blocks: int) -> np.ndarray:
    """Blocks that a row of the plan for 1,024, 3,072 and 4,096 tokens draws from, in order."""
    blocks = np.arange(1, max_blocks - 1)
    blocks = blocks[blocks <= last]
    if row in (max_blocks - 3, max_blocks - 2) or row - 2 > last:
        return blocks
    before, after = blocks[blocks <= row - 2], blocks[blocks >= row + 2]
    if row <= 2:
        return after
    return before if row + 1 == last else np.concatenate((before, after))
