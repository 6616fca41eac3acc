"""wkv4 on a GPU: launches the kernels of `triton_kernels`.

Shape letters: B batch, T time, D channels, K = ceil(T / CHUNK) chunks.

Bytes: forward reads k and v and writes y once; backward reads k and v twice (the second time from cache), dy and the
checkpoints once, and writes dk and dv. Where time is cut into slices, both read once more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels import triton_tiles as tiles
from zoo.kernels.wkv4 import triton_kernels as kernels
from zoo.kernels.wkv4.op import wkv4_initial_state

INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)
"""Whether Triton's interpreter was on when the kernels were decorated: they run on CPU tensors then, and only there."""

CHUNK: int = tiles.CHUNK.value

BLOCK = 32
"""Channels of one program: one for each lane of its one warp."""

MIN_SLICE = 4 * CHUNK
"""Steps below which cutting time into slices costs more than it gains."""

LAUNCH: dict[str, Any] = {"W": BLOCK, "num_warps": 1, "enable_fp_fusion": True}


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _slice_steps(steps: int, programs: int, device: torch.device) -> int:
    """Cuts time into slices that run side by side if `programs` alone would leave schedulers of the device idle.

    A multiprocessor has 4 schedulers, so 4 one-warp programs are the least that can occupy it; 8 hide latency.
    """
    processors = _processors(device)
    slices = 1 if programs >= 4 * processors else triton.cdiv(8 * processors, programs)
    return max(MIN_SLICE, triton.cdiv(steps, slices * CHUNK) * CHUNK)


def _rows(x: Tensor) -> Tensor:
    """Keeps any batch and time strides, as of a view into a projection; each row must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As described in `op`."""
    batch, time, channels = k.shape
    w, u, k, v = w.contiguous(), u.contiguous(), _rows(k), _rows(v)
    segment_ids = None if segment_ids is None else segment_ids.contiguous()
    if initial_state is None:
        initial_state = wkv4_initial_state(batch, channels, device=k.device)
    initial_state = initial_state.float().contiguous()
    blocks = triton.cdiv(channels, BLOCK)
    slice_steps = _slice_steps(time, blocks * batch, k.device)
    slices = triton.cdiv(time, slice_steps)
    strides = (*k.stride()[:2], *v.stride()[:2])

    y = torch.empty((batch, time, channels), dtype=v.dtype, device=k.device)
    final_state = torch.empty((batch, 3, channels), device=k.device)
    chunks = (batch, triton.cdiv(time, CHUNK), 4, channels)
    checkpoints = torch.empty(chunks if save_checkpoints else (0,), device=k.device)
    with torch.cuda.device_of(k):
        slice_states = None
        if slices > 1:
            slice_states = torch.empty((batch, slices - 1, 5, channels), device=k.device)
            kernels.slice_kernel[(blocks, batch, slices - 1)](
                w, k, v, segment_ids, slice_states, time, channels, *strides, slice_steps, **LAUNCH
            )
        kernels.forward_kernel[(blocks, batch, slices)](
            w, u, k, v, initial_state, segment_ids, slice_states,
            y, final_state, checkpoints if save_checkpoints else None,
            time, channels, *strides, slice_steps, **LAUNCH,
        )  # fmt: skip
    return y, final_state, checkpoints


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    """As described in `op`; dw, du and the state's gradient are float32, dk and dv as their inputs."""
    batch, time, channels = k.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    dk, dv = empty(*k.shape, dtype=k.dtype), empty(*v.shape, dtype=v.dtype)
    w, u, k, v = w.contiguous(), u.contiguous(), _rows(k), _rows(v)
    segment_ids = None if segment_ids is None else segment_ids.contiguous()
    flow = empty(batch, 3, channels).zero_() if dfinal_state is None else dfinal_state.float().contiguous()
    blocks = triton.cdiv(channels, BLOCK)
    slice_steps = _slice_steps(time, blocks * batch, k.device)
    slices = triton.cdiv(time, slice_steps)
    scratch = empty(batch, slices, blocks, tiles.GROUPS.value, 4, BLOCK)
    dw_sums, du_sums = empty(batch * slices, channels), empty(batch * slices, channels)
    dinitial_state = empty(batch, 3, channels)
    sizes = (time, channels, *k.stride()[:2], *v.stride()[:2], slice_steps)
    with torch.cuda.device_of(k):
        slice_flows = None
        if slices > 1:
            slice_flows = empty(batch, slices, 3, channels)
            kernels.backward_kernel[(blocks, batch, slices - 1)](
                dy, None, w, u, k, v, segment_ids, checkpoints, slice_flows, scratch,
                None, None, None, None, None, *sizes, LOCAL=True, **LAUNCH,
            )  # fmt: skip
        kernels.backward_kernel[(blocks, batch, slices)](
            dy, flow, w, u, k, v, segment_ids, checkpoints, slice_flows, scratch,
            dk, dv, dw_sums, du_sums, dinitial_state, *sizes, LOCAL=False, **LAUNCH,
        )  # fmt: skip
    return dw_sums.sum(0), du_sums.sum(0), dk, dv, dinitial_state
