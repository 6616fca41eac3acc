"""Tensors as flat NumPy arrays, the form in which the numba kernels take them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def rows(x: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, tuple[int, ...]]:
    """Returns a (..., D) tensor as a flat array and its strides over all but D: views need no copy."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    strides = x.stride()[:-1]
    if x.is_contiguous():
        return x.view(-1).numpy(), strides
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, (*strides, 1), strict=True))
    return x.as_strided((span,), (1,)).numpy(), strides


def flat(x: Tensor | None, dtype: torch.dtype, absent: int = 0) -> np.ndarray:
    """Returns a tensor as a flat array, or `absent` zeros where there is none."""
    if x is None:
        return torch.zeros(absent, dtype=dtype).numpy()
    if x.dtype != dtype:
        x = x.to(dtype)
    return x.reshape(-1).numpy()


def resets(segment_ids: Tensor | None) -> np.ndarray:
    """Returns (B * T,) booleans: whether a step begins another segment than the step before it in its row."""
    if segment_ids is None:
        return np.empty(0, np.bool_)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # (B, T-1)
    return F.pad(changes, (1, 0)).reshape(-1).numpy()
