"""The recurrence of Mamba-2 as batched matrix products in torch, on any device: the matrix form of the README.

Shape letters: B batch, T time, K chunks of Q steps, G groups of R heads (H = G R), P channels per head, N state size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.checks import state_dtype
from zoo.kernels.ssd.op import CHUNK
from zoo.kernels.ssd.steps import segment_numbers, step_gradients, step_sizes


def _chunked(x: Tensor, n_groups: int) -> Tensor:
    """(B, T, H or G, ...) -> (B, K, G, Q, R, ...), zeros where T ends within a chunk."""
    n_time = x.shape[1]
    steps = min(CHUNK, n_time)
    if lacking := -n_time % steps:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, lacking))
    x = x.unflatten(1, (-1, steps)).unflatten(3, (n_groups, -1))
    return x.transpose(2, 3)


def _joined(x: Tensor, n_time: int) -> Tensor:
    """The inverse of `_chunked`."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :n_time]


@dataclass
class _Decays:
    """Products of decays in each chunk; those across a reset are 0.

    Attributes:
        within: From after step s to t, (B, K, G, R, Q, Q) as [t, s]; 0 for s > t.
        head: From the chunk's start to t, (B, K, G, Q, R).
        tail: From after s to the chunk's end, (B, K, G, Q, R).
        whole: From start to end, (B, K, G, R).
    """

    within: Tensor
    head: Tensor
    tail: Tensor
    whole: Tensor


def _decays(delta: Tensor, A: Tensor, segments: Tensor | None, n_groups: int) -> _Decays:
    # In float64, because small differences of large sums count; split, because float64 tiles cost twice the time.
    sums = _chunked((delta.double() * A.double()), n_groups).cumsum(3)  # (B, K, G, Q, R)
    last = sums[:, :, :, -1:]
    head, tail, whole = sums.to(delta.dtype), (last - sums).to(delta.dtype), last[:, :, :, 0].to(delta.dtype)
    high = head.transpose(3, 4)  # (B, K, G, R, Q)
    low = (sums.transpose(3, 4) - high).to(delta.dtype)
    within = high[..., :, None] - high[..., None, :]
    within += low[..., :, None] - low[..., None, :]
    steps = torch.arange(within.shape[-1], device=delta.device)
    hidden = steps[:, None] < steps
    if segments is not None:
        number = _chunked(segments[..., None], 1)[..., 0]  # (B, K, 1, Q)
        n_time = segments.shape[1]
        if lacking := number.shape[1] * number.shape[3] - n_time:
            number[:, -1, :, -lacking:] = segments[:, -1, None, None]
        end = number[..., -1:]
        before = F.pad(end[:, :-1], (0, 0, 0, 0, 1, 0))  # the segment of the state that enters the chunk
        hidden = hidden | (number[..., :, None] != number[..., None, :])[:, :, :, None]
        head = head.masked_fill((number != before)[..., None], -torch.inf)
        tail = tail.masked_fill((number != end)[..., None], -torch.inf)
        whole = whole.masked_fill(end != before, -torch.inf)
    return _Decays(within.masked_fill_(hidden, -torch.inf).exp_(), head.exp(), tail.exp(), whole.exp())


def _entering(initial: Tensor, local: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Passes states (B, G, R, P, N) from chunk to chunk, in place: returns those at the starts, and the one at the end.

    local (B, K, G, R, P, N) is what each chunk adds to the state that enters it.
    """
    state = initial
    for k in range(local.shape[1]):
        decay = whole[:, k, :, :, None, None]
        # Not a product where a segment starts, for the same reason.
        after = torch.where(decay == 0, local[:, k], torch.addcmul(local[:, k], decay, state))
        local[:, k] = state
        state = after
    return local, state


def _leaving(final: Tensor, local: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The same for gradients, backwards: returns those of the states at the ends, and the one at the start."""
    ends, start = _entering(final, local.flip(1), whole.flip(1))
    return ends.flip(1), start


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(y, final_state, checkpoints)`; see the contract in `op`."""
    dtype = state_dtype(x)
    n_time, n_groups = x.shape[1], B.shape[2]
    delta = step_sizes(dt, dt_bias, dt_softplus, dt_limit, dtype)
    decays = _decays(delta, A.to(dtype), segment_numbers(segment_ids), n_groups)
    drive = _chunked(x.to(dtype) * delta[..., None], n_groups)  # (B, K, G, Q, R, P)
    B, C = (_chunked(value.to(dtype), n_groups)[..., 0, :] for value in (B, C))  # (B, K, G, Q, N)

    weights = (C @ B.mT)[:, :, :, None] * decays.within  # (B, K, G, R, Q, Q)
    y = (weights @ drive.transpose(3, 4)).transpose(3, 4)
    del weights
    local = ((drive * decays.tail[..., None]).flatten(4).mT @ B).unflatten(3, drive.shape[4:])  # (B, K, G, R, P, N)
    shape = (x.shape[0], n_groups, *local.shape[3:])
    initial = x.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype).reshape(shape)
    states, final_state = _entering(initial, local, decays.whole)
    # A state that no step of the chunk sees: even an infinite one stays in its own document.
    states.masked_fill_((decays.head[:, :, :, 0] == 0)[..., None, None], 0.0)
    carried = (C @ states.flatten(3, 4).mT).unflatten(4, drive.shape[4:])
    y = _joined(torch.addcmul(y, carried, decays.head[..., None]), n_time)
    if D is not None:
        y = y + x.to(dtype) * D.to(dtype)[:, None]
    checkpoints = states.flatten(2, 3).contiguous() if save_checkpoints else x.new_empty(0, dtype=dtype)
    return y.to(x.dtype).contiguous(), final_state.flatten(1, 2).contiguous(), checkpoints


def backward(
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
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, dt, A, B, C, D, dt_bias and the initial state; see the contract in `op`."""
    dtype = state_dtype(x)
    n_time, n_groups = x.shape[1], B.shape[2]
    delta = step_sizes(dt, dt_bias, dt_softplus, dt_limit, dtype)
    decays = _decays(delta, A.to(dtype), segment_numbers(segment_ids), n_groups)
    x, dy = x.to(dtype), dy.to(dtype)
    drive, dout = _chunked(x * delta[..., None], n_groups), _chunked(dy, n_groups)  # (B, K, G, Q, R, P)
    B, C = (_chunked(value.to(dtype), n_groups)[..., 0, :] for value in (B, C))  # (B, K, G, Q, N)
    heads = drive.shape[4:]
    states = checkpoints.unflatten(2, (n_groups, -1))  # (B, K, G, R, P, N)

    # Through the states: what the outputs send to the entering state, what the later chunks send to the leaving one.
    dcarried = dout * decays.head[..., None]
    local = (dcarried.flatten(4).mT @ C).unflatten(3, heads)
    shape = (x.shape[0], n_groups, *heads, B.shape[4])
    dfinal = x.new_zeros(shape) if dfinal_state is None else dfinal_state.to(dtype).reshape(shape)
    dstates, dinitial = _leaving(dfinal, local, decays.whole)
    flow = (dstates * states).sum((-1, -2)) * decays.whole  # (B, K, G, R)
    dC = dcarried.flatten(4) @ states.flatten(3, 4)
    flow_head = ((C @ states.flatten(3, 4).mT).unflatten(4, heads) * dcarried).sum(-1)  # (B, K, G, Q, R)
    kept = drive * decays.tail[..., None]
    dB = kept.flatten(4) @ dstates.flatten(3, 4)
    dkept = (B @ dstates.flatten(3, 4).mT).unflatten(4, heads)
    flow_tail = (dkept * kept).sum(-1)
    ddrive = dkept.mul_(decays.tail[..., None])

    # Within the chunk: y = weights drive, weights = scores * decays.
    dout, drive = dout.transpose(3, 4), drive.transpose(3, 4)  # (B, K, G, R, Q, P)
    weights = (C @ B.mT)[:, :, :, None] * decays.within
    ddrive += (weights.mT @ dout).transpose(3, 4)
    dweights = dout @ drive.mT
    dscores = (dweights * decays.within).sum(3)  # (B, K, G, Q, Q)
    dC += dscores @ B
    dB += dscores.mT @ C
    # A decay at r is in every weight [t, s] with s < r <= t. Rows less columns would be one sum less, and lose digits.
    before = dweights.mul_(weights).tril_(-1).cumsum(-1)  # over s, [t, r-1]
    passing = F.pad(before[..., :-1].tril(-1).sum(-2), (1, 0)).transpose(3, 4)  # (B, K, G, Q, R)
    dlog = (
        passing + flow_head.flip(3).cumsum(3).flip(3) + (flow_tail.cumsum(3) - flow_tail) + flow[:, :, :, None]
    )  # gradient of delta A

    dlog, ddrive = _joined(dlog, n_time), _joined(ddrive, n_time)
    ddelta = (ddrive * x).sum(-1) + dlog * A.to(dtype)
    dx = ddrive * delta[..., None]
    if D is not None:
        dx = torch.addcmul(dx, dy, D.to(dtype)[:, None])
    ddt, ddt_bias = step_gradients(ddelta, dt, dt_bias, dt_softplus, dt_limit)
    return (
        dx,
        ddt,
        (dlog * delta).sum((0, 1)),
        _joined(dB[..., None, :], n_time),
        _joined(dC[..., None, :], n_time),
        None if D is None else (dy * x).sum((0, 1, 3)),
        ddt_bias,
        dinitial.flatten(1, 2),
    )
