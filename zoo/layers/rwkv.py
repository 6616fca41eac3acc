"""What the generations of RWKV share: settings, initialisation, channel mix (arXiv 2305.13048, 2503.14456).

Letters: B batch, T time, D d_model, F hidden width of the channel mix, M mixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.layers.linear import Linear
from zoo.layers.token_shift import TokenShift
from zoo.mixer import Mixer
from zoo.settings import setting


@dataclass(kw_only=True)
class RWKVConfig(ModelConfig):
    """Settings of the RWKV family; the defaults are the published ones."""

    tie_embeddings: bool = setting(False, "the head shares the embedding's weights")
    norm: str = setting("layer", "norms of the shell: rms (RMSNorm) or layer (LayerNorm)", choices=("rms", "layer"))
    embedding_norm: bool = setting(True, "one more norm, straight after the embedding")
    d_ff: int | None = setting(None, "hidden width of the channel mix; null: 4 d_model", minimum=1)
    token_shift: bool = setting(True, "mix each token with the one before it in front of the projections")
    backend: str = setting("auto", "kernel backend: auto, or one that `python -m zoo.kernels` lists")

    def depth(self, layer: int) -> tuple[float, float]:
        """Depth of a block, from 0 (the first) to 1 (the last); and 1 - layer / n_layers, which never reaches 0."""
        return layer / max(1, self.n_layers - 1), 1 - layer / self.n_layers

    def channels(self) -> Tensor:
        """Place of each channel, i / D; (D,)."""
        return torch.arange(self.d_model) / self.d_model

    def slope(self) -> Tensor:
        """Place of each channel from 0 to 1, both met; (D,)."""
        return torch.linspace(0, 1, self.d_model) if self.d_model > 1 else torch.zeros(1)


class RWKVMixer(Mixer):
    """What both RWKV generations share with the shell: its initialisation."""

    @classmethod
    def init_shell(cls, config: RWKVConfig, embedding: nn.Embedding, head: nn.Linear | None) -> None:
        """A tiny embedding, which the norm after it scales up at once, and an orthogonal head."""
        nn.init.uniform_(embedding.weight, -1e-4, 1e-4)
        if head is not None:
            init_orthogonal(head, 0.5)


def init_orthogonal(projection: nn.Linear, gain: float) -> None:
    """Orthogonal weights, larger where a projection widens; gain 0: zeros."""
    if gain == 0:
        nn.init.zeros_(projection.weight)
        return
    rows, columns = projection.weight.shape
    nn.init.orthogonal_(projection.weight, gain * math.sqrt(max(1, rows / columns)))


class _SquaredRelu(torch.autograd.Function):
    """relu(x)^2 with 2 g relu(x) in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(positive.new_zeros(()), gradient, positive, value=2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, elementwise: torch's own backward goes four times over what is here the widest activation."""
    # A compiler fuses these passes by itself, and Dynamo warns where it meets a Function.
    return torch.relu(x).square() if torch.compiler.is_compiling() else _SquaredRelu.apply(x)


class ChannelMixState(NamedTuple):
    """What the channel mix carries from token to token."""

    last: Tensor
    """(B, D): its last input."""


class ChannelMix(Mixer):
    """The feed-forward, V relu(K x_k)^2, in RWKV-4 gated by sigmoid(R x_r).

    Args:
        config: The model's config.
        layer: Number of the block.
        power: Of 1 - layer / n_layers, in the exponent of the token shift's initialisation.
        gated: Whether the receptance gates the result.
    """

    def __init__(self, config: RWKVConfig, layer: int, power: int, gated: bool) -> None:
        super().__init__(config, layer)
        d_ff = config.d_ff or 4 * config.d_model
        kept = config.channels() ** (config.depth(layer)[1] ** power)
        self.shift = TokenShift(1 - kept.repeat(1 + gated, 1), config.token_shift)
        self.key = Linear(config.d_model, d_ff, bias=False)
        self.value = Linear(d_ff, config.d_model, bias=False)
        init_orthogonal(self.key, 1)
        init_orthogonal(self.value, 0)
        self.receptance = Linear(config.d_model, config.d_model, bias=False) if gated else None
        if self.receptance is not None:
            init_orthogonal(self.receptance, 0)

    def forward(
        self, x: Tensor, state: ChannelMixState | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ChannelMixState | None]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        mixes, last = self.shift(x, None if state is None else state.last, segment_ids)
        y = self.value(squared_relu(self.key(mixes[0])))  # (B, T, D), hidden (B, T, F)
        if self.receptance is not None:
            y = torch.sigmoid(self.receptance(mixes[1])) * y
        return y, None if last is None else ChannelMixState(last)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ChannelMixState:
        """No token before."""
        return ChannelMixState(self.shift.init_state(batch_size, device, dtype))

    def flops(self, seq_len: int) -> int:
        """The token shift, and two or three matrix products per token."""
        products = sum(p.weight.numel() for p in (self.key, self.value, self.receptance) if p is not None)
        return self.shift.flops(seq_len) + 2 * seq_len * products

    def state_size(self, seq_len: int) -> int:
        """D, whatever the length."""
        return self.shift.state_size()
