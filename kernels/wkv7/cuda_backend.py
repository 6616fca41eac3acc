"""The chunked kernels of the fla-core package (github.com/fla-org/flash-linear-attention, MIT) behind our signature.

Its `chunk_rwkv7` takes the same layout and logarithmic decays, but states as (K, V). It multiplies in the dtype of its
inputs, on tensor cores, and warns that float32 does not work everywhere: only bf16 and fp16 come here. Its public
function is a torch autograd function; backward calls it again rather than keep its graph, because a torch operator
cannot hand a graph on.

Shape letters: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

from typing import Any

import torch
from fla.ops.rwkv7 import chunk_rwkv7
from torch import Tensor


def _swap(state: Tensor | None) -> Tensor | None:
    """(B, H, V, K) to (B, H, K, V), or back, in float32."""
    return None if state is None else state.float().mT.contiguous()


def _package_arguments(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None
) -> dict[str, Any]:
    """Everything in v's dtype, but decays and state in float32, in which the package accumulates them."""
    steps = {"r": r, "k": k, "v": v, "a": a, "b": b}
    arguments = {name: x.to(v.dtype).contiguous() for name, x in steps.items()}
    return arguments | {"w": w.float().contiguous(), "initial_state": _swap(initial_state)}


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
    """Returns `(y, final_state, empty)`; see the contract in `op`. segment_ids is always None."""
    arguments = _package_arguments(r, w, k, v, a, b, initial_state)
    with torch.no_grad():
        y, final_state = chunk_rwkv7(**arguments, scale=1.0, output_final_state=True)
    return y.contiguous(), final_state.float().mT.contiguous(), v.new_empty(0, dtype=torch.float32)


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
    """Returns the gradients of r, w, k, v, a, b and the initial state; see the contract in `op`."""
    arguments = _package_arguments(r, w, k, v, a, b, initial_state)
    if initial_state is None:
        arguments["initial_state"] = torch.zeros(
            (v.shape[0], v.shape[2], r.shape[3], v.shape[3]), dtype=torch.float32, device=v.device
        )
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    with torch.enable_grad():
        y, final_state = chunk_rwkv7(**leaves, scale=1.0, output_final_state=True)
    outputs, gradients = [y], [dy.to(y.dtype)]
    if dfinal_state is not None:
        outputs.append(final_state)
        gradients.append(dfinal_state.to(final_state.dtype).mT.contiguous())
    names = ("r", "w", "k", "v", "a", "b", "initial_state")
    *steps, state = torch.autograd.grad(outputs, [leaves[name] for name in names], gradients)
    return (*steps, state.mT)
