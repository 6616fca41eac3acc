"""The Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when the kernels are decorated, for a whole process. Without a GPU the cases therefore skip
here, and `test_in_the_interpreter` runs this file again in a process of its own. Shape letters: B batch, T time,
H heads, K key channels, V value channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import wkv7

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float32: 5e-6,  # eps 6e-8; the state is a sum over tens of steps that partly cancel
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}


def make(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every argument of the operator; the state stays in float32, as in a model under autocast."""
    generator = torch.Generator().manual_seed(B + T + H + K + V)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    kappa = F.normalize(normal(B, T, H, K), dim=-1)
    return {
        "r": normal(B, T, H, K, dtype=dtype),
        "w": (-0.6065 * torch.rand(B, T, H, K, generator=generator)).to(DEVICE, dtype),
        "k": normal(B, T, H, K, dtype=dtype),
        "v": normal(B, T, H, V, dtype=dtype),
        "a": (-kappa + 0.1 * normal(B, T, H, K) / K**0.5).to(dtype),
        "b": (kappa * torch.rand(B, T, H, K, generator=generator).to(DEVICE)).to(dtype),
        "initial_state": normal(B, H, V, K),
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.1).cumsum(1).to(DEVICE),
    }


@pytest.fixture
def check(all_gradients: Any, assert_close: Any, exact: Any) -> Callable[[dict[str, Any]], None]:
    """Compares outputs, final state and every gradient."""

    def compare(inputs: dict[str, Any]) -> None:
        expected = all_gradients(wkv7, exact(inputs), backend="reference")
        results = all_gradients(wkv7, inputs, backend="triton")
        dtype = inputs["v"].dtype
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == torch.float32
        assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])

    return compare


SIZES = [(2, 1, 1, 1, 1), (1, 2, 2, 16, 17), (1, 31, 1, 5, 17), (2, 5, 3, 17, 3), (1, 65, 1, 3, 4), (1, 32, 1, 64, 16)]


@on_kernels
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes: tuple[int, int, int, int, int], check: Any) -> None:
    check(make(*sizes))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, check: Any) -> None:
    check(make(1, 34, 1, 16, 3, dtype))


@on_kernels
@pytest.mark.parametrize("absent", ["initial_state", "segment_ids", "both"])
def test_absent_arguments(absent: str, check: Any) -> None:
    inputs = make(1, 35, 1, 5, 4)
    for name in ("initial_state", "segment_ids") if absent == "both" else (absent,):
        inputs[name] = None
    check(inputs)


@on_kernels
@pytest.mark.parametrize("decay", [0.0, 1e-6, 1 - 1e-6])
def test_extreme_decays(decay: float, check: Any) -> None:
    inputs = make(1, 20, 1, 16, 4)
    inputs["w"][..., ::2] = torch.tensor(decay, dtype=torch.float64).log()
    check(inputs)


@on_kernels
def test_views_into_projections(check: Any) -> None:
    """r, k and v as slices of a wider matrix; w with time and heads swapped; a with its keys not contiguous."""
    inputs = make(2, 4, 3, 5, 17)
    wide = torch.cat([inputs["r"], inputs["k"], inputs["v"]], dim=-1)
    inputs["r"], inputs["k"], inputs["v"] = wide.split([5, 5, 17], dim=-1)
    inputs["w"] = inputs["w"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["a"] = inputs["a"].transpose(1, 3).contiguous().transpose(1, 3)
    check(inputs)


@on_kernels
def test_windows_of_time_one_after_another(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward when the shares of the sums over value channels of the whole sequence would take too much memory."""
    from zoo.kernels.wkv7 import triton_backend

    monkeypatch.setattr(triton_backend, "SUMS_BYTES", 0)
    check(make(1, 67, 1, 5, 17))


@on_kernels
def test_only_the_final_state_has_a_gradient() -> None:
    inputs = make(1, 35, 1, 5, 3)
    inputs["b"].requires_grad_()
    gradients = [
        torch.autograd.grad(wkv7(**inputs, backend=backend)[1].sum(), inputs["b"])[0]
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@on_kernels
def test_two_runs_agree_to_the_last_bit(all_gradients: Any) -> None:
    inputs = make(1, 33, 1, 4, 17)
    first, second = (all_gradients(wkv7, inputs, backend="triton") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases above ran in this process")
def test_in_the_interpreter(run_interpreted: Any) -> None:
    run_interpreted(__file__, at_least=18)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_compile_for_hopper_without_spills(compile_triton: Any) -> None:
    """No GPU needed. Local memory inside a loop would be spilled registers, which the loop would wait for."""
    for variant in (x for x in compile_triton.WKV7_VARIANTS if x.dtype == "bf16" and x.d_state == 64):
        report = compile_triton.compile_variant(variant)
        assert report.local_bytes == 0, variant.title
        assert report.programs_per_multiprocessor >= 8, variant.title  # two per scheduler, so that one can wait
        busiest = max(report.loops, key=lambda loop: loop["instructions"])
        assert busiest["instructions"] <= {"forward": 600, "backward": 900}[variant.kernel], variant.title
        # The decays of 2 keys; more would be an exp in every thread that needs it.
        assert busiest["special_function"] == 2, variant.title


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the cases above launch the kernels")
@pytest.mark.parametrize("bare", [False, True])
def test_launches_compile(bare: bool, compiled_launches: Any) -> None:
    """The launcher makes constants of arguments that are 1 or None; the kernels must compile with them."""
    from zoo.kernels.wkv7 import triton_backend, triton_kernels

    compiled = compiled_launches(triton_kernels, "forward_kernel", "backward_kernel")
    inputs = make(*((2, 40, 3, 48, 17) if bare else (1, 1, 1, 1, 1)))
    if bare:
        inputs |= {"initial_state": None, "segment_ids": None}
    y, final_state, checkpoints = triton_backend.forward(*inputs.values(), True)
    triton_backend.backward(y, final_state, *inputs.values(), checkpoints)
    assert len(compiled) == 2
