"""Dense projections: what most of the time of a training step goes into, whatever the architecture.

Shape letters: M rows, K inputs, N outputs.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import backends, flop_formulas
from zoo.kernels.backends import Backend, Features, anywhere
from zoo.kernels.linear.reference import reference

SMALL = 2**22
"""Multiply-adds below which torch's own product is as fast, as the call itself is what takes the time."""


def flops(rows: int, inputs: int, outputs: int) -> int:
    """FLOPs of one projection: 2 M K N."""
    return 2 * rows * inputs * outputs


@functools.cache
def _intel() -> bool:
    """Whether the processor is Intel's, for which alone MKL has its fastest code."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return "Intel" in os.environ.get("PROCESSOR_IDENTIFIER", "Intel")


def _onednn(device_type: str, features: Features) -> str | None:
    if device_type != "cpu":
        return f"runs on CPU tensors, these are on {device_type}"
    for feature, reason in {
        "dtype": "takes float32 without autocast",
        "small": "torch's own product is as fast for few rows",
    }.items():
        if feature in features:
            return reason
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _intel():
        return "torch's own product is as fast on this processor"
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch is built without oneDNN"
    return None


backends.register("linear", [Backend("onednn", _onednn), Backend("torch", anywhere), Backend("reference", anywhere)])


@torch.library.custom_op("zoo::linear_forward", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return backends.load("linear", "onednn").product(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("zoo::linear_backward", mutates_args=())
def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return backends.load("linear", "onednn").weight_gradient(dy, x)


@_weight_gradient.register_fake
def _(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1])


def _setup_linear(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _linear_autograd(ctx, dy):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        torch.ops.zoo.linear_forward(dy, weight.t(), None) if needs_x else None,
        torch.ops.zoo.linear_backward(dy, x) if needs_weight else None,
        dy.sum(0) if needs_bias else None,
    )


def _setup_weight_gradient(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weight_gradient_autograd(ctx, gradient):
    dy, x = ctx.saved_tensors
    return torch.ops.zoo.linear_forward(x, gradient, None), torch.ops.zoo.linear_forward(dy, gradient.t(), None)


_linear.register_autograd(_linear_autograd, setup_context=_setup_linear)
_weight_gradient.register_autograd(_weight_gradient_autograd, setup_context=_setup_weight_gradient)
flop_formulas.register(torch.ops.zoo.linear_forward, lambda x, weight, *_, **__: flops(x[0], x[1], weight[0]))
flop_formulas.register(torch.ops.zoo.linear_backward, lambda dy, x, **_: flops(x[0], x[1], dy[1]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Projects: y = x weight^T + bias.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        backend: `"auto"` or one of onednn, torch, reference. A named backend that cannot run is an error.

    Returns:
        (..., N). Gradients flow to all three, also twice.

    Raises:
        BackendError: The named backend cannot run this call.
    """
    features = []
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        features.append("dtype")
    if x.numel() * weight.shape[0] < SMALL:
        features.append("small")
    chosen = backends.resolve("linear", backend, x.device.type, tuple(features))
    if chosen == "torch":
        return F.linear(x, weight, bias)
    if chosen == "reference":
        return reference(x, weight, bias)
    return torch.ops.zoo.linear_forward(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])
