"""Public face of RWKV-7's recurrence: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, H heads, K key channels and V value channels of a head, C = ceil(T / CHUNK) chunks.

Each compiled backend is a module with two functions, which the custom ops below call:

    forward(r, w, k, v, a, b, initial_state, segment_ids, save_checkpoints) -> (y, final_state, checkpoints)
    backward(dy, dfinal_state, r, w, k, v, a, b, initial_state, segment_ids, checkpoints)
        -> (dr, dw, dk, dv, da, db, dinitial_state)

An absent optional is None; dfinal_state may be None too. Tensors arrive in their own dtypes and with any strides; dy is
contiguous. y has v's dtype and is contiguous, final_state and checkpoints have the state's dtype (`state_dtype`),
gradients may have any floating dtype: they are cast to their input's dtype here. dinitial_state is always returned;
it is dropped where there was no initial_state.
checkpoints (B, C, H, V', K), V' being V rounded up to a multiple of VALUES, holds what the backend's own backward needs
to restart each chunk: the state at the START of the chunk, before a reset that falls on its first step. The order
inside one (V', K) slab is the backend's business. It is an empty tensor of shape (0,) where save_checkpoints is False.

triton_backend also has `INTERPRETED: bool`, whether Triton's interpreter was on when its kernels were decorated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.wkv7.reference import reference

CHUNK = 32
"""Steps between stored states: the backward pass recomputes the states of one chunk at a time."""

VALUES = 32
"""Value channels that the CPU loops take at once; states in checkpoints are padded to a multiple of them."""


backends.register(
    "wkv7",
    [
        backends.Backend(
            "cuda", backends.cuda("fla", "fla-core's chunk_rwkv7", ["segment_ids", "float32", "float64", "K > 256"])
        ),
        # numba stands before triton because a CPU can have both: under its interpreter Triton is only for tests.
        backends.Backend("numba", backends.numba),
        backends.Backend("triton", backends.triton("wkv7")),
        backends.Backend("reference", backends.anywhere),
    ],
)


def checkpoint_shape(r: Tensor, v: Tensor, save: bool) -> tuple[int, ...]:
    """Returns the shape of the stored states, see the head of this file."""
    batch, time, heads, keys = r.shape
    return (batch, -(-time // CHUNK), heads, -(-v.shape[3] // VALUES) * VALUES, keys) if save else (0,)


@torch.library.custom_op("zoo::wkv7_forward", mutates_args=())
def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load("wkv7", backend).forward(r, w, k, v, a, b, initial_state, segment_ids, save_checkpoints)


@_forward.register_fake
def _(r, w, k, v, a, b, initial_state, segment_ids, save_checkpoints, backend):  # type: ignore[no-untyped-def]
    batch, _, heads, keys = r.shape
    dtype = state_dtype(v)
    return (
        v.new_empty(v.shape),
        v.new_empty((batch, heads, v.shape[3], keys), dtype=dtype),
        v.new_empty(checkpoint_shape(r, v, save_checkpoints), dtype=dtype),
    )


@torch.library.custom_op("zoo::wkv7_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = backends.load("wkv7", backend).backward(
        dy.contiguous(), dfinal_state, r, w, k, v, a, b, initial_state, segment_ids, checkpoints
    )
    dtypes = (*(x.dtype for x in (r, w, k, v, a, b)), state_dtype(v))
    pairs = zip(gradients, dtypes, strict=True)
    return tuple(gradient.to(dtype).contiguous() for gradient, dtype in pairs)


@_backward.register_fake
def _(dy, dfinal_state, r, w, k, v, a, b, initial_state, segment_ids, checkpoints, backend):  # type: ignore[no-untyped-def]
    batch, _, heads, keys = r.shape
    state = v.new_empty((batch, heads, v.shape[3], keys), dtype=state_dtype(v))
    return (*(x.new_empty(x.shape) for x in (r, w, k, v, a, b)), state)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, initial_state, segment_ids, _, backend = inputs
    checkpoints = output[2]
    ctx.save_for_backward(*tensors, initial_state, segment_ids, checkpoints)
    ctx.backend = backend
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, _):  # type: ignore[no-untyped-def]
    *tensors, initial_state, segment_ids, checkpoints = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return (None,) * 10
    if dy is None:
        dy = torch.zeros_like(tensors[3])
    *gradients, dinitial_state = torch.ops.zoo.wkv7_backward(
        dy, dfinal_state, *tensors, initial_state, segment_ids, checkpoints, ctx.backend
    )
    dinitial_state = None if initial_state is None else dinitial_state.to(initial_state.dtype)
    return (*gradients, dinitial_state, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence of RWKV-7 (arXiv 2503.14456, section 4) over time, in its general form.

    Per batch row and head, the state S (V, K) decays along its keys, is changed by a matrix of rank one, and takes up
    the new value; what is read for the change is the state before the step:

        S_t = S_{t-1} (diag(exp w_t) + a_t b_t^T) + v_t k_t^T
        y_t = S_t r_t

    RWKV-7 has a = -kappa and b = kappa * (in-context learning rate), kappa being the normalised removal key.

    Args:
        r: Receptance, what is read from the state, (B, T, H, K).
        w: Logarithm of the decay, (B, T, H, K); at most 0 for a state that does not grow.
        k: Key, (B, T, H, K).
        v: Value, (B, T, H, V).
        a: What is read from the old state for the change, (B, T, H, K).
        b: Where the change goes, (B, T, H, K).
        initial_state: State before the first step, (B, H, V, K); zero where absent. Belongs to the row's first segment.
        segment_ids: Document of each token, (B, T) integers. The state is reset to zero wherever the id changes.
        backend: `"auto"` or one of cuda, triton, numba, reference. A named backend that cannot run is an error.

    Returns:
        `(y, final_state)`: y (B, T, H, V) in v's dtype; final_state (B, H, V, K), the state after the last step,
        float32 (float64 if v is). Gradients flow from both, to every floating input.

    Raises:
        ZooError: An argument has a wrong shape, dtype or device.
        BackendError: The named backend cannot run this call.
    """
    check_rank("wkv7", "r", r, "B T H K")
    check_rank("wkv7", "v", v, "B T H V")
    check_tensors(
        "wkv7",
        dict(zip("BTHKV", (*r.shape, v.shape[3]), strict=True)),
        r.device,
        {
            "r": (r, "B T H K", "float"),
            "w": (w, "B T H K", "float"),
            "k": (k, "B T H K", "float"),
            "v": (v, "B T H V", "float"),
            "a": (a, "B T H K", "float"),
            "b": (b, "B T H K", "float"),
            "initial_state": (initial_state, "B H V K", "float"),
            "segment_ids": (segment_ids, "B T", "integer"),
        },
    )
    chosen = backends.resolve("wkv7", backend, r.device.type, _features(r, v, segment_ids))
    if chosen == "reference":
        return reference(r, w, k, v, a, b, initial_state, segment_ids)
    inputs = (r, w, k, v, a, b, initial_state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    save = differentiable and chosen != "cuda"  # the package's backward starts from the inputs alone
    y, final_state, _ = torch.ops.zoo.wkv7_forward(r, w, k, v, a, b, initial_state, segment_ids, save, chosen)
    return y, final_state


def _features(r: Tensor, v: Tensor, segment_ids: Tensor | None) -> backends.Features:
    features = []
    if v.dtype in (torch.float32, torch.float64):
        features.append(str(v.dtype).removeprefix("torch."))
    if segment_ids is not None:
        features.append("segment_ids")
    if r.shape[3] > 256:
        features.append("K > 256")
    return tuple(features)


def flops(batch: int, time: int, heads: int, keys: int, values: int, *, backward: bool = False) -> int:
    """Counts the floating-point operations of one call; an exp counts as one.

    Forward, per token and head: 9 for each entry of the state (S a, decay, rank-one change, new value, S r), an exp
    for each key channel. Backward recomputes the states (7 each) and takes 19 more per entry: 2 for each of the
    gradients of r, w, k, v, a, b, of S a and of y's path into the state, 3 to carry the state's gradient back.
    """
    per_entry = 26 if backward else 9
    return batch * time * heads * keys * (per_entry * values + 1)


def _forward_flops(r, w, k, v, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(r[0], r[1], r[2], r[3], v[3])


def _backward_flops(dy, dfinal_state, r, w, k, v, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return flops(r[0], r[1], r[2], r[3], v[3], backward=True)


flop_formulas.register(torch.ops.zoo.wkv7_forward, _forward_flops)
flop_formulas.register(torch.ops.zoo.wkv7_backward, _backward_flops)
