"""Products by oneDNN, which torch brings along and uses for other dtypes.

Shape letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x weight^T + bias, (M, N) contiguous, of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Returns dy^T x, (N, K) contiguous, of dy (M, N) and x (M, K)."""
    # The wider side is where oneDNN spreads the work: told as the weight it takes half the time.
    if dy.shape[1] >= x.shape[1]:
        return product(x.t(), dy.t(), None).t().contiguous()
    return product(dy.t(), x.t(), None)
