"""The short causal depthwise convolution in front of many recurrences.

Letters: B batch, T time, E channels, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.kernels import causal_conv1d


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU; initialised as torch does a Conv1d, U(-1/sqrt(K), 1/sqrt(K)).

    Args:
        channels: E.
        taps: K.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))  # last tap: the current token
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps (B, T, E) to (B, T, E); the state is the K-1 inputs before the first token, (B, K-1, E)."""
        return causal_conv1d(x, self.weight, self.bias, activation="silu", initial_state=state, segment_ids=segment_ids)
