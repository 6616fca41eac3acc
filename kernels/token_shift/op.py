"""Public face of the token shift: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, D channels, M mixes.

Each backend is a module with two functions, which the custom ops below call:

    forward(x, mu, initial_state, segment_ids) -> mixes
    backward(dmixes, x, mu, initial_state, segment_ids) -> (dx, dmu, dinitial_state)

mixes and dmixes are M tensors (B, T, D): tensors of their own, because the projections take them one by one and a
stacked gradient would be a copy of them all. An absent optional is None; the gradient of an absent state may be
anything and is dropped here. Tensors arrive in their own dtypes and with any strides. The mixes have x's dtype and are
contiguous, gradients may have any floating dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors
from zoo.kernels.token_shift.reference import reference

backends.register(
    "token_shift",
    [
        backends.Backend("numba", backends.numba),
        backends.Backend("torch", backends.anywhere),
        backends.Backend("reference", backends.anywhere),
    ],
)


@torch.library.custom_op("zoo::token_shift_forward", mutates_args=())
def _forward(
    x: Tensor, mu: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None, backend: str
) -> list[Tensor]:
    return backends.load("token_shift", backend).forward(x, mu, initial_state, segment_ids)


@_forward.register_fake
def _(x, mu, initial_state, segment_ids, backend):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) for _ in range(mu.shape[0])]


@torch.library.custom_op("zoo::token_shift_backward", mutates_args=())
def _backward(
    dmixes: Sequence[Tensor],
    x: Tensor,
    mu: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = backends.load("token_shift", backend).backward(dmixes, x, mu, initial_state, segment_ids)
    # A custom op cannot return None, so an absent optional has an empty gradient.
    return tuple(
        x.new_empty(0) if like is None else gradient.to(like.dtype).contiguous()
        for gradient, like in zip(gradients, (x, mu, initial_state), strict=True)
    )  # type: ignore[return-value]


@_backward.register_fake
def _(dmixes, x, mu, initial_state, segment_ids, backend):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0 if like is None else like.shape, dtype=None if like is None else like.dtype)
        for like in (x, mu, initial_state)
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, mu, initial_state, segment_ids, backend = inputs
    ctx.save_for_backward(x, mu, initial_state, segment_ids)
    ctx.backend = backend


def _autograd(ctx, dmixes):  # type: ignore[no-untyped-def]
    x, mu, initial_state, segment_ids = ctx.saved_tensors
    dx, dmu, dstate = torch.ops.zoo.token_shift_backward(dmixes, x, mu, initial_state, segment_ids, ctx.backend)
    return dx, dmu, None if initial_state is None else dstate, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def token_shift(
    x: Tensor,
    mu: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Interpolates each token with the one before it, M times over (RWKV, arXiv 2305.13048).

        mixes[m]_t = x_t + (x_{t-1} - x_t) mu[m]

    Before the first token stands `initial_state` (zero where absent), before the first of another segment a zero.

    Args:
        x: Input, (B, T, D).
        mu: Share of the token before, per mix and channel, (M, D).
        initial_state: The input before the first step, (B, D). It belongs to each row's first segment.
        segment_ids: Document of each token, (B, T) integers; nothing reaches over a step at which the id changes.
        backend: `"auto"` or one of numba, torch, reference. A named backend that cannot run is an error.

    Returns:
        `(mixes, final_state)`: M tensors (B, T, D); final_state (B, D), a copy of the last input. All in x's dtype.

    Raises:
        ZooError: An argument has a wrong shape, dtype or device.
        BackendError: The named backend cannot run this call.
    """
    check_rank("token_shift", "x", x, "B T D")
    check_rank("token_shift", "mu", mu, "M D")
    check_tensors(
        "token_shift",
        {"B": x.shape[0], "T": x.shape[1], "D": x.shape[2], "M": mu.shape[0]},
        x.device,
        {
            "x": (x, "B T D", "float"),
            "mu": (mu, "M D", "float"),
            "initial_state": (initial_state, "B D", "float"),
            "segment_ids": (segment_ids, "B T", "integer"),
        },
    )
    chosen = backends.resolve("token_shift", backend, x.device.type)
    if chosen == "reference":
        mixes = reference(x, mu, initial_state, segment_ids)
    else:
        mixes = torch.ops.zoo.token_shift_forward(x, mu, initial_state, segment_ids, chosen)
    # a view would keep all of x alive for as long as the state is carried
    return tuple(mixes), x[:, -1].clone()


def flops(batch: int, time: int, channels: int, mixes: int, *, backward: bool = False) -> int:
    """Counts the floating-point operations of one call.

    Forward, per mix: a difference, a product and a sum. Backward, per mix: a sum for x, a product and a sum each for
    the token before and for mu; and the difference and two sums for x once.
    """
    return batch * time * channels * (5 * mixes + 3 if backward else 3 * mixes)


def _forward_flops(x, mu, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(x[0], x[1], x[2], mu[0])


def _backward_flops(dmixes, x, mu, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(x[0], x[1], x[2], mu[0], backward=True)


flop_formulas.register(torch.ops.zoo.token_shift_forward, _forward_flops)
flop_formulas.register(torch.ops.zoo.token_shift_backward, _backward_flops)
