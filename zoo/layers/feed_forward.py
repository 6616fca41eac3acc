"""Feed-forward sublayers: they mix channels, token by token, and carry no state.

Letters: B batch, T time, D d_model, F hidden width.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import ModelConfig
from zoo.layers.linear import Linear
from zoo.mixer import Mixer


class SwiGLU(Mixer):
    """Gated feed-forward, down(SiLU(gate x) * up x) (Shazeer 2020, arXiv 2002.05202).

    Args:
        config: The model's config.
        layer: Number of the block.
        d_hidden: F.
        n_residual: Residual sublayers per block, for the initialisation of the output projection.
        bias: Whether the projections have biases.
    """

    both_ways = True

    def __init__(self, config: ModelConfig, layer: int, d_hidden: int, n_residual: int = 2, bias: bool = False) -> None:
        super().__init__(config, layer)
        self.up_proj = Linear(config.d_model, 2 * d_hidden, bias)  # gate first, then up
        self.down_proj = Linear(d_hidden, config.d_model, bias)
        _init(self.up_proj, self.down_proj, n_residual * config.n_layers)

    def forward(self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """Maps (B, T, D) to (B, T, D); the state passes through."""
        gate, up = self.up_proj(x).chunk(2, dim=-1)  # each (B, T, F)
        return self.down_proj(F.silu(gate) * up), state

    def flops(self, seq_len: int) -> int:
        """Three matrix products per token."""
        return 2 * seq_len * (self.up_proj.weight.numel() + self.down_proj.weight.numel())


class MLP(Mixer):
    """Feed-forward of the first Transformers, down(f(up x)) (Vaswani et al. 2017, arXiv 1706.03762).

    Args:
        config: The model's config.
        layer: Number of the block.
        d_hidden: F.
        activation: f: "gelu" or "gelu_tanh", its approximation.
        bias: Whether the projections have biases.
    """

    both_ways = True

    def __init__(self, config: ModelConfig, layer: int, d_hidden: int, activation: str, bias: bool = True) -> None:
        super().__init__(config, layer)
        self.up_proj = Linear(config.d_model, d_hidden, bias)
        self.down_proj = Linear(d_hidden, config.d_model, bias)
        self.approximate = "tanh" if activation == "gelu_tanh" else "none"
        _init(self.up_proj, self.down_proj, 2 * config.n_layers)

    def forward(self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """Maps (B, T, D) to (B, T, D); the state passes through."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate)), state

    def flops(self, seq_len: int) -> int:
        """Two matrix products per token."""
        return 2 * seq_len * (self.up_proj.weight.numel() + self.down_proj.weight.numel())


def _init(up: nn.Linear, down: nn.Linear, n_residual: int) -> None:
    nn.init.normal_(up.weight, std=0.02)
    nn.init.normal_(down.weight, std=0.02 / math.sqrt(n_residual))
    for projection in (up, down):
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
