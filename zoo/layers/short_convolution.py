"""The short causal depthwise convolution in front of many recurrences.

Letters: B batch, T time, E channels, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels import causal_conv1d, causal_conv1d_flops


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU; initialised as torch does a Conv1d, U(-1/sqrt(K), 1/sqrt(K)).

    Args:
        channels: E.
        taps: K.
        enabled: False takes the local mixing out; the SiLU stays.
    """

    def __init__(self, channels: int, taps: int, enabled: bool = True) -> None:
        super().__init__()
        self.channels, self.taps = channels, taps if enabled else 1
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if not enabled:
            return
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))  # last tap: the current token
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Maps (B, T, E) to (B, T, E); the state is the K-1 inputs before the first token, (B, K-1, E)."""
        if self.weight is None:
            return F.silu(x), state
        return causal_conv1d(x, self.weight, self.bias, activation="silu", initial_state=state, segment_ids=segment_ids)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """The inputs before the first, (B, K-1, E) zeros; (B, 0, E) where the convolution is off."""
        return torch.zeros(batch_size, self.taps - 1, self.channels, device=device, dtype=dtype)

    def flops(self, seq_len: int) -> int:
        """Of one sequence."""
        return 0 if self.weight is None else causal_conv1d_flops(1, seq_len, self.channels, self.taps)

    def state_size(self) -> int:
        """Elements of one sequence's state."""
        return (self.taps - 1) * self.channels
