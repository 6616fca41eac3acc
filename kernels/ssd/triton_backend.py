"""The recurrence of Mamba-2 on a GPU: launches the kernels of `triton_kernels`.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size, K = ceil(T / CHUNK) chunks.

Forward is three kernels: what each chunk adds to the state, the states passed from chunk to chunk, the outputs.
Backward is the first two again, back in time, and one for the gradients. What there is one of per step and head (step
sizes, decays, their logarithms) is left to torch. dB and dC are sums over the heads of a group, which different
programs own: each writes its share, (B, T, H, N), and torch adds the shares in a fixed order, so that two runs agree to
the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.ssd import triton_kernels as kernels
from zoo.kernels.ssd.steps import segment_numbers, step_gradients, step_sizes

INTERPRETED = not isinstance(kernels.output_kernel, triton.runtime.JITFunction)
"""Whether Triton's interpreter was on when the kernels were decorated: they run on CPU tensors then, and only there."""

CHUNK: int = kernels.CHUNK.value
LOG2_E = 1.4426950408889634
BLOCK = 1024
"""Numbers of a state that one program passes along."""


def launch_arguments(dtype: torch.dtype, n_channels: int, d_state: int) -> dict[str, Any]:
    """The arguments that the kernels with products take by name.

    States and weights outgrow fp16, so that its products are those of TF32, which keeps as many digits.
    """
    narrow = dtype == torch.bfloat16
    return {
        "P": n_channels,
        "P_PAD": max(16, triton.next_power_of_2(n_channels)),
        "N": d_state,
        "W": 32,
        "TYPE": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": 4 if narrow and n_channels <= 64 else 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


class _Steps:
    """What there is one of per step and head, (B, H, K CHUNK), and the decay of each chunk, (B, H, K)."""

    def __init__(self, delta: Tensor, A: Tensor, segments: Tensor | None) -> None:
        lacking = -delta.shape[1] % CHUNK
        padded = F.pad(delta, (0, 0, 0, lacking)).transpose(1, 2).unflatten(2, (-1, CHUNK))  # (B, H, K, CHUNK)
        # In float64, and in two parts, because small differences of large sums count.
        sums = (padded.double() * (A.double() * LOG2_E)[:, None, None]).cumsum(3)
        head, tail, whole = sums, sums[..., -1:] - sums, sums[..., -1]
        self.fresh = None
        if segments is not None:
            number = torch.cat([segments, segments[:, -1:].expand(-1, lacking)], dim=1).unflatten(1, (-1, CHUNK))
            before = F.pad(number[:, :-1, -1:], (0, 0, 1, 0))  # (B, K, 1), the segment of the state that enters
            head = head.masked_fill((number != before)[:, None], -torch.inf)
            tail = tail.masked_fill((number != number[..., -1:])[:, None], -torch.inf)
            whole = whole.masked_fill((number[..., -1:] != before)[:, None, :, 0], -torch.inf)
            self.fresh = number[..., 0] != before[..., 0]  # (B, K), whether the first step begins a segment
        self.delta = padded.contiguous()
        self.head, self.tail, self.whole = (x.exp2().float().contiguous() for x in (head, tail, whole))
        self.high = sums.float().contiguous()
        self.low = (sums - self.high).float().contiguous()


def _joined(x: Tensor, n_time: int) -> Tensor:
    """(B, H, K CHUNK) -> (B, T, H)."""
    return x.flatten(2)[..., :n_time].transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """Keeps any other strides, as of a view into a projection; each row must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pass(states: Tensor, whole: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """Turns what each chunk adds into the state that enters it, in place; returns the last state."""
    n_batch, chunks, n_heads = states.shape[:3]
    size = states[0, 0, 0].numel()
    last = torch.empty_like(states[:, 0])
    kernels.pass_kernel[(n_batch * n_heads, triton.cdiv(size, BLOCK))](
        states, whole, first, last, chunks, n_heads, SIZE=size, BLOCK=BLOCK, REVERSE=reverse
    )
    return last


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
    """As described in `op`."""
    n_batch, n_time, n_heads, n_channels = x.shape
    n_groups, n_state = B.shape[2:]
    x, B, C = _rows(x), _rows(B), _rows(C)
    segments = segment_numbers(segment_ids)
    steps = _Steps(step_sizes(dt, dt_bias, dt_softplus, dt_limit, torch.float32), A, segments)
    chunks = steps.whole.shape[2]
    named = launch_arguments(x.dtype, n_channels, n_state)
    sizes = (n_time, chunks, n_heads, n_groups)
    grid = (chunks, n_batch * n_heads)
    states = torch.empty((n_batch, chunks, n_heads, n_channels, n_state), device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernels.state_kernel[(*grid, triton.cdiv(n_state, named["W"]))](
            x, steps.tail, steps.delta, B, states, *sizes, *x.stride()[:3], *B.stride()[:3], **named
        )
        first = None if initial_state is None else initial_state.float().contiguous()
        final_state = _pass(states, steps.whole, first, reverse=False)
        if steps.fresh is not None:
            states.masked_fill_(steps.fresh[:, :, None, None, None], 0.0)
        kernels.output_kernel[grid](
            x, B, C, None if D is None else D.contiguous(), steps.delta, steps.head, steps.high, steps.low, segments,
            states, y, *sizes, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], **named,
        )  # fmt: skip
    return y, final_state, states if save_checkpoints else torch.empty(0, device=x.device)


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
    """As described in `op`; dx has x's dtype, the others are float32."""
    n_batch, n_time, n_heads, n_channels = x.shape
    n_groups, n_state = B.shape[2:]
    dy, x, B, C = dy.contiguous(), _rows(x), _rows(B), _rows(C)
    segments = segment_numbers(segment_ids)
    steps = _Steps(step_sizes(dt, dt_bias, dt_softplus, dt_limit, torch.float32), A, segments)
    chunks = steps.whole.shape[2]
    named = launch_arguments(x.dtype, n_channels, n_state)
    sizes = (n_time, chunks, n_heads, n_groups)
    grid = (chunks, n_batch * n_heads)
    dstates = torch.empty(checkpoints.shape, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddelta, dlogs = torch.empty_like(steps.delta), torch.empty_like(steps.delta)
    dB, dC = (torch.empty((n_batch, n_time, n_heads, n_state), device=x.device) for _ in range(2))
    dskip = torch.empty_like(steps.whole)
    with torch.cuda.device_of(x):
        kernels.state_kernel[(*grid, triton.cdiv(n_state, named["W"]))](
            dy, steps.head, None, C, dstates, *sizes, *dy.stride()[:3], *C.stride()[:3], **named
        )
        first = None if dfinal_state is None else dfinal_state.float().contiguous()
        dinitial_state = _pass(dstates, steps.whole, first, reverse=True)
        kernels.gradient_kernel[grid](
            dy, x, B, C, None if D is None else D.contiguous(), steps.delta, steps.head, steps.tail, steps.whole,
            steps.high, steps.low, segments, checkpoints, dstates, dx, ddelta, dlogs, dB, dC, dskip,
            *sizes, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], **named,
        )  # fmt: skip
    dlogs = _joined(dlogs, n_time)
    ddelta = torch.addcmul(_joined(ddelta, n_time), dlogs, A.float())
    ddt, ddt_bias = step_gradients(ddelta, dt, dt_bias, dt_softplus, dt_limit)
    return (
        dx,
        ddt,
        (dlogs * _joined(steps.delta, n_time)).sum((0, 1)),
        dB.unflatten(2, (n_groups, -1)).sum(3),
        dC.unflatten(2, (n_groups, -1)).sum(3),
        None if D is None else dskip.sum((0, 2)),
        ddt_bias,
        dinitial_state,
    )
