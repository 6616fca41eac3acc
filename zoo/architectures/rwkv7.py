"""RWKV-7 "Goose": a matrix state with a generalised delta rule (Peng et al. 2025, arXiv 2503.14456).

Letters: B batch, T time, D d_model, H heads, K head width, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.kernels import linear, wkv7, wkv7_flops
from zoo.layers.linear import Linear
from zoo.layers.rwkv import ChannelMix, RWKVConfig, RWKVMixer, init_orthogonal
from zoo.layers.token_shift import TokenShift
from zoo.mixer import Mixer, no_weight_decay, scale_learning_rate
from zoo.registry import register
from zoo.settings import setting

DECAY_SCALE = math.exp(-0.5)
"""The log decay lies between -DECAY_SCALE and 0."""


@dataclass(kw_only=True)
class RWKV7Config(RWKVConfig):
    """Settings of RWKV-7; the defaults are the published ones."""

    head_dim: int | None = setting(None, "head width K; null: the largest divisor of d_model in 64", minimum=1)
    decay_rank: int | None = setting(None, "rank of the decay's projection; null: from d_model", minimum=1)
    rate_rank: int | None = setting(None, "rank of the in-context learning rate's; null: from d_model", minimum=1)
    value_rank: int | None = setting(None, "rank of the value residual's; null: from d_model", minimum=1)
    gate_rank: int | None = setting(None, "rank of the output gate's; null: from d_model", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim and self.d_model % self.head_dim:
            self.fail("head_dim", f"expected a divisor of d_model={self.d_model}")

    def rank(self, given: int | None, factor: float) -> int:
        """The given rank, or the published one: factor * sqrt(D), to the nearest multiple of 32, 32 at least."""
        return given or max(32, 32 * round(factor * math.sqrt(self.d_model) / 32))


class RWKV7State(NamedTuple):
    """What the time mix carries from token to token."""

    last: Tensor
    """(B, D): its last input."""
    wkv: Tensor
    """(B, H, K, K) fp32, values by keys."""


class LowRank(nn.Module):
    """bias + f(x A) B with a bottleneck of rank R, silent at first: A starts at zero.

    Args:
        d_model: D.
        rank: R.
        bias: Initial bias, (D,); None for none.
        activation: f.
    """

    def __init__(self, d_model: int, rank: int, bias: Tensor | None, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, d_model))
        self.up = nn.Parameter(torch.empty(d_model, rank))
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.activation = activation
        nn.init.orthogonal_(self.up, 0.1 * math.sqrt(max(1, rank / d_model)))
        no_weight_decay(self.down, self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        return linear(self.activation(linear(x, self.down)), self.up, self.bias)

    def flops(self, seq_len: int) -> int:
        """Two products."""
        return 2 * seq_len * (self.down.numel() + self.up.numel())


@register("rwkv7", config=RWKV7Config)
class RWKV7(RWKVMixer):
    """RWKV-7: a matrix state that a delta rule overwrites, with one decay per key channel and token."""

    shares = True

    @classmethod
    def sublayers(cls, config: RWKV7Config, layer: int) -> list[Mixer]:
        """Time mix, then channel mix."""
        return [cls(config, layer), ChannelMix(config, layer, power=4, gated=False)]

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__(config, layer)
        d_model = config.d_model
        self.head_dim = config.head_dim or math.gcd(64, d_model)
        self.n_heads = d_model // self.head_dim
        self.backend = config.backend
        depth, rest = config.depth(layer)
        x = config.channels()
        powers = [0.2, 0.9, 0.7, 0.7, 0.9, 0.2]  # of r, w, k, v, a, g
        self.shift = TokenShift(torch.stack([1 - x ** (power * rest) for power in powers]), config.token_shift)

        linear = config.slope() - 0.5
        within = torch.arange(d_model) % self.head_dim
        z = (2 * within - (self.head_dim - 1)) / max(1, self.head_dim - 1)  # -1 to 1 inside each head
        zigzag = z * z.abs()
        decay = -6 + 6 * config.slope() ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        rate = -0.19 + 0.3 * zigzag + 0.4 * linear
        self.decay = LowRank(d_model, config.rank(config.decay_rank, 2.5), decay, nn.Tanh())
        self.rate = LowRank(d_model, config.rank(config.rate_rank, 2.5), rate, nn.Identity())
        self.gate = LowRank(d_model, config.rank(config.gate_rank, 5), None, nn.Sigmoid())
        self.residual = None  # of the values; the first layer is where they come from
        if layer > 0:
            rank = config.rank(config.value_rank, 1.7)
            self.residual = LowRank(d_model, rank, 0.73 - 0.4 * linear, nn.Identity())
        self.k_k = nn.Parameter(0.71 - 0.1 * linear)
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.n_heads, self.head_dim), -0.04))

        self.receptance = Linear(d_model, d_model, bias=False)
        self.key = Linear(d_model, d_model, bias=False)
        self.value = Linear(d_model, d_model, bias=False)
        self.output = Linear(d_model, d_model, bias=False)
        for projection, gain in ((self.receptance, 1), (self.key, 0.1), (self.value, 1), (self.output, 0)):
            init_orthogonal(projection, gain)
        self.norm_weight = nn.Parameter(torch.full((d_model,), ((1 + layer) / config.n_layers) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))
        no_weight_decay(self.k_k, self.k_a, self.r_k, self.norm_weight, self.norm_bias)
        assert self.decay.bias is not None
        scale_learning_rate(2, self.decay.bias)

    def forward(
        self,
        x: Tensor,
        state: RWKV7State | None = None,
        segment_ids: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, RWKV7State | None]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`. `shared` brings the first layer's values."""
        (x_r, x_w, x_k, x_v, x_a, x_g), last = self.shift(x, None if state is None else state.last, segment_ids)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        log_decay = -DECAY_SCALE * torch.sigmoid(self.decay(x_w).float())
        rate = torch.sigmoid(self.rate(x_a))
        if shared is not None:
            if self.residual is None:
                shared["rwkv7 values"] = v
            else:
                v = torch.lerp(v, shared["rwkv7 values"], torch.sigmoid(self.residual(x_v)))

        removal = F.normalize(self._heads(k * self.k_k), dim=-1, eps=1e-12)  # (B, T, H, K), what the delta rule forgets
        k = k * (1 + (rate - 1) * self.k_a)
        r, k, v = self._heads(r), self._heads(k), self._heads(v)
        y, wkv = wkv7(
            r,
            self._heads(log_decay),
            k,
            v,
            -removal,
            removal * self._heads(rate),
            initial_state=None if state is None else state.wkv,
            segment_ids=segment_ids,
            backend=self.backend,
        )
        y = F.layer_norm(y, y.shape[-1:], eps=64e-5)
        y = y.flatten(2) * self.norm_weight + self.norm_bias  # (B, T, D)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # (B, T, H, K)
        y = self.output((y + bonus.flatten(2)) * self.gate(x_g))
        return y, None if last is None else RWKV7State(last, wkv)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))  # (B, T, D) -> (B, T, H, K)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKV7State:
        """No token before, zeros."""
        last = self.shift.init_state(batch_size, device, dtype)
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return RWKV7State(last, torch.zeros(shape, device=device, dtype=torch.float32))

    def flops(self, seq_len: int) -> int:
        """The token shift, four projections, three or four low-rank ones, and the recurrence."""
        low_rank = [part for part in (self.decay, self.rate, self.gate, self.residual) if part is not None]
        recurrence = wkv7_flops(1, seq_len, self.n_heads, self.head_dim, self.head_dim)
        projections = 8 * seq_len * (self.n_heads * self.head_dim) ** 2
        return self.shift.flops(seq_len) + projections + sum(part.flops(seq_len) for part in low_rank) + recurrence

    def state_size(self, seq_len: int) -> int:
        """D + H K K, whatever the length."""
        return self.shift.state_size() + self.n_heads * self.head_dim**2
