"""The convolution of the causal-conv1d package (github.com/Dao-AILab/causal-conv1d, BSD-3) behind our signature.

Its kernels take (B, D, T) with the channels innermost in memory, which is our (B, T, D) seen from the other side.
Backward calls the package's function again rather than keep its graph, because a torch operator cannot hand one on.

Shape letters: B batch, T time, D channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from causal_conv1d import causal_conv1d_fn
from torch import Tensor
from torch.nn import functional as F


def _channels_inside(x: Tensor) -> Tensor:
    """(B, T, D) -> (B, D, T), strides 1 over D and a multiple of 8 over B and T."""
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    return x.transpose(1, 2)


def _segment_numbers(segment_ids: Tensor | None) -> Tensor | None:
    """Segments counted from 0: the package compares ids, so that one that comes back would see its earlier self."""
    if segment_ids is None:
        return None
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T-1)
    return F.pad(changes.cumsum(1), (1, 0)).to(torch.int32).contiguous()


def _package_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> list[Any]:
    return [
        _channels_inside(x),
        weight.contiguous(),
        None if bias is None else bias.to(weight.dtype),
        None if initial_state is None else _channels_inside(initial_state.to(x.dtype)),
    ]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """Returns y (B, T, D); see the contract in `op`."""
    with torch.no_grad():
        x, weight, bias, initial_state = _package_arguments(x, weight, bias, initial_state)
        segments = _segment_numbers(segment_ids)
        y = causal_conv1d_fn(x, weight, bias, seq_idx=segments, initial_states=initial_state, activation=activation)
    return y.transpose(1, 2).contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias and the initial state; see the contract in `op`."""
    arguments = _package_arguments(x, weight, bias, initial_state)
    leaves = [None if argument is None else argument.detach().requires_grad_() for argument in arguments]
    with torch.enable_grad():
        y = causal_conv1d_fn(
            *leaves[:3], seq_idx=_segment_numbers(segment_ids), initial_states=leaves[3], activation=activation
        )
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(y, present, _channels_inside(dy)))
    dx: Tensor
    dx, dweight, dbias, dstate = (None if leaf is None else next(gradients) for leaf in leaves)  # type: ignore[assignment]
    dstate = None if dstate is None else dstate.transpose(1, 2).contiguous()
    return dx.transpose(1, 2).contiguous(), dweight, dbias, dstate
