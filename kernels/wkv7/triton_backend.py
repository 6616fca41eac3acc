"""RWKV-7's recurrence on a GPU: launches the kernels of `triton_kernels`.

Shape letters: B batch, T time, H heads, K key channels, V value channels, C = ceil(T / CHUNK) chunks.

Bytes: forward reads r, w, k, a, b once for every BLOCK value channels of a head (from the second time on from cache),
v once, and writes y. Backward reads them twice. Nothing of size B T H V K exists.
The gradients of r, w, k, a, b are sums over value channels, which different programs own: each writes its share, and
torch adds the shares in a fixed order, so that two runs agree to the last bit. Backward goes through time in windows
whose shares take at most SUMS_BYTES.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.wkv7 import triton_kernels as kernels
from zoo.kernels.wkv7.op import CHUNK, checkpoint_shape

INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)
"""Whether Triton's interpreter was on when the kernels were decorated: they run on CPU tensors then, and only there."""

BLOCK = 16
"""Value channels of one program. At K = 64 one warp holds their state in 32 registers of each thread."""

SUMS_BYTES = 1 << 30
"""Upper bound of the memory for the shares of the gradients of r, w, k, a, b."""


def launch_arguments(keys: int) -> dict[str, Any]:
    """The arguments every kernel takes by name."""
    padded = max(16, triton.next_power_of_2(keys))
    return {
        "K": keys,
        "K_PAD": padded,
        "W": BLOCK,
        "CHUNK": CHUNK,
        "num_warps": max(1, padded * BLOCK // 1024),  # more keys go to more warps, not to more registers
        "enable_fp_fusion": True,
    }


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Keeps any strides over batch, time and heads; each row must be contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As described in `op`. A slab of checkpoints keeps (V', K) as its layout; rows from V on are never written."""
    batch, time, heads, keys = r.shape
    values = v.shape[3]
    steps = _rows(r, w, k, v, a, b)
    state = (batch, heads, values, keys)
    initial = torch.zeros(state, device=v.device) if initial_state is None else initial_state.float().contiguous()
    y = torch.empty((batch, time, heads, values), dtype=v.dtype, device=v.device)
    final_state = torch.empty(state, device=v.device)
    checkpoints = torch.empty(checkpoint_shape(r, v, save_checkpoints), device=v.device)
    with torch.cuda.device_of(v):
        kernels.forward_kernel[(triton.cdiv(values, BLOCK), heads, batch)](
            *steps, initial, None if segment_ids is None else segment_ids.contiguous(),
            y, final_state, checkpoints if save_checkpoints else None,
            time, heads, values, checkpoint_shape(r, v, True)[3], *_strides(*steps), **launch_arguments(keys),
        )  # fmt: skip
    return y, final_state, checkpoints


def backward(
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
) -> tuple[Tensor, ...]:
    """As described in `op`; dv has v's dtype, the others are float32."""
    batch, time, heads, keys = r.shape
    values = v.shape[3]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=v.device)

    steps = _rows(r, w, k, v, a, b)
    segment_ids = None if segment_ids is None else segment_ids.contiguous()
    state = (batch, heads, values, keys)
    flow = torch.zeros(state, device=v.device) if dfinal_state is None else dfinal_state.float().contiguous()
    gradients = [empty(batch, time, heads, keys) for _ in range(5)]  # of r, w, k, a, b
    dv = torch.empty((batch, time, heads, values), dtype=v.dtype, device=v.device)
    blocks = triton.cdiv(values, BLOCK)
    named = launch_arguments(keys)
    window = max(1, SUMS_BYTES // (20 * blocks * batch * heads * keys * CHUNK)) * CHUNK
    window = min(window, triton.cdiv(time, CHUNK) * CHUNK)
    sums = empty(5, blocks, batch, window, heads, keys)
    scratch = empty(batch * heads * blocks, CHUNK, BLOCK, named["K_PAD"])
    reads = empty(batch * heads * blocks, CHUNK, BLOCK)
    with torch.cuda.device_of(v):
        for first in reversed(range(0, time, window)):
            last = min(first + window, time)
            flow_before = torch.empty_like(flow)
            kernels.backward_kernel[(blocks, heads, batch)](
                dy, *steps, checkpoints, segment_ids, flow,
                scratch, reads, *sums, dv, flow_before,
                time, heads, values, checkpoints.shape[3], *_strides(*steps), first, last, window, **named,
            )  # fmt: skip
            flow = flow_before
            for gradient, shares in zip(gradients, sums, strict=True):
                gradient[:, first:last] = shares.sum(0)[:, : last - first]
    dr, dw, dk, da, db = gradients
    return dr, dw, dk, dv, da, db, flow
