"""The selective scan on a GPU: launches the kernels of `triton_kernels`.

Shape letters: B batch, T time, D channels, N state size, K = ceil(T / CHUNK) chunks, P blocks of channels.

Bytes: forward reads u, dt, z and writes y once; everything else is smaller by a factor N / D or N / CHUNK. Backward
reads u and dt twice (the second time from cache), dy, z and the checkpoints once. Nothing of size B T D N exists.
dB and dC are sums over channels, which different programs own: each writes its share, and torch adds the shares in a
fixed order, so that two runs agree to the last bit. The shares of a whole sequence would take 8 N B T D / BLOCK bytes,
so that backward goes through time in windows of at most SUMS_BYTES.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels import triton_tiles as tiles
from zoo.kernels.selective_scan import triton_kernels as kernels

INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)
"""Whether Triton's interpreter was on when the kernels were decorated: they run on CPU tensors then, and only there."""

CHUNK: int = tiles.CHUNK.value

BLOCK = 16
"""Channels of one program of one warp. With N = 16 a thread holds 8 states: few enough registers and enough programs
for two warps per scheduler at B D = 16384 on 132 multiprocessors, enough independent work within each."""

SUMS_BYTES = 1 << 30
"""Upper bound of the memory for the shares of dB and dC."""

MIN_SLICE = 4 * CHUNK
"""Steps below which cutting time into slices costs more than it gains."""


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _slice_steps(steps: int, programs: int, device: torch.device) -> int:
    """Cuts time into slices that run side by side if `programs` alone would leave schedulers of the device idle.

    A multiprocessor has 4 schedulers, so 4 one-warp programs are the least that can occupy it; 8 hide latency. Slices
    cost a second reading of dt and u, so that a device which is full is left alone.
    """
    processors = _processors(device)
    slices = 1 if programs >= 4 * processors else triton.cdiv(8 * processors, programs)
    return max(MIN_SLICE, triton.cdiv(steps, slices * CHUNK) * CHUNK)


def launch_arguments(d_state: int, dt_softplus: bool) -> dict[str, Any]:
    """The arguments every kernel takes by name."""
    padded = max(4, triton.next_power_of_2(d_state))
    return {
        "N": d_state,
        "N_PAD": padded,
        "W": BLOCK,
        "SOFTPLUS": dt_softplus,
        "num_warps": max(1, padded * BLOCK // 256),  # more states go to more warps, not to more registers
        "enable_fp_fusion": True,
    }


def _rows(x: Tensor) -> Tensor:
    """Keeps any batch and time strides, as of a view into a projection; each row must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in (x.stride()[:2] if x is not None else (0, 0))]


def _swap(state: Tensor) -> Tensor:
    """(..., D, N) to the kernels' (..., N, D), or back."""
    return state.float().transpose(-1, -2).contiguous()


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As described in `op`. Checkpoints hold each (D, N) slab transposed, channels innermost."""
    batch, time, channels = u.shape
    d_state = A.shape[1]
    u, dt, B, C = _rows(u), _rows(dt), _rows(B.float()), _rows(C.float())
    z = None if z is None else _rows(z)
    D, dt_bias, segment_ids = _contiguous(D), _contiguous(dt_bias), _contiguous(segment_ids)
    A = _swap(A)
    grid = (triton.cdiv(channels, BLOCK), batch)
    slice_steps = _slice_steps(time, grid[0] * batch, u.device)
    slices = triton.cdiv(time, slice_steps)
    named = launch_arguments(d_state, dt_softplus)

    def states(*shape: int) -> Tensor:
        return torch.empty((*shape, d_state, channels), device=u.device)

    initial = states(batch).zero_() if initial_state is None else _swap(initial_state)
    y = torch.empty((batch, time, channels), dtype=u.dtype, device=u.device)
    final_state = states(batch)
    chunks = (batch, triton.cdiv(time, CHUNK), channels, d_state)
    checkpoints = torch.empty(chunks if save_checkpoints else (0,), device=u.device)
    with torch.cuda.device_of(u):
        slice_states = slice_decays = None
        if slices > 1:
            slice_states, slice_decays = states(batch, slices), states(batch, slices)
            kernels.slice_kernel[(*grid, slices - 1)](
                u, dt, A, B, None, dt_bias, segment_ids, slice_states, slice_decays,
                time, channels, *_strides(u, dt, B, None), 0, time, slice_steps, REVERSE=False, **named,
            )  # fmt: skip
        kernels.forward_kernel[(*grid, slices)](
            u, dt, A, B, C, D, z, dt_bias, initial, segment_ids, slice_states, slice_decays,
            y, final_state, checkpoints if save_checkpoints else None,
            time, channels, *_strides(u, dt, B, C, z), slice_steps, **named,
        )  # fmt: skip
    return y, _swap(final_state), checkpoints


def backward(
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
) -> tuple[Tensor | None, ...]:
    """As described in `op`; dA, dD, ddt_bias and the state's gradient are float32, the others as their inputs."""
    batch, time, channels = u.shape
    d_state = A.shape[1]

    def empty(*shape: int, like: Tensor | None = None) -> Tensor:
        return torch.empty(shape, dtype=torch.float32 if like is None else like.dtype, device=u.device)

    du, ddt, dB, dC = (empty(*x.shape, like=x) for x in (u, dt, B, C))
    dz = None if z is None else empty(*z.shape, like=z)
    dA, dskip, dbias = empty(channels, d_state).zero_(), empty(channels).zero_(), empty(channels).zero_()

    dy, u, dt, B, C = dy.contiguous(), _rows(u), _rows(dt), _rows(B.float()), _rows(C.float())
    z = None if z is None else _rows(z)
    D, dt_bias, segment_ids = _contiguous(D), _contiguous(dt_bias), _contiguous(segment_ids)
    A = _swap(A)
    blocks = triton.cdiv(channels, BLOCK)
    named = launch_arguments(d_state, dt_softplus)
    padded = named["N_PAD"]
    window = max(1, SUMS_BYTES // (8 * blocks * batch * padded * CHUNK)) * CHUNK
    window = min(window, triton.cdiv(time, CHUNK) * CHUNK)
    sums = empty(2, blocks, batch, window, padded)
    flow = empty(batch, d_state, channels).zero_() if dfinal_state is None else _swap(dfinal_state)

    with torch.cuda.device_of(u):
        for first in reversed(range(0, time, window)):
            last = min(first + window, time)
            slice_steps = _slice_steps(last - first, blocks * batch, u.device)
            slices = triton.cdiv(last - first, slice_steps)
            slice_states = slice_decays = None
            if slices > 1:
                slice_states, slice_decays = (empty(batch, slices, d_state, channels) for _ in range(2))
                kernels.slice_kernel[(blocks, batch, slices - 1)](
                    dy, dt, A, C, z, dt_bias, segment_ids, slice_states, slice_decays,
                    time, channels, *_strides(dy, dt, C, z), first, last, slice_steps, REVERSE=True, **named,
                )  # fmt: skip
            scratch = empty(batch, slices, blocks, tiles.GROUPS.value, padded, BLOCK)
            dA_sums = empty(batch * slices, blocks, padded, BLOCK)
            dskip_sums, dbias_sums = empty(batch * slices, channels), empty(batch * slices, channels)
            flow_before = torch.empty_like(flow)
            kernels.backward_kernel[(blocks, batch, slices)](
                dy, u, dt, A, B, C, D, z, dt_bias, checkpoints, segment_ids, flow, slice_states, slice_decays,
                scratch, du, ddt, dz, sums[0], sums[1], dA_sums, dskip_sums, dbias_sums, flow_before,
                time, channels, *_strides(u, dt, B, C, z), first, last, window, slice_steps, **named,
            )  # fmt: skip
            flow = flow_before
            dB[:, first:last], dC[:, first:last] = sums.sum(1)[:, :, : last - first, :d_state]
            dA += dA_sums.sum(0).transpose(1, 2).reshape(-1, padded)[:channels, :d_state]
            dskip += dskip_sums.sum(0)
            dbias += dbias_sums.sum(0)
    return (
        du,
        ddt,
        dA,
        dB,
        dC,
        None if D is None else dskip,
        dz,
        None if dt_bias is None else dbias,
        _swap(flow),
    )
