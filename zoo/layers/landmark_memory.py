"""What landmark attention keeps of a text: whole blocks, their landmarks' keys, and the block that is not whole yet.

Keys are kept rotated by their place in their block alone: where a block is read, it may stand at another place than
where it was written.
Rows may be in documents of different lengths. Blocks and the last tokens then stand at the end of their row, behind
some of an older document or of nothing, and a row's number of them follows from the place of its next token.

Letters: B batch, S slots of a call, l block size, C blocks, R tokens of the block that is not whole, G key/value heads,
K head width, N = l + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.layers.landmark_tokens import Slots, take


class LandmarkState(NamedTuple):
    """Keys and values of a document; `k` and `v` of whole blocks may be on another device than the model."""

    landmarks: Tensor
    """(B, C, G, K): keys of the landmarks."""
    k: Tensor
    """(B, C, l, G, K)."""
    v: Tensor
    """(B, C, l, G, K)."""
    last_k: Tensor
    """(B, R, G, K)."""
    last_v: Tensor
    """(B, R, G, K)."""


def grown(state: LandmarkState, k: Tensor, v: Tensor, slots: Slots, *, blocks: bool = True) -> LandmarkState:
    """The state with new slots: blocks that are whole now behind the others, and all new slots behind the last tokens.

    Args:
        state: What was kept.
        k: (B, S, G, K), rotated by their places in their blocks.
        v: (B, S, G, K).
        slots: What they are.
        blocks: Whether blocks are kept at all.
    """
    block_size = state.k.shape[2]
    before, last_k, last_v = state.last_k.shape[1], torch.cat((state.last_k, k), 1), torch.cat((state.last_v, v), 1)
    new = int(slots.marks.sum(1).max()) if blocks else 0
    if not new:
        return state._replace(last_k=last_k, last_v=last_v)
    n_slots = k.shape[1]
    times = torch.arange(n_slots, device=k.device)
    # Where the landmarks of each row stand, in order; rows with fewer end with anything.
    marks = before + torch.where(slots.marks, times, n_slots - 1).sort(1).values[:, :new]  # (B, new)
    tokens = marks[..., None] - torch.arange(block_size, 0, -1, device=k.device)  # (B, new, l)
    tokens = tokens.clamp(min=0).flatten(1)
    new_k, new_v = (take(x, tokens).unflatten(1, (new, block_size)).to(state.k.device) for x in (last_k, last_v))
    return LandmarkState(
        torch.cat((state.landmarks, take(last_k, marks)), 1),
        torch.cat((state.k, new_k), 1),
        torch.cat((state.v, new_v), 1),
        last_k,
        last_v,
    )


def remaining(state: LandmarkState, slots: Slots) -> LandmarkState:
    """What the next tokens may see of a state that `grown` returned. Looks at numbers, for which a GPU waits."""
    size = state.k.shape[2] + 1
    held = (slots.places >= 0).sum(1)  # (B,)
    lengths = take(slots.places, (held - 1)[:, None])[:, 0] + 1  # of the last documents
    new = slots.marks.sum(1)
    most_new, most_blocks, most_last, same = torch.stack(
        (new.max(), (lengths // size).max(), (lengths % size).max(), (new == new.max()).all().long())
    ).tolist()
    last = state.last_k.shape[1] - slots.places.shape[1] + held - most_last  # (B,) first of the last tokens
    index = (last[:, None] + torch.arange(most_last, device=last.device)).clamp(min=0)
    state = state._replace(last_k=take(state.last_k, index), last_v=take(state.last_v, index))
    extra = state.k.shape[1] - most_blocks
    if not state.k.shape[1] or (same and not extra):
        return state
    if same:  # copies, so that the memory of forgotten blocks is given back
        landmarks, k, v = (x[:, extra:].clone() for x in state[:3])
    else:
        index = (extra - most_new + new)[:, None] + torch.arange(most_blocks, device=new.device)
        index = index.clamp(min=0)
        landmarks = take(state.landmarks, index)
        k, v = (take(x, index.to(x.device)) for x in (state.k, state.v))
    return state._replace(landmarks=landmarks, k=k, v=v)


def as_slots(state: LandmarkState, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a state before it has grown, each row's last token last, and their places in the document.

    Returns:
        (B, C N + R, G, K) twice and (B, C N + R), negative for what is of an older document or nothing.
    """
    device, size = state.last_k.device, state.k.shape[2] + 1
    k = torch.cat((state.k.to(device), state.landmarks[:, :, None]), 2).flatten(1, 2)
    v = F.pad(state.v.to(device), (0, 0, 0, 0, 0, 1)).flatten(1, 2)
    k, v = torch.cat((k, state.last_k), 1), torch.cat((v, state.last_v), 1)
    times = torch.arange(k.shape[1], device=device)
    first = slots.places[:, :1]
    lacking = state.last_k.shape[1] - first % size  # (B, 1) what stands between a row's blocks and its last tokens
    if bool(lacking.any()):
        last = times >= k.shape[1] - first % size
        index = torch.where(last, times, times - lacking).clamp(min=0)
        k, v = take(k, index), take(v, index)
    return k, v, times - k.shape[1] + first
