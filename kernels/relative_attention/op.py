"""Public face of relative attention: argument checks, choice of backend, registration with torch.

Shape letters: B batch, N segments, Q queries of a segment, H query heads, G key/value heads, K head width, M slots of
memory, R runs of slots, S distances.

Each backend is a module with two functions, which the custom ops below call:

    forward(q, p, k, v, memory_k, memory_v, r, segments, scale) -> (y, lse)
    backward(q, p, k, v, memory_k, memory_v, r, segments, scale, y, lse, dy)
        -> (dq, dp, dk, dv, memory_dk, memory_dv, dr)

The segments arrive with their values checked, as int64. Tensors arrive in their own dtypes and with any strides.
y (B, N, Q, H, K) has q's dtype and is contiguous. lse (B, N, Q, H) is the logarithm of each query's softmax
denominator, -inf where there is no query, in float32 (float64 for float64 inputs: `state_dtype`), contiguous. Gradients
may have any floating dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import backends, flop_formulas
from zoo.kernels.checks import check_rank, check_tensors, state_dtype
from zoo.kernels.errors import ZooError
from zoo.kernels.relative_attention.reference import reference
from zoo.kernels.relative_attention.segments import Segments, visible_pairs

backends.register(
    "relative_attention",
    [
        backends.Backend("numba", backends.numba),
        backends.Backend("torch", backends.anywhere),
        backends.Backend("reference", backends.anywhere),
    ],
)


@torch.library.custom_op("zoo::relative_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    p: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    r: Tensor,
    starts: Tensor,
    lengths: Tensor,
    counts: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # here and not in the public function, because torch.compile cannot trace a look at values
    segments = Segments(starts, lengths, counts)
    _check_values(q.shape[2], memory_k.shape[1], r.shape[0], segments)
    return backends.load("relative_attention", backend).forward(q, p, k, v, memory_k, memory_v, r, segments, scale)


@_forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=state_dtype(q))


@torch.library.custom_op("zoo::relative_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    p: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    r: Tensor,
    starts: Tensor,
    lengths: Tensor,
    counts: Tensor,
    scale: float,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = q, p, k, v, memory_k, memory_v, r
    segments = Segments(starts, lengths, counts)
    gradients = backends.load("relative_attention", backend).backward(*inputs, segments, scale, y, lse, dy)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, inputs, strict=True))


@_backward.register_fake
def _(q, p, k, v, memory_k, memory_v, r, *others):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, p, k, v, memory_k, memory_v, r))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = scale, backend
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dy, _):  # type: ignore[no-untyped-def]
    *tensors, y, lse = ctx.saved_tensors
    scale, backend = ctx.options
    gradients = torch.ops.zoo.relative_attention_backward(*tensors, scale, y, lse, dy, backend)
    return (*gradients, *(None,) * 5)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def relative_attention(
    q: Tensor,
    p: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    r: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attends from segments of queries to the segment so far and to the memory before it.

        logit_ij = scale (q_i . k_j + p_i . r_(distance of i and j))

    Distances count slots: the query itself is at distance 0, the token before it at 1, the newest slot of the segment's
    memory one further than the segment's first token, and so on through its runs (Transformer-XL, arXiv 1901.02860;
    compressed slots count like others, arXiv 1911.05507). Sums are in float32 (float64 for float64 inputs).

    Args:
        q: Queries that meet keys, (B, N, Q, H, K).
        p: Queries that meet positions, (B, N, Q, H, K).
        k: Keys of the segments themselves, (B, N, Q, G, K); G divides H, and query head h reads head floor(h G / H).
        v: Values of the segments themselves, (B, N, Q, G, K).
        memory_k: Keys of the memory, (B, M, G, K); M may be 0.
        memory_v: Values of the memory, (B, M, G, K).
        r: What stands for each distance from 0 on, (S, G, K): as many as the longest memory and its segment have slots.
        segments: Which slots of the memory each segment sees, and how many queries it has. On a CPU a value out of
            range is an error; on another device looking would be waiting, and the range is the caller's business.
        scale: Factor of the logits; 1 / sqrt(K) where absent.
        backend: `"auto"` or one of numba, torch, reference. A named backend that cannot run is an error.

    Returns:
        (B, N, Q, H, K) in q's dtype, 0 where there is no query; gradients flow to the first seven arguments, those of a
        key or value by its use as memory and as part of a segment apart. And the logarithm of each query's softmax
        denominator, (B, N, Q, H), -inf where there is no query; it has no gradient.

    Raises:
        ZooError: An argument has a wrong shape, dtype, device or value.
        BackendError: The named backend cannot run this call.
    """
    check_rank("relative_attention", "q", q, "B N Q H K")
    check_rank("relative_attention", "k", k, "B N Q G K")
    for name, tensor, letters in (("memory_k", memory_k, "B M G K"), ("r", r, "S G K")):
        if not isinstance(tensor, Tensor) or tensor.dim() != len(letters.split()):
            raise ZooError(f"relative_attention: {name} is not of shape ({letters}): pass such a tensor")
    sizes = dict(zip("BNQHK", q.shape, strict=True)) | {"G": k.shape[3], "M": memory_k.shape[1], "S": r.shape[0]}
    own, memory = "B N Q G K", "B M G K"
    shapes = {"q": (q, "B N Q H K"), "p": (p, "B N Q H K"), "k": (k, own), "v": (v, own)}
    shapes |= {"memory_k": (memory_k, memory), "memory_v": (memory_v, memory), "r": (r, "S G K")}
    expected = {name: (tensor, letters, "float") for name, (tensor, letters) in shapes.items()}
    check_tensors("relative_attention", sizes, q.device, expected)
    if sizes["H"] % sizes["G"]:
        raise ZooError(
            f"relative_attention: {sizes['H']} query heads do not divide into {sizes['G']} key/value heads: change H "
            f"or G"
        )
    _check_segments(segments, sizes, q.device)
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    chosen = backends.resolve("relative_attention", backend, q.device.type)
    segments = Segments(*(x.long() for x in segments))
    if chosen == "reference":
        if not torch.compiler.is_compiling():
            _check_values(sizes["Q"], sizes["M"], sizes["S"], segments)
        y, lse = reference(q, p, k, v, memory_k, memory_v, r, segments, scale)
        return y, lse.detach()
    y, lse = torch.ops.zoo.relative_attention_forward(q, p, k, v, memory_k, memory_v, r, *segments, scale, chosen)
    return y, lse


def _check_segments(segments: Segments, sizes: dict[str, int], device: torch.device) -> None:
    if not isinstance(segments, Segments):
        raise ZooError(f"relative_attention: segments is a {type(segments).__name__}: pass a zoo.kernels.Segments")
    for name, letters in (("starts", "B N R"), ("lengths", "B N R"), ("counts", "B N")):
        tensor = getattr(segments, name)
        check_rank("relative_attention", name, tensor, letters)
        own = sizes | {"B": 1} if tensor.shape[0] == 1 else sizes  # rows that are all alike may be one
        own = own | {"R": segments.starts.shape[-1]}
        check_tensors("relative_attention", own, device, {name: (tensor, letters, "integer")})


def _check_values(n_queries: int, n_slots: int, n_distances: int, segments: Segments) -> None:
    starts, lengths, counts = segments
    if starts.device.type != "cpu":
        return  # a value would have to come from the device first
    if int(counts.min()) < 0 or int(counts.max()) > n_queries:
        raise ZooError(
            f"relative_attention: counts run from {int(counts.min())} to {int(counts.max())}, expected 0 to "
            f"{n_queries}, the queries of a segment: clamp counts"
        )
    if int(lengths.min()) < 0:
        raise ZooError(f"relative_attention: lengths has the entry {int(lengths.min())}: expected none below 0")
    there = lengths > 0
    if bool((there & ((starts < 0) | (starts + lengths > n_slots))).any()):
        raise ZooError(f"relative_attention: a run reaches beyond the {n_slots} slots of the memory: clamp its start")
    longest = int((lengths.sum(-1) + counts).max())
    if longest > n_distances:
        raise ZooError(
            f"relative_attention: r has {n_distances} distances and a query sees as far as {longest - 1}: pass "
            f"{longest} of them"
        )


def flops(segments: Segments, batch: int, heads: int, width: int, *, backward: bool = False) -> int:
    """Counts the floating-point operations of one call: those of its matrix products.

    Per pair of a query and what it sees, 4 K for the logit and 2 K for the output; backward 16 K: the logit again, and
    the gradients of the share, of q, p, k, v and r.

    Args:
        segments: See `Segments`; its values decide.
        batch: Batch rows B.
        heads: Query heads H.
        width: Head width K.
        backward: Whether to count the backward pass instead.
    """
    rows = max(x.shape[0] for x in segments)
    return (16 if backward else 6) * width * heads * visible_pairs(segments) * (batch // rows)


def _forward_flops(q, p, k, v, memory_k, memory_v, r, starts, lengths, counts, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return _flops_of_call(q, Segments(starts, lengths, counts), backward=False)


def _backward_flops(q, p, k, v, memory_k, memory_v, r, starts, lengths, counts, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return _flops_of_call(q, Segments(starts, lengths, counts), backward=True)


def _flops_of_call(q: Tensor, segments: Segments, *, backward: bool) -> int:
    if q.device.type == "meta" or isinstance(q, torch._subclasses.FakeTensor):
        raise ZooError("relative_attention: its FLOPs depend on the segments: count a call with real tensors")
    return flops(segments, q.shape[0], q.shape[3], q.shape[4], backward=backward)


flop_formulas.register(torch.ops.zoo.relative_attention_forward, _forward_flops, raw=True)
flop_formulas.register(torch.ops.zoo.relative_attention_backward, _backward_flops, raw=True)
