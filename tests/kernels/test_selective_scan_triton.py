"""The Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when the kernels are decorated, for a whole process. Without a GPU the cases therefore skip
here, and `test_in_the_interpreter` runs this file again in a process of its own. Shape letters: B batch, T time,
D channels, N state size.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import selective_scan

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float32: 5e-6,  # eps 6e-8; the exponent delta * A, rounded at up to 30, moves exp by 30 eps
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}


def make(B: int, T: int, D: int, N: int, dtype: torch.dtype = torch.float32, softplus: bool = True) -> dict[str, Any]:
    """Every argument of the operator; parameters and states stay in float32, as in a model under autocast."""
    generator = torch.Generator().manual_seed(B + T + D + N)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    dt = normal(B, T, D)
    return {
        "u": normal(B, T, D, dtype=dtype),
        "dt": (dt if softplus else dt.abs()).to(dtype),
        "A": -(3 * torch.rand(D, N, generator=generator) + 0.1).to(DEVICE),
        "B": normal(B, T, N, dtype=dtype),
        "C": normal(B, T, N, dtype=dtype),
        "D": normal(D),
        "z": normal(B, T, D, dtype=dtype),
        "dt_bias": normal(D) if softplus else normal(D).abs(),
        "dt_softplus": softplus,
        "initial_state": normal(B, D, N),
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.1).cumsum(1).to(DEVICE),
    }


def exact(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64 on the CPU."""
    return {
        name: x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


@pytest.fixture
def check(all_gradients: Any, assert_close: Any) -> Any:
    """Compares outputs, final state and every gradient."""

    def compare(inputs: dict[str, Any]) -> None:
        expected = all_gradients(selective_scan, exact(inputs), backend="reference")
        results = all_gradients(selective_scan, inputs, backend="triton")
        dtype = inputs["u"].dtype
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == torch.float32
        assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])

    return compare


SIZES = [(2, 1, 1, 1), (1, 2, 3, 16), (1, 31, 40, 5), (2, 33, 17, 1), (1, 65, 3, 16), (1, 32, 16, 20)]


@on_kernels
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes: tuple[int, int, int, int], check: Any) -> None:
    check(make(*sizes))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, check: Any) -> None:
    check(make(1, 37, 17, 16, dtype))


@on_kernels
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state", "segment_ids", "all"])
def test_absent_arguments(absent: str, check: Any) -> None:
    inputs = make(1, 9, 5, 4, softplus=absent != "all")
    for name in ("D", "z", "dt_bias", "initial_state", "segment_ids") if absent == "all" else (absent,):
        inputs[name] = None
    check(inputs)


@on_kernels
@pytest.mark.parametrize("ends", [(-25.0, 45.0), (-16.0, -8.0)])
def test_extreme_step_sizes(ends: tuple[float, float], check: Any) -> None:
    """Softplus where it is the identity and decays are 0; where it is exp, and 1 + exp would have lost its digits."""
    inputs = make(1, 12, 4, 4)
    inputs["dt"] = torch.linspace(*ends, 12, device=DEVICE)[None, :, None].repeat(1, 1, 4)
    inputs["dt_bias"] = inputs["initial_state"] = None
    check(inputs)


@on_kernels
def test_views_into_projections(check: Any) -> None:
    """u, z, B and C as a layer has them: slices of wider matrices; dt with its axes swapped."""
    inputs = make(2, 10, 17, 5)
    wide = torch.cat([inputs["u"], inputs["z"], inputs["B"], inputs["C"]], dim=-1)
    inputs["u"], inputs["z"], inputs["B"], inputs["C"] = wide.split([17, 17, 5, 5], dim=-1)
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs)


@on_kernels
@pytest.mark.parametrize("segments", [False, True])
def test_slices_of_time_side_by_side(segments: bool, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices, the last one shorter: what a small batch on a large device gets."""
    from zoo.kernels.selective_scan import triton_backend

    monkeypatch.setattr(triton_backend, "_processors", lambda device: 100)
    monkeypatch.setattr(triton_backend, "MIN_SLICE", 32)
    inputs = make(1, 75, 5, 4)
    inputs["segment_ids"] = (torch.arange(75, device=DEVICE) >= 40).long()[None] if segments else None
    check(inputs)


@on_kernels
def test_windows_of_time_one_after_another(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward when the shares of dB and dC of the whole sequence would take too much memory."""
    from zoo.kernels.selective_scan import triton_backend

    monkeypatch.setattr(triton_backend, "SUMS_BYTES", 0)
    check(make(1, 70, 17, 4))


@on_kernels
def test_wider_blocks(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels.selective_scan import triton_backend

    monkeypatch.setattr(triton_backend, "BLOCK", 32)
    check(make(1, 6, 35, 16))


@on_kernels
def test_two_runs_agree_to_the_last_bit(all_gradients: Any) -> None:
    inputs = make(1, 33, 40, 4)
    first, second = (all_gradients(selective_scan, inputs, backend="triton") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases above ran in this process")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 22, done.stdout


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_compile_for_hopper_without_spills(compile_triton: Any) -> None:
    """No GPU needed. Local memory inside a loop would be spilled registers, which the loop would wait for."""
    for variant in (x for x in compile_triton.VARIANTS if x.dtype == "bf16" and x.d_state == 16 and x.softplus):
        report = compile_triton.compile_variant(variant)
        assert report.local_accesses_in_loops == 0, variant.title
        assert report.local_bytes <= 64, variant.title
        assert report.programs_per_multiprocessor >= 8, variant.title  # two per scheduler, so that one can wait
        busiest = max(report.loops, key=lambda loop: loop["special_function"])
        # exp2 of 4 steps of 8 states, 2 softplus; sigmoids and reciprocals come on top. More would be work done twice.
        assert 34 <= busiest["special_function"] <= 42, variant.title
        assert busiest["instructions"] <= {"forward": 480, "backward": 1200, "slice": 400}[variant.kernel], (
            variant.title
        )


class HopperDriver:
    """Tells Triton's launcher which device to compile for; nothing can run on it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the cases above launch the kernels")
@pytest.mark.parametrize("bare", [False, True])
def test_launches_compile(bare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher makes constants of arguments that are 1 or None; the kernels must compile with them."""
    import triton

    from zoo.kernels.selective_scan import triton_backend, triton_kernels

    compiled = []

    def compiling(kernel: Any) -> dict[Any, Any]:
        class Launcher(dict):
            def __missing__(self, grid: tuple[int, int, int]) -> Any:
                return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

        return Launcher()

    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())
    for name in ("slice_kernel", "forward_kernel", "backward_kernel"):
        monkeypatch.setattr(triton_kernels, name, compiling(getattr(triton_kernels, name)))
    monkeypatch.setattr(triton_backend, "_processors", lambda device: 100)  # several slices, where time allows
    inputs = make(*((1, 130, 17, 5) if bare else (1, 1, 1, 1)), softplus=not bare)
    if bare:
        inputs |= dict.fromkeys(("D", "z", "dt_bias", "initial_state", "segment_ids"))
    y, final_state, checkpoints = triton_backend.forward(*inputs.values(), True)
    del inputs["initial_state"]
    triton_backend.backward(y, final_state, *inputs.values(), checkpoints)
    assert len(compiled) == (4 if bare else 2)
