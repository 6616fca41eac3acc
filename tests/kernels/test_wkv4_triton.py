"""The Triton kernels of wkv4 against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when the kernels are decorated, for a whole process. Without a GPU the cases therefore skip
here, and `test_in_the_interpreter` runs this file again in a process of its own. Shape letters: B batch, T time,
D channels.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import wkv4

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float32: 5e-6,  # eps 6e-8; exponents of up to 30, rounded, move exp by 30 eps
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}


def make(B: int, T: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every argument of the operator; parameters and states stay in float32, as in a model under autocast."""
    generator = torch.Generator().manual_seed(B + T + D)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    return {
        "w": -torch.exp(8 * torch.rand(D, generator=generator) - 5).to(DEVICE),
        "u": normal(D),
        "k": normal(B, T, D, dtype=dtype) * 2,
        "v": normal(B, T, D, dtype=dtype),
        "initial_state": torch.stack([normal(B, D), normal(B, D).abs() + 1, normal(B, D)], dim=1),
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.1).cumsum(1).to(DEVICE),
    }


@pytest.fixture
def check(all_gradients: Any, assert_close: Any, exact: Any) -> Any:
    """Compares outputs, final state and every gradient."""

    def compare(inputs: dict[str, Any]) -> None:
        expected = all_gradients(wkv4, exact(inputs), backend="reference")
        results = all_gradients(wkv4, inputs, backend="triton")
        dtype = inputs["v"].dtype
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == torch.float32
        assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])

    return compare


@on_kernels
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 3), (1, 31, 40), (2, 33, 17), (1, 63, 32), (1, 65, 33)], ids=str)
def test_odd_sizes(sizes: tuple[int, int, int], check: Any) -> None:
    check(make(*sizes))


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, check: Any) -> None:
    check(make(1, 37, 17, dtype))


@on_kernels
@pytest.mark.parametrize("absent", [("initial_state",), ("segment_ids",), ("initial_state", "segment_ids")], ids=str)
def test_absent_arguments(absent: tuple[str, ...], check: Any) -> None:
    check(make(1, 9, 5) | dict.fromkeys(absent))


@on_kernels
def test_extreme_keys(all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """Keys of up to 1e4, with nothing but the decay to push a large one out; slow and fast decays."""
    inputs = make(1, 70, 16) | dict.fromkeys(("initial_state", "segment_ids"))
    inputs["w"] = -torch.logspace(-4, 1.3, 16, device=DEVICE)
    sizes = torch.logspace(0, 4, 16, device=DEVICE).roll(5)
    inputs["k"] = inputs["k"].clamp(-1, 1) * sizes
    inputs["k"][:, 5:, 1::3] = -sizes[1::3]

    def outputs_alone(**arguments: Any) -> tuple[Tensor, Tensor]:
        y, _ = wkv4(**arguments)  # of the state only P and Q are comparable, and they are no numbers here
        return y, y[:, -1]

    expected = all_gradients(outputs_alone, exact(inputs), backend="reference")
    results = all_gradients(outputs_alone, inputs, backend="triton")
    assert_close({name: x.cpu() for name, x in results.items()}, expected, 2e-5)


@on_kernels
def test_views_into_a_projection(check: Any) -> None:
    inputs = make(2, 10, 17)
    inputs["k"], inputs["v"] = torch.cat([inputs["k"], inputs["v"]], dim=-1).split(17, dim=-1)
    check(inputs)
    inputs["v"] = inputs["v"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    check({name: x.detach() for name, x in inputs.items()})


@on_kernels
@pytest.mark.parametrize("segments", [False, True])
def test_slices_of_time_side_by_side(segments: bool, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slices, the last one shorter: what a small batch on a large device gets."""
    from zoo.kernels.wkv4 import triton_backend

    monkeypatch.setattr(triton_backend, "_processors", lambda device: 100)
    monkeypatch.setattr(triton_backend, "MIN_SLICE", 32)
    inputs = make(2, 75, 3)
    inputs["w"] = inputs["w"].clamp(min=-0.05)  # so that a state outlives a slice
    inputs["segment_ids"] = (torch.arange(75, device=DEVICE) >= 40).long().expand(2, -1) if segments else None
    check(inputs)


@on_kernels
def test_two_runs_agree_to_the_last_bit(all_gradients: Any) -> None:
    inputs = make(1, 33, 20)
    first, second = (all_gradients(wkv4, inputs, backend="triton") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases above ran in this process")
def test_in_the_interpreter(run_interpreted: Any) -> None:
    run_interpreted(__file__, 16)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the cases above launch the kernels")
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compile_for_hopper_without_spills(
    bare: bool,
    dtype: torch.dtype,
    compiled_launches: Any,
    compile_triton: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No GPU needed: the kernels compile with the arguments of a launch, and every value stays in its thread."""
    from zoo.kernels.wkv4 import triton_backend, triton_kernels

    compiled = compiled_launches(triton_kernels, "slice_kernel", "forward_kernel", "backward_kernel")
    monkeypatch.setattr(triton_backend, "_processors", lambda device: 100)  # several slices, where time allows
    inputs = make(*((1, 300, 64) if bare else (1, 1, 1)), dtype)  # a size of 1 becomes a constant
    if bare:
        inputs |= dict.fromkeys(("initial_state", "segment_ids"))
    y, final_state, checkpoints = triton_backend.forward(*inputs.values(), True)
    del inputs["initial_state"]
    triton_backend.backward(y, final_state, *inputs.values(), checkpoints)
    assert len(compiled) == (4 if bare else 2)
    for kernel in compiled:
        report = compile_triton.read_machine_code(kernel.asm["cubin"], 1, kernel.metadata.shared)
        name = kernel.metadata.name
        assert report.local_bytes == report.shared_bytes == 0, name
        assert report.programs_per_multiprocessor >= 8, name  # two per scheduler, so that one can wait
        busiest = max(report.loops, key=lambda loop: loop["special_function"])
        assert busiest["shuffles"] <= 2 * (not bare), name  # only for the count of segment starts
        if bare:
            # Per step an exp2 for the state; for the output another one and a reciprocal.
            assert busiest["special_function"] == (4 if name == "slice_kernel" else 12), name
            assert busiest["instructions"] <= {"slice": 160, "forward": 280, "backward": 420}[name.split("_")[0]], name
