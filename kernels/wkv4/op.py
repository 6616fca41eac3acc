"""Public face of the WKV operator of RWKV-4: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, D channels, K = ceil(T / CHUNK) chunks.

Each compiled backend is a module with two functions, which the custom ops below call:

    forward(w, u, k, v, initial_state, segment_ids, save_checkpoints) -> (y, final_state, checkpoints)
    backward(dy, dfinal_state, w, u, k, v, segment_ids, checkpoints) -> (dw, du, dk, dv, dinitial_state)

An absent optional is None, in and out; dfinal_state may be None too. Tensors arrive in their own dtypes and with any
strides; dy is contiguous. y has v's dtype and is contiguous, final_state and checkpoints have the state's dtype
(`state_dtype`), gradients may have any floating dtype: they are cast to their input's dtype here. dinitial_state is
always returned; backward drops it where there was no initial_state.
checkpoints (B, K, 4, D) holds the state at the START of each chunk, before a reset that falls on its first step:
numerator, denominator, base and age of the exponent (README). It is an empty tensor of shape (0,) where
save_checkpoints is False.

triton_backend also has `INTERPRETED: bool`, whether Triton's interpreter was on when its kernels were decorated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.wkv4.reference import NEUTRAL, reference

CHUNK = 32
"""Steps between stored states: the backward pass recomputes the states of one chunk at a time."""


backends.register(
    "wkv4",
    [
        # numba stands before triton because a CPU can have both: under its interpreter Triton is only for tests.
        backends.Backend("numba", backends.numba),
        backends.Backend("triton", backends.triton("wkv4")),
        backends.Backend("reference", backends.anywhere),
    ],
)


def wkv4_initial_state(
    batch: int, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the state before any token, (B, 3, D): numerator and denominator 0, exponent -1e38."""
    state = torch.zeros(batch, 3, channels, device=device, dtype=dtype)
    state[:, 2] = NEUTRAL
    return state


@torch.library.custom_op("zoo::wkv4_forward", mutates_args=())
def _forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load("wkv4", backend).forward(w, u, k, v, initial_state, segment_ids, save_checkpoints)


@_forward.register_fake
def _(w, u, k, v, initial_state, segment_ids, save_checkpoints, backend):  # type: ignore[no-untyped-def]
    batch, time, channels = k.shape
    chunks = (batch, -(-time // CHUNK), 4, channels)
    dtype = state_dtype(v)
    return (
        v.new_empty(v.shape),
        v.new_empty((batch, 3, channels), dtype=dtype),
        v.new_empty(chunks if save_checkpoints else (0,), dtype=dtype),
    )


@torch.library.custom_op("zoo::wkv4_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = backends.load("wkv4", backend).backward(
        dy.contiguous(), dfinal_state, w, u, k, v, segment_ids, checkpoints
    )
    return tuple(
        gradient.to(like.dtype).contiguous()
        for gradient, like in zip(gradients, (w, u, k, v, checkpoints), strict=True)
    )


@_backward.register_fake
def _(dy, dfinal_state, w, u, k, v, segment_ids, checkpoints, backend):  # type: ignore[no-untyped-def]
    state = checkpoints.new_empty((k.shape[0], 3, k.shape[2]))
    return tuple(like.new_empty(like.shape) for like in (w, u, k, v, state))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    w, u, k, v, initial_state, segment_ids, _, backend = inputs
    checkpoints = output[2]
    ctx.save_for_backward(w, u, k, v, segment_ids, checkpoints)
    ctx.backend = backend
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    w, u, k, v, segment_ids, checkpoints = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return (None,) * 8
    if dy is None:
        dy = torch.zeros_like(v)
    *gradients, dinitial_state = torch.ops.zoo.wkv4_backward(
        dy, dfinal_state, w, u, k, v, segment_ids, checkpoints, ctx.backend
    )
    dinitial_state = None if ctx.state_dtype is None else dinitial_state.to(ctx.state_dtype)
    return (*gradients, dinitial_state, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Averages values over the past with exponentially decaying weights, as RWKV-4 does (arXiv 2305.13048, eq. 16).

    Per batch row and channel:

        y_t = (sum_{i<t} exp((t-1-i) w + k_i) v_i + exp(u + k_t) v_t) / (the same sum without the values)

    The state (p, q, o) stands for the two sums P = p exp(o) and Q = q exp(o); o is the running maximum of the
    exponents, so that keys of any size neither overflow nor vanish. Only P and Q have a meaning. Gradients treat o as a
    constant scale: none reaches it and none comes from it, which gives exact gradients to everything else as long as
    what is done with a state does not depend on how P and Q are split, such as carrying it into the next call.

    Args:
        w: Log of the decay per step, (D,); negative: -exp(time_decay).
        u: Bonus of the current token, (D,); RWKV calls it time_first.
        k: Keys, logs of the tokens' weights, (B, T, D).
        v: Values, (B, T, D).
        initial_state: State before the first step, (B, 3, D) holding p, q, o; `wkv4_initial_state` where absent. It
            belongs to each row's first segment.
        segment_ids: Document of each token, (B, T) integers. The state starts anew wherever the id changes.
        backend: `"auto"` or one of numba, triton, reference. A named backend that cannot run is an error.

    Returns:
        `(y, final_state)`: y (B, T, D) in v's dtype; final_state (B, 3, D), the state after the last step, float32
        (float64 if v is). Gradients flow from both, to every floating input.

    Raises:
        ZooError: An argument has a wrong shape, dtype or device.
        BackendError: The named backend cannot run this call.
    """
    check_rank("wkv4", "k", k, "B T D")
    check_tensors(
        "wkv4",
        {"B": k.shape[0], "T": k.shape[1], "D": k.shape[2], "3": 3},
        k.device,
        {
            "k": (k, "B T D", "float"),
            "v": (v, "B T D", "float"),
            "w": (w, "D", "float"),
            "u": (u, "D", "float"),
            "initial_state": (initial_state, "B 3 D", "float"),
            "segment_ids": (segment_ids, "B T", "integer"),
        },
    )
    features = ("float64",) * (v.dtype == torch.float64)
    chosen = backends.resolve("wkv4", backend, k.device.type, features)
    if chosen == "reference":
        return reference(w, u, k, v, initial_state, segment_ids)
    inputs = (w, u, k, v, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, final_state, _ = torch.ops.zoo.wkv4_forward(w, u, k, v, initial_state, segment_ids, save, chosen)
    return y, final_state


def flops(batch: int, time: int, channels: int, *, backward: bool = False) -> int:
    """Counts the floating-point operations of one call; an exp, a maximum or a division counts as one.

    Forward, per token and channel: 12 for the output (u + k, maximum, 2 differences, 2 exps, 3 for the numerator, 2 for
    the denominator, division), 11 for the state (o + w, maximum, 2 differences, 2 exps, 3 for p, 2 for q).
    Backward recomputes them and takes 3 for the gradients of numerator and denominator, 3 for v's, 6 for k's, 1 for
    u's, 6 for w's and 5 for the state's.
    """
    return batch * time * channels * (47 if backward else 23)


def _forward_flops(w, u, k, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(*k)


def _backward_flops(dy, dfinal_state, w, u, k, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(*k, backward=True)


flop_formulas.register(torch.ops.zoo.wkv4_forward, _forward_flops)
flop_formulas.register(torch.ops.zoo.wkv4_backward, _backward_flops)
