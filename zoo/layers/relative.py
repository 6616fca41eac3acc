"""Parts of attention with the relative positions of Transformer-XL (Dai et al. 2019, arXiv 1901.02860).

Letters: S distances, D d_model, N outputs of a projection, P of them that a memory keeps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import flop_formulas, linear, linear_flops


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # or what was made while generating could not be used in training
def sinusoids(count: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of the distances 0 to count - 1, (S, D) (Vaswani et al. 2017, arXiv 1706.03762).

    The same tensor every time: all layers and steps share it.
    """
    half = (width + 1) // 2
    rates = 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) * 2 / width)
    angles = torch.arange(count, device=device, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()[:, : width - half]), dim=1).to(dtype)


@torch.library.custom_op("zoo::relative_positions", mutates_args=())
def _relative_positions(weight: Tensor, count: int) -> Tensor:
    return linear(sinusoids(count, weight.shape[1], device=weight.device, dtype=weight.dtype), weight)


@_relative_positions.register_fake
def _(weight: Tensor, count: int) -> Tensor:
    return weight.new_empty(count, weight.shape[0])


# An operator too, because a compiler traces what stands outside of one, and cannot trace a tensor out of a cache.
@torch.library.custom_op("zoo::relative_positions_backward", mutates_args=())
def _positions_gradient(gradient: Tensor, width: int) -> Tensor:
    positions = sinusoids(gradient.shape[0], width, device=gradient.device, dtype=gradient.dtype)
    return linear(gradient.t(), positions.t())


@_positions_gradient.register_fake
def _(gradient: Tensor, width: int) -> Tensor:
    return gradient.new_empty(gradient.shape[1], width)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.width = inputs[0].shape[1]


def _autograd(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.zoo.relative_positions_backward(gradient, ctx.width), None


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


@torch.library.custom_op("zoo::project_twice", mutates_args=())
def _project_twice(x: Tensor, weight: Tensor, bias: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
    own = linear(x, weight, bias)
    kept = own[..., own.shape[-1] - past :]
    return own, kept.clone(memory_format=torch.contiguous_format)  # what an operator returns must be its own


@_project_twice.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((*x.shape[:-1], past))


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None


def _twice_autograd(ctx: Any, own: Tensor, past: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = linear(own, weight.t()) if ctx.needs_input_grad[0] else None
    both = own.clone()
    both[..., own.shape[-1] - past.shape[-1] :] += past
    both = both.flatten(0, -2)
    return dx, linear(both.t(), x.flatten(0, -2).t()), both.sum(0) if ctx.has_bias else None, None


_project_twice.register_autograd(_twice_autograd, setup_context=_setup_twice)
flop_formulas.register(
    torch.ops.zoo.project_twice, lambda x, weight, *_, **__: linear_flops(x[:-1].numel(), weight[1], weight[0])
)


def project_twice(x: Tensor, weight: Tensor, bias: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
    """One projection for two uses: here and now, and as memory, which teaches the weights and not the input.

    Args:
        x: (..., D).
        weight: (N, D).
        bias: (N,).
        past: How many outputs, the last ones, a memory keeps: P.

    Returns:
        x weight^T + bias, (..., N), with gradients to all three; and its last P outputs, (..., P), without one to x.
    """
    if torch.is_autocast_enabled(x.device.type):  # which does not know the operator
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.zoo.project_twice(x, weight, bias, past)
