"""What the operator tests share: inputs, gradients, errors, and memory that is NaN until written."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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


@pytest.fixture
def exact() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The same arguments in float64 on the CPU."""

    def widen(inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype)
            if isinstance(x, Tensor)
            else x
            for name, x in inputs.items()
        }

    return widen


@pytest.fixture
def run_interpreted() -> Callable[[str, int], None]:
    """Runs a test file again, in a process whose Triton interprets; so many of its tests must pass there."""

    def run(file: str, at_least: int) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= at_least, done.stdout

    return run


class _HopperDriver:
    """Tells Triton's launcher which device to compile for; nothing can run on it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """From here on launches of the named kernels of a module only compile them for sm_90, and are listed."""

    def watch(module: ModuleType, *names: str) -> list[Any]:
        import triton

        compiled: list[Any] = []

        class Launcher(dict[Any, Any]):
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __missing__(self, grid: tuple[int, ...]) -> Any:
                return lambda *args, **options: compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        monkeypatch.setattr(triton.runtime.driver, "_active", _HopperDriver())
        for name in names:
            monkeypatch.setattr(module, name, Launcher(getattr(module, name)))
        return compiled

    return watch


@pytest.fixture(scope="session")
def compile_triton() -> ModuleType:
    """The benchmark that compiles the Triton kernels for sm_90: the tests look at the variants that it prints."""
    path = Path(__file__).parents[2] / "benchmarks" / "compile_triton.py"
    spec = importlib.util.spec_from_file_location("compile_triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_triton"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
