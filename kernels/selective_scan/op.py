"""Public face of the selective scan: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, D channels, N state size, K = ceil(T / CHUNK) chunks.

Each compiled backend is a module with two functions, which the custom ops below call:

    forward(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, save_checkpoints)
        -> (y, final_state, checkpoints)
    backward(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, checkpoints)
        -> (du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state)

An absent optional is None, in and out; dfinal_state may be None too. Tensors arrive in their own dtypes and with any
strides (z, B and C are often views into a projection); dy is contiguous. y has u's dtype and is contiguous,
final_state and checkpoints have the state's dtype (`state_dtype`), gradients may have any floating dtype: they are
cast to their input's dtype here. dinitial_state is always returned; backward drops it where there was no initial_state.
checkpoints (B, K, D, N) holds what the backend's own backward needs to restart each chunk: the state at the START of
the chunk, before a reset that falls on its first step. The order inside one (D, N) slab is the backend's business.
It is an empty tensor of shape (0,) where save_checkpoints is False.

triton_backend also has `INTERPRETED: bool`, whether Triton's interpreter was on when its kernels were decorated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.selective_scan.reference import reference

CHUNK = 32
"""Steps between stored states: the backward pass recomputes the states of one chunk at a time."""


backends.register(
    "selective_scan",
    [
        backends.Backend(
            "cuda",
            backends.cuda(
                "mamba_ssm",
                "mamba-ssm's selective_scan_fn",
                ["initial_state", "segment_ids", "float64", "d_state > 256"],
            ),
        ),
        # numba stands before triton because a CPU can have both: under its interpreter Triton is only for tests.
        backends.Backend("numba", backends.numba),
        backends.Backend("triton", backends.triton("selective_scan")),
        backends.Backend("reference", backends.anywhere),
    ],
)


@torch.library.custom_op("zoo::selective_scan_forward", mutates_args=())
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load("selective_scan", backend).forward(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, save_checkpoints
    )


@_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, save_checkpoints, backend):  # type: ignore[no-untyped-def]
    batch, time, channels = u.shape
    state = (batch, channels, A.shape[1])
    chunks = (batch, -(-time // CHUNK), channels, A.shape[1])
    dtype = state_dtype(u)
    return (
        u.new_empty(u.shape),
        u.new_empty(state, dtype=dtype),
        u.new_empty(chunks if save_checkpoints else (0,), dtype=dtype),
    )


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = backends.load("selective_scan", backend).backward(
        dy.contiguous(), dfinal_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, checkpoints
    )
    # A custom op cannot return None, so an absent optional has an empty gradient.
    return tuple(
        u.new_empty(0) if like is None else gradient.to(like.dtype).contiguous()
        for gradient, like in zip(gradients, (u, dt, A, B, C, D, z, dt_bias, checkpoints), strict=True)
    )  # type: ignore[return-value]


@_backward.register_fake
def _(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, checkpoints, backend):  # type: ignore[no-untyped-def]
    state = checkpoints.new_empty((u.shape[0], u.shape[2], A.shape[1]))
    return tuple(
        u.new_empty(0) if like is None else like.new_empty(like.shape)
        for like in (u, dt, A, B, C, D, z, dt_bias, state)
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, _, backend = inputs
    checkpoints = output[2]
    ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, segment_ids, checkpoints)
    ctx.dt_softplus, ctx.backend = dt_softplus, backend
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    u, dt, A, B, C, D, z, dt_bias, segment_ids, checkpoints = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return (None,) * 13
    if dy is None:
        dy = torch.zeros_like(u)
    *gradients, dinitial_state = torch.ops.zoo.selective_scan_backward(
        dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, segment_ids, checkpoints, ctx.backend
    )
    present = [
        g if like is not None else None for g, like in zip(gradients, (u, dt, A, B, C, D, z, dt_bias), strict=True)
    ]
    dinitial_state = None if ctx.state_dtype is None else dinitial_state.to(ctx.state_dtype)
    return (*present, None, dinitial_state, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the selective state-space recurrence of Mamba-1 (arXiv 2312.00752, algorithm 2) over time.

    Per batch row, channel d and state n, with delta = softplus(dt + dt_bias) (softplus only if `dt_softplus`):

        h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] B_t[n] u_t[d]
        y_t[d]    = (sum_n C_t[n] h_t[d, n] + D[d] u_t[d]) silu(z_t[d])

    Args:
        u: Input, (B, T, D).
        dt: Step size before bias and softplus, (B, T, D).
        A: Continuous-time decay, (D, N); negative for a stable recurrence.
        B: Input projection, (B, T, N).
        C: Output projection, (B, T, N).
        D: Skip weight, (D,).
        z: Gate, (B, T, D).
        dt_bias: Added to `dt` before the softplus, (D,).
        dt_softplus: Whether the step size passes through a softplus.
        initial_state: State before the first step, (B, D, N); zero where absent. Belongs to each row's first segment.
        segment_ids: Document of each token, (B, T) integers. The state is reset to zero wherever the id changes.
        backend: `"auto"` or one of cuda, triton, numba, reference. A named backend that cannot run is an error.

    Returns:
        `(y, final_state)`: y (B, T, D) in u's dtype; final_state (B, D, N), the state after the last step, float32
        (float64 if u is). Gradients flow from both, to every floating input.

    Raises:
        ZooError: An argument has a wrong shape, dtype or device.
        BackendError: The named backend cannot run this call.
    """
    check_rank("selective_scan", "u", u, "B T D")
    check_rank("selective_scan", "B", B, "B T N")
    check_tensors(
        "selective_scan",
        {"B": u.shape[0], "T": u.shape[1], "D": u.shape[2], "N": B.shape[2]},
        u.device,
        {
            "u": (u, "B T D", "float"),
            "dt": (dt, "B T D", "float"),
            "A": (A, "D N", "float"),
            "B": (B, "B T N", "float"),
            "C": (C, "B T N", "float"),
            "D": (D, "D", "float"),
            "z": (z, "B T D", "float"),
            "dt_bias": (dt_bias, "D", "float"),
            "initial_state": (initial_state, "B D N", "float"),
            "segment_ids": (segment_ids, "B T", "integer"),
        },
    )
    chosen = backends.resolve("selective_scan", backend, u.device.type, _features(u, A, initial_state, segment_ids))
    if chosen == "reference":
        return reference(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids)
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    save = differentiable and chosen != "cuda"  # the package's backward starts from the inputs alone
    y, final_state, _ = torch.ops.zoo.selective_scan_forward(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, save, chosen
    )
    return y, final_state


def _features(u: Tensor, A: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None) -> backends.Features:
    features = []
    if u.dtype == torch.float64:
        features.append("float64")
    if initial_state is not None:
        features.append("initial_state")
    if segment_ids is not None:
        features.append("segment_ids")
    if A.shape[1] > 256:
        features.append("d_state > 256")
    return tuple(features)


def flops(
    batch: int, time: int, channels: int, d_state: int, *, D: bool = True, z: bool = True, backward: bool = False
) -> int:
    """Counts the floating-point operations of one call; an exp, a softplus or a silu counts as one.

    Forward, per token and channel: 7 for each state (delta A, exp, decay, delta u B, sum, C h, sum), 1 for delta u,
    2 for the bias and softplus of the step size, 2 for the skip, 2 for the gate.
    Backward recomputes the states (5 each) and takes 15 more per state for the gradients of u, delta, A, B and C.
    """
    per_channel = 3 + 2 * D + 2 * z
    per_state = 7
    if backward:
        per_channel, per_state = 3 * per_channel, 20
    return batch * time * channels * (per_state * d_state + per_channel)


def _forward_flops(u, dt, A, B, C, D, z, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(u[0], u[1], u[2], A[1], D=D is not None, z=z is not None)


def _backward_flops(dy, dfinal_state, u, dt, A, B, C, D, z, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(u[0], u[1], u[2], A[1], D=D is not None, z=z is not None, backward=True)


flop_formulas.register(torch.ops.zoo.selective_scan_forward, _forward_flops)
flop_formulas.register(torch.ops.zoo.selective_scan_backward, _backward_flops)
