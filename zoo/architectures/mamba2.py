"""Mamba-2: state-space duality (Dao & Gu 2024, arXiv 2405.21060).

Letters: B batch, T time, D d_model, E inner width, H heads, P head width, G groups, N state size, K taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels import linear, ssd, ssd_flops
from zoo.layers.linear import Linear
from zoo.layers.short_convolution import ShortConvolution
from zoo.layers.state_space import StateSpaceConfig
from zoo.mixer import Mixer, no_weight_decay
from zoo.registry import register
from zoo.settings import setting


@dataclass(kw_only=True)
class Mamba2Config(StateSpaceConfig):
    """Settings of Mamba-2; the defaults are the published ones."""

    d_state: int = setting(128, "state size N per channel", minimum=1)
    head_dim: int | None = setting(None, "head width P; null: the largest divisor of the inner width in 64", minimum=1)
    n_groups: int = setting(1, "groups of heads that share input and output maps", minimum=1)
    dt_limit_min: float = setting(0.0, "smallest step size", minimum=0)
    dt_limit_max: float | None = setting(None, "largest step size; null: no limit", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim and self.d_inner % self.head_dim:
            self.fail("head_dim", f"expected a divisor of the inner width, expand * d_model = {self.d_inner}")
        if self.n_heads % self.n_groups:
            self.fail("n_groups", f"expected a divisor of the number of heads, {self.n_heads}")
        if self.dt_limit_max is not None and self.dt_limit_max < self.dt_limit_min:
            self.fail("dt_limit_max", f"expected at least dt_limit_min={self.dt_limit_min:g}")

    @property
    def d_inner(self) -> int:
        """E."""
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        """H."""
        return self.d_inner // (self.head_dim or math.gcd(64, self.d_inner))


class Mamba2State(NamedTuple):
    """What Mamba-2 carries from token to token."""

    conv: Tensor
    """(B, K-1, E + 2GN): the last inputs of the convolution."""
    ssm: Tensor
    """(B, H, P, N) fp32."""


@register("mamba2", config=Mamba2Config)
class Mamba2(Mixer):
    """Mamba-2: state-space duality with one decay per head, gated RMSNorm."""

    def __init__(self, config: Mamba2Config, layer: int) -> None:
        super().__init__(config, layer)
        d_inner, groups = config.d_inner, config.n_groups * config.d_state
        self.shape = (config.n_heads, d_inner // config.n_heads, config.d_state)  # H, P, N
        self.splits = [d_inner, groups, groups]
        self.n_groups, self.norm_eps = config.n_groups, config.norm_eps
        self.dt_limit = (config.dt_limit_min, config.dt_limit_max or math.inf)
        self.backend = config.backend
        # Gate, then what the convolution sees (input, B, C), then the step sizes.
        self.in_splits = [d_inner, d_inner + 2 * groups, config.n_heads]
        self.in_proj = Linear(config.d_model, sum(self.in_splits), bias=False)
        self.conv = ShortConvolution(d_inner + 2 * groups, config.d_conv, config.short_conv)
        self.dt_bias = nn.Parameter(config.step_size_bias(config.n_heads))
        self.A_log = nn.Parameter(torch.empty(config.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.norm_weight = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Linear(d_inner, config.d_model, bias=False)
        no_weight_decay(self.dt_bias, self.A_log, self.D, self.norm_weight)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State | None]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        heads, width, n_state = self.shape
        # Products with parts of one weight: each result is contiguous, as the kernels want it, without a copy.
        z, u, dt = (linear(x, part) for part in self.in_proj.weight.split(self.in_splits))
        u, conv = self.conv(u, None if state is None else state.conv, segment_ids)  # (B, T, E + 2GN)
        u, B, C = u.split(self.splits, dim=-1)
        y, ssm = ssd(
            u.unflatten(-1, (heads, width)),  # (B, T, H, P)
            dt,
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.n_groups, n_state)),  # (B, T, G, N)
            C.unflatten(-1, (self.n_groups, n_state)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=None if state is None else state.ssm,
            segment_ids=segment_ids,
            backend=self.backend,
        )
        y = (y.flatten(2) * F.silu(z)).unflatten(-1, (self.n_groups, -1))  # (B, T, G, E/G)
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm_eps).flatten(2) * self.norm_weight
        return self.out_proj(y), None if conv is None or state is None else Mamba2State(conv, ssm)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """Zeros."""
        return Mamba2State(
            self.conv.init_state(batch_size, device, dtype),
            torch.zeros(batch_size, *self.shape, device=device, dtype=torch.float32),
        )

    def flops(self, seq_len: int) -> int:
        """Two projections, the convolution and the scan."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        scan = ssd_flops(1, seq_len, self.shape[0], self.shape[1], self.shape[2])
        return 2 * seq_len * projections + self.conv.flops(seq_len) + scan

    def state_size(self, seq_len: int) -> int:
        """(E + 2GN) (K - 1) + HPN, whatever the length."""
        return self.conv.state_size() + math.prod(self.shape)
