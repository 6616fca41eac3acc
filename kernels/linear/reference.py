"""The definition of the projection.

Shape letters: K inputs, N outputs.
"""

from __future__ import annotations

from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns y (..., N); see the contract in `op`."""
    y = (x[..., None, :] * weight).sum(-1)  # (..., N, K) to (..., N)
    return y if bias is None else y + bias
