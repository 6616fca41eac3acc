"""Public face of sparse attention: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges.

Each backend is a module with two functions, which the custom ops below call:

    forward(q, k, v, lo, hi, dilation, far, tile, far_length, far_counts, first, last, scale) -> (y, lse)
    backward(q, k, v, lo, hi, dilation, far, tile, far_length, far_counts, first, last, scale, y, lse, dy)
        -> (dq, dk, dv)

The pattern arrives as its fields (see `Pattern`), its values checked, its integers as int64; an absent optional is
None, dilation a list. Tensors arrive in their own dtypes and with any strides. y (B, T, H, K) has q's dtype and is
contiguous. lse (B, H, T) is the logarithm of each query's softmax denominator, -inf where it sees nothing, in float32
(float64 for float64 inputs: `state_dtype`), contiguous. Gradients may have any floating dtype.

cuda_backend is another matter: `attend(q, k, v, pattern, scale) -> y` stands in the place of the ops, autograd and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.errors import ZooError
from zoo.kernels.sparse_attention.pattern import Pattern, batch_of, visible_pairs
from zoo.kernels.sparse_attention.reference import reference


def _flex(device_type: str, features: backends.Features) -> str | None:
    """`Backend.why_not` of FlexAttention."""
    if device_type != "cuda":
        return f"needs a CUDA device, the tensors are on {device_type}"
    if "float64" in features:
        return "torch's flex_attention does not take float64"
    if "lse" in features:
        return "gives no log-sum-exp"
    return backends.missing("triton", "'subquadratic-zoo[cuda]'")


backends.register(
    "sparse_attention",
    [
        backends.Backend("cuda", _flex),
        backends.Backend("numba", backends.numba),
        backends.Backend("torch", backends.anywhere),
        backends.Backend("reference", backends.anywhere),
    ],
)


def _pattern(lo: Tensor, hi: Tensor, dilation: Sequence[int] | None, *others: Any) -> Pattern:
    """The pattern again, of the parts that an operator of torch can take."""
    return Pattern(lo, hi, None if dilation is None else tuple(dilation), *others)


@torch.library.custom_op("zoo::sparse_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    dilation: Sequence[int] | None,
    far: Tensor | None,
    tile: int,
    far_length: int,
    far_counts: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # here and not in the public function, because torch.compile cannot trace a look at values
    _check_values(k.shape[1], lo, hi, far, far_counts)
    pattern = _pattern(lo, hi, dilation, far, tile, far_length, far_counts, first, last)
    return backends.load("sparse_attention", backend).forward(q, k, v, pattern, scale)


@_forward.register_fake
def _(q, k, v, *others):  # type: ignore[no-untyped-def]
    batch, time, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, time), dtype=state_dtype(q))


@torch.library.custom_op("zoo::sparse_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    dilation: Sequence[int] | None,
    far: Tensor | None,
    tile: int,
    far_length: int,
    far_counts: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    scale: float,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = _pattern(lo, hi, dilation, far, tile, far_length, far_counts, first, last)
    gradients = backends.load("sparse_attention", backend).backward(q, k, v, pattern, scale, y, lse, dy)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, (q, k, v), strict=True))


@_backward.register_fake
def _(q, k, v, *others):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, lo, hi, dilation, far, tile, far_length, far_counts, first, last, scale, backend = inputs
    y, lse = output
    ctx.save_for_backward(q, k, v, lo, hi, far, far_counts, first, last, y, lse)
    ctx.options = dilation, tile, far_length, scale, backend
    ctx.mark_non_differentiable(lse)


def _autograd(ctx, dy, _):  # type: ignore[no-untyped-def]
    q, k, v, lo, hi, far, far_counts, first, last, y, lse = ctx.saved_tensors
    dilation, tile, far_length, scale, backend = ctx.options
    gradients = torch.ops.zoo.sparse_attention_backward(
        q, k, v, lo, hi, dilation, far, tile, far_length, far_counts, first, last, scale, y, lse, dy, backend
    )
    return (*gradients, *(None,) * 11)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, scale: float | None = None, backend: str = "auto"
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attends to the keys that a pattern shows to each query, in memory linear in their number.

    One softmax over near and far keys together; a far range that counts c times has ln c added to its logits. A query
    that sees no key gets 0, and no gradient. Sums are in float32 (float64 for float64 inputs).

    Longformer (arXiv 2004.05150), BigBird (arXiv 2007.14062), sliding windows and packed documents are patterns; the
    online softmax by tiles is FlashAttention's (arXiv 2205.14135).

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, S, G, K); G divides H, and query head h reads key/value head floor(h G / H).
        v: Values, (B, S, G, K).
        pattern: Which keys each query sees. Its tensors have no gradient. On a CPU a value out of range is an error;
            on another device looking would be waiting, and the range is the caller's business.
        scale: Factor of the logits; 1 / sqrt(K) where absent.
        backend: `"auto"` or one of cuda, numba, torch, reference. A named backend that cannot run is an error.
        return_lse: Also return the logarithm of each query's softmax denominator, which has no gradient: what joins
            the results of two sets of keys.

    Returns:
        (B, T, H, K) in q's dtype. Gradients flow to q, k and v. With `return_lse` also (B, H, T) in float32 (float64),
        -inf where a query sees nothing.

    Raises:
        ZooError: An argument has a wrong shape, dtype, device or value.
        BackendError: The named backend cannot run this call.
    """
    check_rank("sparse_attention", "q", q, "B T H K")
    check_rank("sparse_attention", "k", k, "B S G K")
    if not isinstance(pattern, Pattern):
        raise ZooError(f"sparse_attention: pattern is a {type(pattern).__name__}: pass a zoo.kernels.Pattern")
    sizes = {"B": q.shape[0], "T": q.shape[1], "H": q.shape[2], "K": q.shape[3], "S": k.shape[1], "G": k.shape[2]}
    expected = {"q": (q, "B T H K", "float"), "k": (k, "B S G K", "float"), "v": (v, "B S G K", "float")}
    check_tensors("sparse_attention", sizes, q.device, expected)
    if sizes["H"] % sizes["G"]:
        raise ZooError(
            f"sparse_attention: {sizes['H']} query heads do not divide into {sizes['G']} key/value heads: change H or G"
        )
    _check_pattern(pattern, sizes, q.device)
    lo, hi = pattern.lo.long(), pattern.hi.long()
    far, first, last = (None if x is None else x.long() for x in (pattern.far, pattern.first, pattern.last))
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    features = tuple(name for name, on in (("float64", q.dtype == torch.float64), ("lse", return_lse)) if on)
    chosen = backends.resolve("sparse_attention", backend, q.device.type, features)
    if chosen == "reference":
        if not torch.compiler.is_compiling():
            _check_values(sizes["S"], lo, hi, far, pattern.far_counts)
        y, lse = reference(q, k, v, pattern, scale)
        return (y, lse.detach()) if return_lse else y
    if chosen == "cuda":
        from zoo.kernels.sparse_attention import cuda_backend  # late, because it loads the compiler

        return cuda_backend.attend(q, k, v, pattern._replace(lo=lo, hi=hi, far=far, first=first, last=last), scale)
    y, lse = torch.ops.zoo.sparse_attention_forward(
        q,
        k,
        v,
        lo,
        hi,
        pattern.dilation,
        far,
        pattern.tile,
        pattern.far_length,
        pattern.far_counts,
        first,
        last,
        scale,
        chosen,
    )
    return (y, lse) if return_lse else y


def _check_pattern(pattern: Pattern, sizes: dict[str, int], device: torch.device) -> None:
    for name in ("tile", "far_length"):
        value = getattr(pattern, name)
        if not isinstance(value, int) or value < 1:
            raise ZooError(f"sparse_attention: {name} is {value!r}, expected a whole number from 1: change {name}")
    dilation = pattern.dilation
    if dilation is not None:
        if not isinstance(dilation, (tuple, list)) or len(dilation) != sizes["H"]:
            raise ZooError(
                f"sparse_attention: dilation is {dilation!r}, expected one number for each of the {sizes['H']} query "
                "heads: pass a tuple of that length"
            )
        if not all(isinstance(d, int) and d >= 1 for d in dilation):
            raise ZooError(f"sparse_attention: dilation is {dilation!r}, expected whole numbers from 1: 1 is none")
    if pattern.far_counts is not None and pattern.far is None:
        raise ZooError("sparse_attention: far_counts without far: pass the ranges that they count, or leave them out")
    sizes = {**sizes, "N": -(-sizes["T"] // pattern.tile)}
    if isinstance(pattern.far, Tensor) and pattern.far.dim() == 4:
        sizes["M"] = pattern.far.shape[3]
    elif pattern.far is not None:
        check_rank("sparse_attention", "far", pattern.far, "B|1 H|1 N M")

    for name, letters, kind in (
        ("lo", "B T", "integer"),
        ("hi", "B T", "integer"),
        ("far", "B H N M", "integer"),
        ("far_counts", "B H N M", "float"),
        ("first", "B T", "integer"),
        ("last", "B T", "integer"),
    ):
        tensor = getattr(pattern, name)
        if tensor is None and name not in ("lo", "hi"):
            continue
        if not isinstance(tensor, Tensor):
            raise ZooError(f"sparse_attention: {name} is a {type(tensor).__name__}: pass a torch.Tensor ({letters})")
        # rows and heads that are all alike may be one
        alike = [letter for letter, size in zip(letters.split(), tensor.shape, strict=False) if size == 1]
        own = {**sizes, **{letter: 1 for letter in alike if letter in "BH"}}
        check_tensors("sparse_attention", own, device, {name: (tensor, letters, kind)})
    if pattern.far_counts is not None and pattern.far is not None and pattern.far_counts.shape != pattern.far.shape:
        raise ZooError(
            f"sparse_attention: far_counts has shape {tuple(pattern.far_counts.shape)}, far {tuple(pattern.far.shape)}:"
            " give both the same shape"
        )


def _check_values(n_keys: int, lo: Tensor, hi: Tensor, far: Tensor | None, far_counts: Tensor | None) -> None:
    if lo.device.type != "cpu":
        return  # a value would have to come from the device first
    for name, tensor, least, most in (("lo", lo, 0, n_keys), ("hi", hi, 0, n_keys), ("far", far, -1, n_keys - 1)):
        if tensor is None or not tensor.numel():
            continue
        low, high = (int(end) for end in tensor.aminmax())
        if low < least or high > most:
            raise ZooError(
                f"sparse_attention: {name} runs from {low} to {high}, expected {least} to {most} for {n_keys} keys: "
                f"clamp {name}"
            )
    if far_counts is not None and not bool(((far_counts >= 0) & (far_counts < torch.inf)).all()):
        raise ZooError("sparse_attention: far_counts has a negative or infinite entry or NaN: pass numbers from 0")


def flops(pattern: Pattern, batch: int, heads: int, keys: int, width: int, *, backward: bool = False) -> int:
    """Counts the floating-point operations of one call: those of its matrix products.

    Per pair of query and key that sees it, 2 K for the logit and 2 K for the output; backward 10 K: the logit again,
    and the gradients of the share, of q, k and v.

    Args:
        pattern: See `Pattern`; its values decide.
        batch: Batch rows B.
        heads: Query heads H.
        keys: Keys S.
        width: Head width K.
        backward: Whether to count the backward pass instead.
    """
    pairs = visible_pairs(pattern, heads, keys) * (batch // batch_of(pattern))
    return (10 if backward else 4) * width * pairs


def _flops_of_call(q: Tensor, k: Tensor, pattern: Pattern, *, backward: bool) -> int:
    if q.device.type == "meta" or isinstance(q, torch._subclasses.FakeTensor):
        raise ZooError("sparse_attention: its FLOPs depend on the pattern's values: count a call with real tensors")
    return flops(pattern, q.shape[0], q.shape[2], k.shape[1], q.shape[3], backward=backward)


def _forward_flops(q, k, v, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops_of_call(q, k, Pattern(*args[:9]), backward=False)


def _backward_flops(q, k, v, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _flops_of_call(q, k, Pattern(*args[:9]), backward=True)


flop_formulas.register(torch.ops.zoo.sparse_attention_forward, _forward_flops, raw=True)
flop_formulas.register(torch.ops.zoo.sparse_attention_backward, _backward_flops, raw=True)
