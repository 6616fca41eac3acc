"""What a machine reaches, measured: the two figures that a share of its speed refers to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.eval.measure import median_time
from zoo.kernels import linear

PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the square matrices that are multiplied."""
COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes that are copied: more than caches hold."""


def reaches(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measures the fastest product of two large square matrices, and the fastest copy of a large tensor.

    Args:
        device: Where.
        dtype: Of the matrices.

    Returns:
        `matmul_gflops`: 10^9 FLOPs per second, the better of `zoo.kernels.linear` and `torch.matmul`.
        `copy_gbytes_per_second`: 10^9 bytes per second, what is read and what is written counted.
    """
    size, copied = PRODUCT.get(device.type, PRODUCT["cpu"]), COPIED.get(device.type, COPIED["cpu"])
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], Any]) -> float:
        return median_time(call, repeats=5, warmup=2, device=device)["min"]

    with torch.no_grad():
        product = min(best(lambda: linear(a, b)), best(lambda: torch.matmul(a, b)))
        copy = best(lambda: target.copy_(source))
    return {"matmul_gflops": 2 * size**3 / product / 1e9, "copy_gbytes_per_second": 2 * source.nbytes / copy / 1e9}
