"""Public face of the short causal convolution: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, D channels, K taps.

Each backend is a module with two functions, which the custom ops below call:

    forward(x, weight, bias, activation, initial_state, segment_ids) -> y
    backward(dy, x, weight, bias, activation, initial_state, segment_ids) -> (dx, dweight, dbias, dinitial_state)

An absent optional is None; its gradient may be anything and is dropped here. Tensors arrive in their own dtypes and
with any strides; dy is contiguous. y has x's dtype, gradients may have any floating dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import backends, flop_formulas
from zoo.kernels.causal_conv1d.reference import reference
from zoo.kernels.checks import check_rank, check_tensors
from zoo.kernels.errors import ZooError, did_you_mean


def _why_not_cuda(device_type: str, features: backends.Features) -> str | None:
    if device_type != "cuda":
        return f"needs a CUDA device, the tensors are on {device_type}"
    for feature in ("float64", "taps outside 2..4", "channels not a multiple of 8"):
        if feature in features:
            return f"causal-conv1d does not take {feature}"
    if "initial_state" in features and "segment_ids" in features:
        return "causal-conv1d does not take initial_state and segment_ids together"
    return backends.missing("causal_conv1d", "'subquadratic-zoo[cuda]'")


backends.register(
    "causal_conv1d",
    [
        backends.Backend("cuda", _why_not_cuda),
        backends.Backend("numba", backends.numba),
        backends.Backend("torch", backends.anywhere),
        backends.Backend("reference", backends.anywhere),
    ],
)


@torch.library.custom_op("zoo::causal_conv1d_forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    backend: str,
) -> Tensor:
    return backends.load("causal_conv1d", backend).forward(x, weight, bias, activation, initial_state, segment_ids)


@_forward.register_fake
def _(x, weight, bias, activation, initial_state, segment_ids, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::causal_conv1d_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = backends.load("causal_conv1d", backend).backward(
        dy.contiguous(), x, weight, bias, activation, initial_state, segment_ids
    )
    # A custom op cannot return None, so an absent optional has an empty gradient.
    return tuple(
        x.new_empty(0) if like is None else gradient.to(like.dtype).contiguous()
        for gradient, like in zip(gradients, (x, weight, bias, initial_state), strict=True)
    )  # type: ignore[return-value]


@_backward.register_fake
def _(dy, x, weight, bias, activation, initial_state, segment_ids, backend):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0 if like is None else like.shape, dtype=None if like is None else like.dtype)
        for like in (x, weight, bias, initial_state)
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, activation, initial_state, segment_ids, backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, segment_ids)
    ctx.activation, ctx.backend = activation, backend


def _autograd(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, segment_ids = ctx.saved_tensors
    dx, dweight, dbias, dstate = torch.ops.zoo.causal_conv1d_backward(
        dy, x, weight, bias, ctx.activation, initial_state, segment_ids, ctx.backend
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None,
        None if initial_state is None else dstate,
        None,
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolves each channel with its own K taps over the present and the K-1 steps before it.

        y_t[d] = activation(bias[d] + sum_j weight[d, K-1-j] x_{t-j}[d]),  j = 0 .. K-1

    Inputs before the first step come from `initial_state` (zero where absent); inputs of another segment count as zero.

    Args:
        x: Input, (B, T, D).
        weight: One filter per channel, (D, K); the last tap multiplies the current step.
        bias: (D,).
        activation: None or `"silu"`.
        initial_state: The K-1 inputs before the first step, (B, K-1, D). They belong to each row's first segment.
        segment_ids: Document of each token, (B, T) integers; nothing reaches over a step at which the id changes.
        backend: `"auto"` or one of cuda, numba, torch, reference. A named backend that cannot run is an error.

    Returns:
        `(y, final_state)`: y (B, T, D); final_state (B, K-1, D), the last K-1 inputs, zero where they belong to another
        segment than the last step. Both in x's dtype.

    Raises:
        ZooError: An argument has a wrong value, shape, dtype or device.
        BackendError: The named backend cannot run this call.
    """
    check_rank("causal_conv1d", "x", x, "B T D")
    check_rank("causal_conv1d", "weight", weight, "D K")
    taps = weight.shape[1]
    check_tensors(
        "causal_conv1d",
        {"B": x.shape[0], "T": x.shape[1], "D": x.shape[2], "K": taps, "K-1": taps - 1},
        x.device,
        {
            "x": (x, "B T D", "float"),
            "weight": (weight, "D K", "float"),
            "bias": (bias, "D", "float"),
            "initial_state": (initial_state, "B K-1 D", "float"),
            "segment_ids": (segment_ids, "B T", "integer"),
        },
    )
    if activation not in (None, "silu"):
        raise ZooError(f"causal_conv1d: activation={activation!r}: {did_you_mean(str(activation), ['None', 'silu'])}")
    features = _features(x, weight, initial_state, segment_ids)
    chosen = backends.resolve("causal_conv1d", backend, x.device.type, features)
    if chosen == "reference":
        y = reference(x, weight, bias, activation, initial_state, segment_ids)
    else:
        y = torch.ops.zoo.causal_conv1d_forward(x, weight, bias, activation, initial_state, segment_ids, chosen)
    return y, _final_state(x, taps, initial_state, segment_ids)


def _features(x: Tensor, weight: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> backends.Features:
    features = []
    if x.dtype == torch.float64:
        features.append("float64")
    if initial_state is not None:
        features.append("initial_state")
    if segment_ids is not None:
        features.append("segment_ids")
    if not 2 <= weight.shape[1] <= 4:
        features.append("taps outside 2..4")
    if x.shape[2] % 8:
        features.append("channels not a multiple of 8")
    return tuple(features)


def _final_state(x: Tensor, taps: int, initial_state: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    n_batch, n_time, n_channels = x.shape
    keep = taps - 1
    state = x[:, max(0, n_time - keep) :]  # (B, min(T, K-1), D)
    if n_time < keep:
        if initial_state is None:
            initial_state = x.new_zeros(n_batch, keep, n_channels)
        state = torch.cat([initial_state[:, n_time:].to(x.dtype), state], dim=1)  # (B, K-1, D)
    else:
        state = state.clone()  # a view would keep all of x alive for as long as the state is carried
    if segment_ids is not None and keep:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T-1)
        # Segments counted from 0 in each row, where the carried inputs, left of the first step, belong too.
        segment = F.pad(changes.cumsum(1), (1 + max(0, keep - n_time), 0))[:, -keep:]  # (B, K-1)
        state = state.masked_fill((segment != segment[:, -1:])[..., None], 0)
    return state


def flops(
    batch: int,
    time: int,
    channels: int,
    taps: int,
    *,
    bias: bool = True,
    activation: bool = True,
    backward: bool = False,
) -> int:
    """Counts the floating-point operations of one call; a SiLU counts as one.

    Forward, per token and channel: a product and a sum per tap. Backward: the linear part again (for the SiLU), and a
    product and a sum per tap for each of the gradients of x and of weight.
    """
    per_channel = 2 * taps - 1 + bias + activation
    if backward:
        per_channel = activation * per_channel + 4 * taps + bias
    return batch * time * channels * per_channel


def _forward_flops(x, weight, bias, activation, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(x[0], x[1], x[2], weight[1], bias=bias is not None, activation=activation is not None)


def _backward_flops(dy, x, weight, bias, activation, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(x[0], x[1], x[2], weight[1], bias=bias is not None, activation=activation is not None, backward=True)


flop_formulas.register(torch.ops.zoo.causal_conv1d_forward, _forward_flops)
flop_formulas.register(torch.ops.zoo.causal_conv1d_backward, _backward_flops)
