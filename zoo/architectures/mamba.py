"""Mamba: a selective state-space model (Gu & Dao 2023, arXiv 2312.00752).

Letters: B batch, T time, D d_model, E inner width, N state size, R rank of the step size, K taps of the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels import linear, selective_scan, selective_scan_flops
from zoo.layers.linear import Linear
from zoo.layers.short_convolution import ShortConvolution
from zoo.layers.state_space import StateSpaceConfig
from zoo.mixer import Mixer, no_weight_decay
from zoo.registry import register
from zoo.settings import setting


@dataclass(kw_only=True)
class MambaConfig(StateSpaceConfig):
    """Settings of Mamba; the defaults are the published ones."""

    d_state: int = setting(16, "state size N per channel", minimum=1)
    dt_rank: int | None = setting(None, "rank of the step size's projection; null: ceil(d_model / 16)", minimum=1)


class MambaState(NamedTuple):
    """What Mamba carries from token to token."""

    conv: Tensor
    """(B, K-1, E): the last inputs of the convolution."""
    ssm: Tensor
    """(B, E, N) fp32."""


@register("mamba", config=MambaConfig)
class Mamba(Mixer):
    """Mamba-1: selective scan with input-dependent step size, input and output maps."""

    def __init__(self, config: MambaConfig, layer: int) -> None:
        super().__init__(config, layer)
        d_inner = config.expand * config.d_model
        dt_rank = config.dt_rank or math.ceil(config.d_model / 16)
        self.splits = [dt_rank, config.d_state, config.d_state]
        self.backend = config.backend
        self.in_proj = Linear(config.d_model, 2 * d_inner, bias=False)  # convolved branch first, then the gate
        self.conv = ShortConvolution(d_inner, config.d_conv, config.short_conv)
        self.x_proj = Linear(d_inner, sum(self.splits), bias=False)
        self.dt_proj = Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, config.d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Linear(d_inner, config.d_model, bias=False)
        no_weight_decay(self.A_log, self.D, self.dt_proj.bias)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(config.step_size_bias(d_inner))
            self.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(
        self, x: Tensor, state: MambaState | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        d_inner = self.D.shape[0]
        # Two products with halves of one weight: each result is contiguous, as the kernels want it, without a copy.
        u = linear(x, self.in_proj.weight[:d_inner])  # (B, T, E)
        z = linear(x, self.in_proj.weight[d_inner:])  # (B, T, E)
        u, conv = self.conv(u, None if state is None else state.conv, segment_ids)
        dt_low, B, C = self.x_proj(u).split(self.splits, dim=-1)  # (B, T, R), (B, T, N), (B, T, N)
        y, ssm = selective_scan(
            u,
            linear(dt_low, self.dt_proj.weight),
            -torch.exp(self.A_log.float()),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            initial_state=None if state is None else state.ssm,
            segment_ids=segment_ids,
            backend=self.backend,
        )
        return self.out_proj(y), None if state is None else MambaState(conv, ssm)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Zeros."""
        return MambaState(
            self.conv.init_state(batch_size, device, dtype),
            torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=torch.float32),
        )

    def flops(self, seq_len: int) -> int:
        """Four projections, the convolution and the scan."""
        d_inner, d_state = self.A_log.shape
        projections = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        return (
            2 * seq_len * sum(projection.weight.numel() for projection in projections)
            + self.conv.flops(seq_len)
            + selective_scan_flops(1, seq_len, d_inner, d_state)
        )

    def state_size(self, seq_len: int) -> int:
        """E (K - 1 + N), whatever the length."""
        return self.conv.state_size() + self.A_log.numel()
