"""What the operator tests share: inputs, gradients, errors, and memory that is NaN until written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets to write an element returns NaN instead of whatever lay there."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point and not torch.compiler.is_compiling():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.fixture
def all_gradients() -> Callable[..., dict[str, Tensor]]:
    """Runs an operator and its backward pass with random output gradients, the same for every backend."""

    def run(
        operator: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Any], **options: Any
    ) -> dict[str, Tensor]:
        leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y, final_state = operator(**inputs, **options)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, final_state)]
        loss = (y * weights[0]).sum() + (final_state * weights[1]).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"y": y.detach(), "final_state": final_state.detach(), **results}

    return run


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compares every entry of two results by relative root mean square error, in float64."""

    def compare(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
        assert results.keys() == expected.keys()
        for name, truth in expected.items():
            result = results[name]
            assert result.shape == truth.shape, name
            if truth.numel():
                scale = truth.double().norm().clamp(min=1e-30)
                error = ((result.double() - truth.double()).norm() / scale).item()
                assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"

    return compare
