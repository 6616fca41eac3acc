"""Public face of the recurrence of Mamba-2: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size, K = ceil(T / CHUNK) chunks.

Each compiled backend is a module with two functions, which the custom ops below call:

    forward(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state, segment_ids, save_checkpoints)
        -> (y, final_state, checkpoints)
    backward(dy, dfinal_state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state, segment_ids,
             checkpoints)
        -> (dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state)

An absent optional is None, in and out; dfinal_state may be None too. Tensors arrive in their own dtypes and with any
strides (x, B and C are often views into a projection); dy is contiguous. y has x's dtype and is contiguous,
final_state and checkpoints have the state's dtype (`state_dtype`), gradients may have any floating dtype: they are
cast to their input's dtype here. dinitial_state may be None where there was no initial_state.
checkpoints (B, K, H, P, N) holds what the backend's own backward needs to restart each chunk: the state at the START of
the chunk, before a reset that falls on its first step. The order inside one (P, N) slab is the backend's business.
It is an empty tensor of shape (0,) where save_checkpoints is False.

triton_backend also has `INTERPRETED: bool`, whether Triton's interpreter was on when its kernels were decorated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.errors import ZooError
from zoo.kernels.ssd.reference import reference

CHUNK = 64
"""Steps between stored states, and the length of the pieces in which time is turned into matrix products."""


_TILES = "its tiles hold at most 256 states and 128 channels per head"

backends.register(
    "ssd",
    [
        backends.Backend(
            "cuda", backends.cuda("mamba_ssm", "mamba-ssm's mamba_chunk_scan_combined", ["float64", "d_state > 256"])
        ),
        # numba stands before triton because a CPU can have both: under its interpreter Triton is only for tests.
        backends.Backend("numba", backends.numba),
        backends.Backend("triton", backends.triton("ssd", {"d_state > 256": _TILES, "d_head > 128": _TILES})),
        backends.Backend("torch", backends.anywhere),
        backends.Backend("reference", backends.anywhere),
    ],
)


@torch.library.custom_op("zoo::ssd_forward", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load("ssd", backend).forward(
        x, dt, A, B, C, D, dt_bias, dt_softplus, (dt_min, dt_max), initial_state, segment_ids, save_checkpoints
    )


@_forward.register_fake
def _(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, segment_ids, save_checkpoints, backend):  # type: ignore[no-untyped-def]
    batch, time, heads, channels = x.shape
    slab = (heads, channels, B.shape[3])
    dtype = state_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, *slab), dtype=dtype),
        x.new_empty((batch, -(-time // CHUNK), *slab) if save_checkpoints else (0,), dtype=dtype),
    )


@torch.library.custom_op("zoo::ssd_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = backends.load("ssd", backend).backward(
        dy.contiguous(), dfinal_state, x, dt, A, B, C, D, dt_bias, dt_softplus, (dt_min, dt_max), initial_state,
        segment_ids, checkpoints,
    )  # fmt: skip
    # A custom op cannot return None, so an absent optional has an empty gradient.
    return tuple(
        x.new_empty(0) if like is None else gradient.to(like.dtype).contiguous()
        for gradient, like in zip(gradients, (x, dt, A, B, C, D, dt_bias, initial_state), strict=True)
    )  # type: ignore[return-value]


@_backward.register_fake
def _(dy, dfinal_state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, *others):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0) if like is None else like.new_empty(like.shape)
        for like in (x, dt, A, B, C, D, dt_bias, initial_state)
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, dt, A, B, C, D, dt_bias, *options, initial_state, segment_ids, _, backend = inputs
    checkpoints = output[2]
    ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, segment_ids, checkpoints)
    ctx.options, ctx.backend = options, backend
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    *inputs, initial_state, segment_ids, checkpoints = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return (None,) * 14
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    gradients = torch.ops.zoo.ssd_backward(
        dy, dfinal_state, *inputs, *ctx.options, initial_state, segment_ids, checkpoints, ctx.backend
    )
    likes = (*inputs, initial_state)
    *present, dinitial_state = (g if like is not None else None for g, like in zip(gradients, likes, strict=True))
    return (*present, None, None, None, dinitial_state, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of Mamba-2 (state-space duality, arXiv 2405.21060, section 6) over time.

    Per batch row and head h of group g = h G // H, with delta = clamp(softplus(dt + dt_bias), dt_limit) (softplus only
    if `dt_softplus`) and a state S of P x N numbers:

        S_t[p, n] = exp(delta_t A) S_{t-1}[p, n] + delta_t x_t[p] B_t[g, n]
        y_t[p]    = sum_n C_t[g, n] S_t[p, n] + D x_t[p]

    An infinity or NaN among the inputs reaches, in all backends but `reference`, every output of its chunk of 64 steps
    (256 on cuda), and of the chunk in which its document ends.

    Args:
        x: Input, (B, T, H, P).
        dt: Step size before bias and softplus, (B, T, H).
        A: Continuous-time decay, (H,); negative for a stable recurrence.
        B: Input projection, (B, T, G, N); G divides H.
        C: Output projection, (B, T, G, N).
        D: Skip weight, (H,).
        dt_bias: Added to `dt` before the softplus, (H,).
        dt_softplus: Whether the step size passes through a softplus.
        dt_limit: Smallest and largest step size; a step size beyond has no gradient.
        initial_state: State before the first step, (B, H, P, N); zero where absent. Belongs to each row's first
            segment.
        segment_ids: Document of each token, (B, T) integers. The state is reset to zero wherever the id changes.
        backend: `"auto"` or one of cuda, triton, numba, torch, reference. A named backend that cannot run is an error.

    Returns:
        `(y, final_state)`: y (B, T, H, P) in x's dtype; final_state (B, H, P, N), the state after the last step,
        float32 (float64 if x is). Gradients flow from both, to every floating input.

    Raises:
        ZooError: An argument has a wrong shape, dtype, device or value.
        BackendError: The named backend cannot run this call.
    """
    check_rank("ssd", "x", x, "B T H P")
    check_rank("ssd", "B", B, "B T G N")
    check_tensors(
        "ssd",
        {"B": x.shape[0], "T": x.shape[1], "H": x.shape[2], "P": x.shape[3], "G": B.shape[2], "N": B.shape[3]},
        x.device,
        {
            "x": (x, "B T H P", "float"),
            "dt": (dt, "B T H", "float"),
            "A": (A, "H", "float"),
            "B": (B, "B T G N", "float"),
            "C": (C, "B T G N", "float"),
            "D": (D, "H", "float"),
            "dt_bias": (dt_bias, "H", "float"),
            "initial_state": (initial_state, "B H P N", "float"),
            "segment_ids": (segment_ids, "B T", "integer"),
        },
    )
    if x.shape[2] % B.shape[2]:
        raise ZooError(f"ssd: {x.shape[2]} heads do not divide into {B.shape[2]} groups: change H or G")
    dt_min, dt_max = _limits(dt_limit)
    chosen = backends.resolve("ssd", backend, x.device.type, _features(x, B, initial_state, segment_ids))
    if chosen == "reference":
        return reference(x, dt, A, B, C, D, dt_bias, dt_softplus, (dt_min, dt_max), initial_state, segment_ids)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    differentiable = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    save = differentiable and chosen != "cuda"  # the package's backward starts from the inputs alone
    y, final_state, _ = torch.ops.zoo.ssd_forward(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_state, segment_ids, save, chosen
    )
    return y, final_state


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    limits = tuple(dt_limit)
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ZooError(f"ssd: dt_limit is {dt_limit}, expected (smallest, largest) step size: order the two")
    return float(limits[0]), float(limits[1])


def _features(x: Tensor, B: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> backends.Features:
    features = []
    if x.dtype == torch.float64:
        features.append("float64")
    if initial_state is not None:
        features.append("initial_state")
    if segment_ids is not None:
        features.append("segment_ids")
    if B.shape[3] > 256:
        features.append("d_state > 256")
    if x.shape[3] > 128:
        features.append("d_head > 128")
    return tuple(features)


def flops(
    batch: int, time: int, heads: int, channels: int, d_state: int, *, D: bool = True, backward: bool = False
) -> int:
    """Counts the floating-point operations of one call as a recurrence; an exp or a softplus counts as one.

    Forward, per token and head: 5 for each of the P N states (decay, delta x B, sum, C S, sum), 1 for each delta x,
    2 for each skip, 4 for bias, softplus, delta A and exp. Backward recomputes the states (3 each) and takes 11 more
    per state for the gradients of x, delta, A, B and C. The matrix form, which the backends use, does somewhat more.
    """
    per_head, per_channel, per_state = 4, 1 + 2 * D, 5
    if backward:
        per_head, per_channel, per_state = 3 * per_head, 3 * per_channel, 14
    return batch * time * heads * (channels * (per_state * d_state + per_channel) + per_head)


def _forward_flops(x, dt, A, B, C, D, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(x[0], x[1], x[2], x[3], B[3], D=D is not None)


def _backward_flops(dy, dfinal_state, x, dt, A, B, C, D, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(x[0], x[1], x[2], x[3], B[3], D=D is not None, backward=True)


flop_formulas.register(torch.ops.zoo.ssd_forward, _forward_flops)
flop_formulas.register(torch.ops.zoo.ssd_backward, _backward_flops)
