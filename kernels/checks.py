"""Checks of tensor arguments, shared by the operators: each failure is one line that says how to mend it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.kernels.errors import ZooError


def check_tensors(
    operator: str,
    sizes: Mapping[str, int],
    device: torch.device,
    expected: Mapping[str, tuple[Tensor | None, str, str]],
) -> None:
    """Checks shape, device and kind of each tensor.

    Args:
        operator: Name for the messages.
        sizes: Size of each dimension letter, e.g. `{"B": 2, "T": 64}`.
        device: Where every tensor must be.
        expected: Argument name -> (tensor or None, dimension letters such as `"B T D"`, "float" or "integer").

    Raises:
        ZooError: For the first argument that does not fit.
    """
    for name, (tensor, letters, kind) in expected.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ZooError(f"{operator}: {name} is a {type(tensor).__name__}: pass a torch.Tensor of shape ({letters})")
        shape = tuple(sizes[letter] for letter in letters.split())
        if tuple(tensor.shape) != shape:
            wanted = ", ".join(f"{letter}={sizes[letter]}" for letter in letters.split())
            raise ZooError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected ({wanted}): reshape {name}")
        if tensor.device != device:
            raise ZooError(f"{operator}: {name} is on {tensor.device}, the first input on {device}: move {name} there")
        if kind == "float" and not tensor.dtype.is_floating_point:
            raise ZooError(f"{operator}: {name} has dtype {tensor.dtype}, expected a real floating dtype: cast {name}")
        if kind == "integer" and (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            raise ZooError(f"{operator}: {name} has dtype {tensor.dtype}, expected an integer dtype: cast {name}")


def check_rank(operator: str, name: str, tensor: Tensor, letters: str) -> None:
    """Checks that `tensor` has as many dimensions as there are `letters`, none of them the empty time dimension."""
    if not isinstance(tensor, Tensor):
        raise ZooError(f"{operator}: {name} is a {type(tensor).__name__}: pass a torch.Tensor of shape ({letters})")
    if tensor.dim() != len(letters.split()):
        raise ZooError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected ({letters}): reshape {name}")
    if 0 in tensor.shape:
        raise ZooError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}: expected no empty dimension: pass a longer {name}"
        )


def state_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of states: float64 for float64 inputs, else float32, whatever the inputs' precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
