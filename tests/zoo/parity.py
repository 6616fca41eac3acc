"""What the parity tests share: weights copied from our model to another one, then logits, loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo

# Relative to the largest element of each compared tensor, in fp32: both sides add up in another order.
TOLERANCE = 1e-4

SILENT = 1e-6
"""Largest gradient of a parameter that has no effect: rounding noise."""


class Kept(NamedTuple):
    """Their share of the current token, where ours is that of the previous one."""

    name: str
    row: int


Source = Any
"""Where a parameter of theirs comes from: our name, one with rows, `Kept`, or a function of (ours, gradient or not)."""


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def ours_for(source: Source, tensors: Mapping[str, Tensor], like: Tensor, gradient: bool = False) -> Tensor:
    """Our tensor in the shape of theirs."""
    if callable(source):
        return source(tensors, gradient)
    if isinstance(source, Kept):
        share = tensors[source.name][source.row].reshape(like.shape)
        return -share if gradient else 1 - share
    name, rows = source if isinstance(source, tuple) else (source, slice(None))
    return tensors[name][rows].reshape(like.shape)


def copy_weights(ours: zoo.Model, theirs: nn.Module, sources: Mapping[str, Source]) -> None:
    """Gives every parameter of theirs our weights."""
    untouched = {name for name, _ in theirs.named_parameters()} ^ sources.keys()
    assert not untouched, f"every parameter has its counterpart, and these have none: {sorted(untouched)}"
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for parameter, source in sources.items():
            target = theirs.get_parameter(parameter)
            target.copy_(ours_for(source, weights, target))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_parity(
    ours: zoo.Model,
    theirs: nn.Module,
    sources: Mapping[str, Source],
    out: Tensor,
    expected: Tensor,
    targets: Tensor,
    without_effect: Callable[[str], bool],
) -> None:
    """Compares logits where `targets` are not -100, the loss, and the gradient of each parameter of theirs.

    Args:
        ours: Our model.
        theirs: Theirs, with our weights.
        sources: See `copy_weights`.
        out: Our logits, (B, T, V).
        expected: Theirs.
        targets: (B, T).
        without_effect: Which of their parameters, by name, may have no gradient.
    """
    read = targets != -100
    assert relative_error(out[read], expected[read]) < TOLERANCE
    loss, expected_loss = (F.cross_entropy(o.flatten(0, 1), targets.flatten()) for o in (out, expected))
    assert abs(loss.item() / expected_loss.item() - 1) < TOLERANCE
    loss.backward()
    expected_loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    for parameter, source in sources.items():
        target = theirs.get_parameter(parameter)
        expected_gradient = torch.zeros_like(target) if target.grad is None else target.grad
        actual = ours_for(source, gradients, expected_gradient, gradient=True)
        if expected_gradient.abs().max() < SILENT:
            assert without_effect(parameter), parameter
            assert actual.abs().max() < SILENT, parameter
        else:
            assert relative_error(actual, expected_gradient) < TOLERANCE, parameter
