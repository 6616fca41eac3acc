"""Parts of attention with the relative positions of Transformer-XL (Dai et al. 2019, arXiv 1901.02860).

Letters: S distances, D d_model, N outputs of a projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import linear


def sinusoids(count: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Sines, then cosines, of the distances 0 to count - 1, (S, D) float64 (Vaswani et al. 2017, arXiv 1706.03762)."""
    half = (width + 1) // 2
    rates = 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) * 2 / width)
    angles = torch.arange(count, device=device, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()[:, : width - half]), dim=1)


@torch.library.custom_op("zoo::relative_positions", mutates_args=())
def _relative_positions(weight: Tensor, count: int) -> Tensor:
    return linear(sinusoids(count, weight.shape[1], device=weight.device).to(weight.dtype), weight)


@_relative_positions.register_fake
def _(weight: Tensor, count: int) -> Tensor:
    return weight.new_empty(count, weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _autograd(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (weight,) = ctx.saved_tensors
    positions = sinusoids(gradient.shape[0], weight.shape[1], device=weight.device).to(gradient.dtype)
    return (gradient.t() @ positions).to(weight.dtype), None


_relative_positions.register_autograd(_autograd, setup_context=_setup_context)


def relative_positions(weight: Tensor, count: int) -> Tensor:
    """The sinusoids of the distances 0 to count - 1, projected.

    They come from weights alone, once for all rows and whatever is in them: as an operator of its own, which has no
    formula, the product is not counted among the FLOPs of a sequence.

    Args:
        weight: (N, D).
        count: S.

    Returns:
        (S, N). The gradient goes to the weights.
    """
    return torch.ops.zoo.relative_positions(weight, count)


@torch.library.custom_op("zoo::with_input_gradient", mutates_args=())
def _with_input_gradient(projected: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return projected.clone()  # what an operator returns must be its own


@_with_input_gradient.register_fake
def _(projected: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(projected)


def _setup_input_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.dtype = inputs[1].dtype


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    (weight,) = ctx.saved_tensors
    return gradient, linear(gradient, weight.t().to(gradient.dtype)).to(ctx.dtype), None


_with_input_gradient.register_autograd(_input_gradient, setup_context=_setup_input_gradient)


def with_input_gradient(projected: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A projection of x.detach() that gives x its gradient after all.

    So one product serves two uses: what is used as memory teaches the weights, and what is used here and now the input
    as well. No gradient of gradients.

    Args:
        projected: x.detach() weight^T, with a bias or without, (..., N).
        x: (..., D).
        weight: (N, D).

    Returns:
        (..., N).
    """
    return torch.ops.zoo.with_input_gradient(projected, x, weight) if torch.is_grad_enabled() else projected
