"""Counting the FLOPs that a computation really runs, to check what the architectures declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
Shape = torch.Size


def _scores(q: Shape, k: Shape, v: Shape, is_causal: bool) -> int:
    return _seen(sdpa_flop_count(q, k, v), k, is_causal)


def _seen(dense: int, k: Shape, is_causal: bool) -> int:
    return dense * (k[-2] + 1) // (2 * k[-2]) if is_causal else dense


def _flash(q: Shape, k: Shape, v: Shape, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return _scores(q, k, v, is_causal)


def _biased(
    q: Shape, k: Shape, v: Shape, bias: Any, lse: bool, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    return _scores(q, k, v, is_causal)


def _backward(dy: Shape, q: Shape, k: Shape, v: Shape, *others: Any, **_: Any) -> int:
    # Each kernel has its own order of arguments; whether it is causal is the only one of them that can be True.
    return _seen(sdpa_backward_flop_count(dy, q, k, v), k, any(value is True for value in others))


# torch's own table charges causal attention in full and has no entry for the CPU kernel at all.
ATTENTION_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_efficient_attention: _biased,
    aten._scaled_dot_product_cudnn_attention: _biased,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    aten._scaled_dot_product_flash_attention_backward: _backward,
    aten._scaled_dot_product_efficient_attention_backward: _backward,
    aten._scaled_dot_product_cudnn_attention_backward: _backward,
}


def count_flops(function: Callable[[], Any], *, backward: bool = False) -> int:
    """FLOPs of the matrix products, attention and zoo operators that one call runs.

    Causal attention counts the scores on and below the diagonal, as its kernels compute them.

    Args:
        function: The call.
        backward: Whether it needs gradients, as a training step does; its backward pass is then counted too.
    """
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        function()
    return counter.get_total_flops()
