"""RWKV-4: a linear recurrence with one decay per channel (Peng et al. 2023, arXiv 2305.13048).

Letters: B batch, T time, D d_model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels import wkv4, wkv4_flops
from zoo.kernels.wkv4 import wkv4_initial_state
from zoo.layers.linear import Linear
from zoo.layers.rwkv import ChannelMix, RWKVConfig, RWKVMixer, init_orthogonal
from zoo.layers.token_shift import TokenShift
from zoo.mixer import Mixer, no_weight_decay, scale_learning_rate
from zoo.registry import register


class TimeMixState(NamedTuple):
    """What the time mix carries from token to token."""

    last: Tensor
    """(B, D): its last input."""
    wkv: Tensor
    """(B, 3, D) fp32: numerator, denominator and exponent of the running average."""


@register("rwkv4", config=RWKVConfig)
class RWKV4(RWKVMixer):
    """RWKV-4: a running average weighted by keys, with one decay per channel."""

    learning_rate_factor = 2.5

    @classmethod
    def sublayers(cls, config: RWKVConfig, layer: int) -> list[Mixer]:
        """Time mix, then channel mix."""
        return [cls(config, layer), ChannelMix(config, layer, power=1, gated=True)]

    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__(config, layer)
        d_model = config.d_model
        depth, rest = config.depth(layer)
        x = config.channels()
        kept = torch.stack((x**rest, x**rest + 0.3 * depth, x ** (0.5 * rest)))  # of the current token: k, v, r
        self.shift = TokenShift(1 - kept, config.token_shift)
        self.time_decay = nn.Parameter(-5 + 8 * config.slope() ** (0.7 + 1.3 * depth))
        zigzag = (torch.arange(d_model) + 1) % 3 - 1
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag)
        self.key = Linear(d_model, d_model, bias=False)
        self.value = Linear(d_model, d_model, bias=False)
        self.receptance = Linear(d_model, d_model, bias=False)
        self.output = Linear(d_model, d_model, bias=False)
        for projection, gain in ((self.key, 0), (self.value, 1), (self.receptance, 0), (self.output, 0)):
            init_orthogonal(projection, gain)
        self.backend = config.backend
        no_weight_decay(self.time_decay, self.time_first)
        scale_learning_rate(2, self.time_decay)
        scale_learning_rate(3, self.time_first)

    def forward(
        self, x: Tensor, state: TimeMixState | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, TimeMixState | None]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        (x_k, x_v, x_r), last = self.shift(x, None if state is None else state.last, segment_ids)
        y, wkv = wkv4(
            -torch.exp(self.time_decay.float()),
            self.time_first,
            self.key(x_k),
            self.value(x_v),
            initial_state=None if state is None else state.wkv,
            segment_ids=segment_ids,
            backend=self.backend,
        )
        y = self.output(torch.sigmoid(self.receptance(x_r)) * y)
        return y, None if last is None else TimeMixState(last, wkv)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> TimeMixState:
        """No token before, and an average over nothing."""
        last = self.shift.init_state(batch_size, device, dtype)
        return TimeMixState(last, wkv4_initial_state(batch_size, self.time_decay.shape[0], device=device))

    def flops(self, seq_len: int) -> int:
        """The token shift, four projections and the running average."""
        d_model = self.time_decay.shape[0]
        return self.shift.flops(seq_len) + 8 * seq_len * d_model**2 + wkv4_flops(1, seq_len, d_model)

    def state_size(self, seq_len: int) -> int:
        """4 D, whatever the length."""
        return self.shift.state_size() + 3 * self.time_decay.shape[0]
