"""The causal depthwise convolution on any device: K shifted products, which beat a depthwise `conv1d` in this layout.

Shape letters: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def _taps(x: Tensor, taps: int, initial_state: Tensor | None, segment_ids: Tensor | None) -> Iterator[Tensor]:
    """Yields, for j = K-1 .. 0 steps back, the input that each step sees there: (B, T, D), zero where it sees none."""
    n_time = x.shape[1]
    state = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    history = torch.cat([state, x], dim=1)  # (B, K-1+T, D)
    for tap in range(taps):
        seen = history[:, tap : tap + n_time]
        if segment_ids is not None:
            seen = seen.masked_fill(~_visible(segment_ids, taps - 1 - tap)[..., None], 0)
        yield seen


def _visible(segment_ids: Tensor, back: int) -> Tensor:
    """Whether no boundary lies in the `back` steps up to each step, (B, T); steps before the first have none."""
    changes = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))  # (B, T): this step begins a segment
    count = F.pad(changes.cumsum(1), (back, 0))  # (B, back+T)
    return count[:, back:] == count[:, : segment_ids.shape[1]]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    total = None
    for tap, seen in enumerate(_taps(x, weight.shape[1], state, segment_ids)):
        product = seen * weight[:, tap]
        total = product if total is None else total.add_(product)
    assert total is not None
    return total if bias is None else total.add_(bias)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """Returns y (B, T, D); see the contract in `op`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameters = (weight.to(dtype), None if bias is None else bias.to(dtype))
    y = _linear(x.to(dtype), *parameters, initial_state, segment_ids)
    return (F.silu(y, inplace=True) if activation == "silu" else y).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and the initial state; see the contract in `op`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_time, taps = x.shape[1], weight.shape[1]
    x, weight, dy = x.to(dtype), weight.to(dtype), dy.to(dtype)
    if activation == "silu":
        linear = _linear(x, weight, None if bias is None else bias.to(dtype), initial_state, segment_ids)
        gate = torch.sigmoid(linear)
        dy = dy * (gate * (1 + linear * (1 - gate)))
    dhistory = x.new_zeros(x.shape[0], taps - 1 + n_time, x.shape[2])  # (B, K-1+T, D)
    dweight = []
    for tap, seen in enumerate(_taps(x, taps, initial_state, segment_ids)):
        dweight.append((dy * seen).sum((0, 1)))
        back = dy * weight[:, tap]
        if segment_ids is not None:
            back = back.masked_fill(~_visible(segment_ids, taps - 1 - tap)[..., None], 0)
        dhistory[:, tap : tap + n_time] += back
    return (
        dhistory[:, taps - 1 :].contiguous(),
        torch.stack(dweight, dim=1),
        dy.sum((0, 1)),
        dhistory[:, : taps - 1].clone(),
    )
