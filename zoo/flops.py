"""Counting the FLOPs that a computation really runs, to check what the architectures declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten
Shape = torch.Size


def _scores(q: Shape, k: Shape, v: Shape, is_causal: bool) -> int:
    dense = sdpa_flop_count(q, k, v)
    return dense * (k[-2] + 1) // (2 * k[-2]) if is_causal else dense


def _flash(q: Shape, k: Shape, v: Shape, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return _scores(q, k, v, is_causal)


def _biased(
    q: Shape, k: Shape, v: Shape, bias: Any, lse: bool, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    return _scores(q, k, v, is_causal)


# torch's own table charges causal attention in full and has no entry for the CPU kernel at all.
ATTENTION_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_efficient_attention: _biased,
    aten._scaled_dot_product_cudnn_attention: _biased,
}


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, attention and zoo operators that one forward call runs.

    Causal attention counts the scores on and below the diagonal, as its kernels compute them.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        function()
    return counter.get_total_flops()
