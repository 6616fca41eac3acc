"""Public face of landmark attention: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width.

Each backend is a module with two functions, which the custom ops below call:

    forward(q, k, v, slots, begins, ends, block, scale) -> (y, lse)
    backward(q, k, v, slots, begins, ends, block, scale, y, lse, dy) -> (dq, dk, dv)

Slots, begins and ends arrive checked and as int64, ends or None. Tensors arrive in their own dtypes and with any
strides. y (B, T, H, K) has q's dtype and is contiguous. lse (B, H, T) is the logarithm of the denominator of each
query's softmax over its own block and the landmarks of others, -inf where it sees nothing, in float32 (float64 for
float64 inputs: `state_dtype`), contiguous. Gradients may have any floating dtype.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.errors import ZooError
from zoo.kernels.landmark_attention.reference import reference

backends.register(
    "landmark_attention",
    [
        backends.Backend("numba", backends.numba),
        backends.Backend("torch", backends.anywhere),
        backends.Backend("reference", backends.anywhere),
    ],
)


@torch.library.custom_op("zoo::landmark_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor | None,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # here and not in the public function, because torch.compile cannot trace a look at values
    _check_values(k.shape[1], slots, begins, ends, block)
    return backends.load("landmark_attention", backend).forward(q, k, v, slots, begins, ends, block, scale)


@_forward.register_fake
def _(q, k, v, *others):  # type: ignore[no-untyped-def]
    batch, time, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, time), dtype=state_dtype(q))


@torch.library.custom_op("zoo::landmark_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor | None,
    block: int,
    scale: float,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.load("landmark_attention", backend)
    gradients = module.backward(q, k, v, slots, begins, ends, block, scale, y, lse, dy)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, (q, k, v), strict=True))


@_backward.register_fake
def _(q, k, v, *others):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, block, scale, backend = inputs
    y, lse = output
    ctx.save_for_backward(*tensors, y, lse)
    ctx.options = block, scale, backend
    ctx.mark_non_differentiable(lse)


def _autograd(ctx, dy, _):  # type: ignore[no-untyped-def]
    *tensors, y, lse = ctx.saved_tensors
    block, scale, backend = ctx.options
    gradients = torch.ops.zoo.landmark_attention_backward(*tensors, block, scale, y, lse, dy, backend)
    return (*gradients, *(None,) * 6)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@overload
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor | None = None,
    *,
    block: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor | None = None,
    *,
    block: int,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor | None = None,
    *,
    block: int,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attends to the tokens of a document by blocks, each of which ends with a landmark (arXiv 2305.16300).

    From where a document begins, `block` ordinary tokens and then their landmark are one block, the next ones the next.
    A query's first softmax runs over the ordinary tokens of its own block and the landmarks of the other blocks that it
    sees. What it gives to a landmark is shared out among the ordinary tokens of that block, by a softmax of their own.
    Values of landmarks are never used. Sums are in float32 (float64 for float64 inputs).

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, S, G, K); G divides H, and query head h reads key/value head floor(h G / H).
        v: Values, (B, S, G, K).
        slots: Where each query stands among the keys, (B|1, T) integers from 0 to S - 1; -1: it sees nothing, its
            result is 0 and has no gradient. On a CPU a value out of range is an error; on another device looking would
            be waiting, and the range is the caller's business.
        begins: Where its document begins, (B|1, T) integers from 0 to its slot.
        ends: Absent: a query sees its own block up to itself, and the blocks before. Else one past the last slot of its
            document, (B|1, T): it sees all of it. Then the last block may be short; it ends with its landmark too.
        block: Ordinary tokens of a block.
        scale: Factor of the logits; 1 / sqrt(K) where absent.
        backend: `"auto"` or one of numba, torch, reference. A named backend that cannot run is an error.
        return_lse: Also return the logarithm of the first softmax's denominator, which has no gradient: what joins the
            results of two sets of blocks.

    Returns:
        (B, T, H, K) in q's dtype. Gradients flow to q, k and v. With `return_lse` also (B, H, T) in float32 (float64).

    Raises:
        ZooError: An argument has a wrong shape, dtype, device or value.
        BackendError: The named backend cannot run this call.
    """
    check_rank("landmark_attention", "q", q, "B T H K")
    check_rank("landmark_attention", "k", k, "B S G K")
    sizes = {"B": q.shape[0], "T": q.shape[1], "H": q.shape[2], "K": q.shape[3], "S": k.shape[1], "G": k.shape[2]}
    expected = {"q": (q, "B T H K", "float"), "k": (k, "B S G K", "float"), "v": (v, "B S G K", "float")}
    check_tensors("landmark_attention", sizes, q.device, expected)
    if sizes["H"] % sizes["G"]:
        raise ZooError(
            f"landmark_attention: {sizes['H']} query heads do not divide into {sizes['G']} key/value heads: "
            "change H or G"
        )
    if not isinstance(block, int) or block < 1:
        raise ZooError(f"landmark_attention: block is {block!r}, expected a whole number from 1: change block")
    for name, x in (("slots", slots), ("begins", begins), ("ends", ends)):
        alike = isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] == 1  # rows that are all alike may be one
        own = {**sizes, "B": 1} if alike else sizes
        check_tensors("landmark_attention", own, q.device, {name: (x, "B T", "integer")})
    slots, begins, ends = slots.long(), begins.long(), None if ends is None else ends.long()
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    features = ("float64",) if q.dtype == torch.float64 else ()
    chosen = backends.resolve("landmark_attention", backend, q.device.type, features)
    if chosen == "reference":
        if not torch.compiler.is_compiling():
            _check_values(sizes["S"], slots, begins, ends, block)
        y, lse = reference(q, k, v, slots, begins, ends, block, scale)
        lse = lse.detach()
    else:
        y, lse = torch.ops.zoo.landmark_attention_forward(q, k, v, slots, begins, ends, block, scale, chosen)
    return (y, lse) if return_lse else y


def _check_values(n_keys: int, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int) -> None:
    if slots.device.type != "cpu":
        return  # a value would have to come from the device first
    seeing = slots >= 0
    if bool(((slots < -1) | (slots >= n_keys)).any()):
        raise ZooError(
            f"landmark_attention: slots run from {int(slots.min())} to {int(slots.max())}, expected -1 to {n_keys - 1} "
            f"for {n_keys} keys: clamp slots"
        )
    if bool((seeing & ((begins < 0) | (begins > slots))).any()):
        raise ZooError("landmark_attention: a document begins behind a query of it or before 0: change begins")
    if ends is not None and bool((seeing & ((ends <= slots) | (ends > n_keys))).any()):
        raise ZooError("landmark_attention: a document ends before a query of it or behind the keys: change ends")
    if ends is not None and bool((seeing & ((ends - begins) % (block + 1) == 1)).any()):
        raise ZooError("landmark_attention: the last block of a document is a landmark without a token: change ends")


def flops(
    slots: Tensor, begins: Tensor, ends: Tensor | None, block: int, heads: int, width: int, *, backward: bool = False
) -> int:
    """Counts the floating-point operations of one call: those of its matrix products.

    Per pair of a query and an ordinary token that it sees, 2 K for the logit and 2 K for the output; backward 10 K: the
    logit again, and the gradients of the share, of q, k and v. Per landmark of another block 2 K, backward 6 K.

    Args:
        slots: See `landmark_attention`, but (B, T): one row for each.
        begins: Likewise.
        ends: Likewise.
        block: See `landmark_attention`.
        heads: Query heads H.
        width: Head width K.
        backward: Whether to count the backward pass instead.
    """
    seeing, size = slots >= 0, block + 1
    if ends is None:
        marks, place = (slots - begins) // size, (slots - begins) % size
        tokens = marks * block + (place + 1).clamp(max=block)
    else:
        blocks = (ends - begins + block) // size
        marks, tokens = blocks - 1, ends - begins - blocks
    n_tokens, n_marks = (int((x * seeing).sum()) for x in (tokens, marks))
    return heads * width * ((10 if backward else 4) * n_tokens + (6 if backward else 2) * n_marks)


def _flops_of_call(q: Tensor, slots: Tensor, begins: Tensor, ends: Tensor | None, block: int, *, backward: bool) -> int:
    if q.device.type == "meta" or isinstance(q, torch._subclasses.FakeTensor):
        raise ZooError("landmark_attention: its FLOPs depend on the slots' values: count a call with real tensors")
    slots, begins = (x.expand(q.shape[:2]) for x in (slots, begins))
    ends = None if ends is None else ends.expand(q.shape[:2])
    return flops(slots, begins, ends, block, q.shape[2], q.shape[3], backward=backward)


def _forward_flops(q, k, v, slots, begins, ends, block, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops_of_call(q, slots, begins, ends, block, backward=False)


def _backward_flops(q, k, v, slots, begins, ends, block, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops_of_call(q, slots, begins, ends, block, backward=True)


flop_formulas.register(torch.ops.zoo.landmark_attention_forward, _forward_flops, raw=True)
flop_formulas.register(torch.ops.zoo.landmark_attention_backward, _backward_flops, raw=True)
