"""The Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when the kernels are decorated, for a whole process. Without a GPU the cases therefore skip
here, and `test_in_the_interpreter` runs this file again in a process of its own. Shape letters: B batch, T time,
H heads, P channels per head, G groups, N state size.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import ssd
from zoo.kernels.errors import BackendError

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in test_in_the_interpreter")

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float32: 1e-5,  # eps 6e-8; the exponent delta * A, rounded at up to 30, moves exp by 30 eps
    torch.float16: 2e-3,  # eps 5e-4: rounding y and the gradients to fp16, and on a GPU the products to TF32
    torch.bfloat16: 1.5e-2,  # eps 4e-3: rounding drive, weights and states before the products, and the results
}


def make(
    B: int, T: int, H: int, P: int, G: int, N: int, dtype: torch.dtype = torch.float32, softplus: bool = True
) -> dict[str, Any]:
    """Every argument of the operator; parameters and states stay in float32, as in a model under autocast."""
    generator = torch.Generator().manual_seed(B + T + H + P + G + N)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    dt = normal(B, T, H)
    return {
        "x": normal(B, T, H, P, dtype=dtype),
        "dt": (dt if softplus else dt.abs()).to(dtype),
        "A": -(3 * torch.rand(H, generator=generator) + 0.1).to(DEVICE),
        "B": normal(B, T, G, N, dtype=dtype),
        "C": normal(B, T, G, N, dtype=dtype),
        "D": normal(H),
        "dt_bias": normal(H) if softplus else normal(H).abs(),
        "dt_softplus": softplus,
        "dt_limit": (0.2, 1.5) if softplus else (0.0, math.inf),
        "initial_state": normal(B, H, P, N),
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.1).cumsum(1).to(DEVICE),
    }


@pytest.fixture
def check(all_gradients: Any, assert_close: Any, exact: Any) -> Callable[[dict[str, Any]], None]:
    """Compares outputs, final state and every gradient."""

    def compare(inputs: dict[str, Any]) -> None:
        expected = all_gradients(ssd, exact(inputs), backend="reference")
        results = all_gradients(ssd, inputs, backend="triton")
        dtype = inputs["x"].dtype
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == torch.float32
        assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])

    return compare


SIZES = [
    (2, 1, 1, 1, 1, 1), (1, 2, 2, 3, 1, 16), (1, 63, 4, 5, 2, 3), (2, 65, 3, 17, 3, 20), (1, 130, 2, 64, 1, 65),
    (1, 64, 1, 65, 1, 128), (1, 5, 1, 4, 1, 256),
]  # fmt: skip


@on_kernels
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes: tuple[int, ...], check: Any) -> None:
    check(make(*sizes))  # type: ignore[arg-type]


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, check: Any) -> None:
    check(make(1, 100, 4, 17, 2, 16, dtype))


@on_kernels
@pytest.mark.parametrize("absent", ["D", "dt_bias", "initial_state", "segment_ids", "all"])
def test_absent_arguments(absent: str, check: Any) -> None:
    inputs = make(1, 70, 2, 5, 1, 4, softplus=absent != "all")
    for name in ("D", "dt_bias", "initial_state", "segment_ids") if absent == "all" else (absent,):
        inputs[name] = None
    check(inputs)


@on_kernels
@pytest.mark.parametrize("decay", [-1e-6, -50.0, None])
def test_extreme_decays(decay: float | None, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """delta A near 0, so far below that nothing survives a step, and the two mixed within each chunk."""
    inputs = make(1, 130, 2, 16, 1, 8, softplus=False)
    inputs["A"] = torch.full((2,), -50.0 if decay is None else decay, device=DEVICE)
    inputs["dt"] = torch.ones(1, 130, 2, device=DEVICE)
    inputs["dt_bias"] = inputs["segment_ids"] = None
    if decay is None:
        inputs["dt"][:, torch.rand(130) < 0.8] = 2e-8
    expected = all_gradients(ssd, exact(inputs), backend="reference")
    results = all_gradients(ssd, inputs, backend="triton")
    if decay == -50.0:
        del results["dA"], expected["dA"]  # below the smallest float32 but for rounding
    assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[torch.float32])


@on_kernels
def test_views_into_projections(check: Any) -> None:
    """x, B and C as a layer has them: slices of one wider matrix; dt with its axes swapped; P not contiguous."""
    inputs = make(2, 10, 3, 4, 1, 5)
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=-1)
    inputs["x"], inputs["B"], inputs["C"] = (
        x.unflatten(2, (heads, -1)) for x, heads in zip(joined.split([12, 5, 5], dim=-1), (3, 1, 1), strict=True)
    )
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs)
    inputs["x"] = inputs["x"].detach().transpose(2, 3).contiguous().transpose(2, 3)
    check({name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()})


@on_kernels
def test_only_the_final_state_has_a_gradient() -> None:
    inputs = make(1, 70, 2, 5, 1, 3)
    inputs["x"].requires_grad_()
    gradients = [
        torch.autograd.grad(ssd(**inputs, backend=backend)[1].sum(), inputs["x"])[0]
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@on_kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes in NumPy
def test_infinity_stays_in_its_document() -> None:
    inputs = make(1, 130, 2, 16, 1, 4)
    inputs["segment_ids"] = (torch.arange(130, device=DEVICE) >= 64).long()[None]
    clean = ssd(**inputs, backend="triton")[0]
    inputs["x"][0, 5] = torch.inf
    y = ssd(**inputs, backend="triton")[0]
    assert not y[:, 5].isfinite().any()
    torch.testing.assert_close(y[:, 64:], clean[:, 64:])


@on_kernels
def test_two_runs_agree_to_the_last_bit(all_gradients: Any) -> None:
    inputs = make(1, 65, 4, 5, 2, 17)
    first, second = (all_gradients(ssd, inputs, backend="triton") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@on_kernels
def test_says_what_it_does_not_take() -> None:
    for sizes in ((1, 2, 1, 129, 1, 4), (1, 2, 1, 4, 1, 257)):
        with pytest.raises(BackendError, match="at most 256 states and 128 channels per head"):
            ssd(**make(*sizes), backend="triton")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases above ran in this process")
def test_in_the_interpreter(run_interpreted: Any) -> None:
    run_interpreted(__file__, at_least=21)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
def test_compile_for_hopper(compile_triton: Any) -> None:
    """No GPU needed. Local memory inside a loop would be spilled registers, which the loop would wait for."""
    plain = [x for x in compile_triton.SSD_VARIANTS if x.dtype == "bf16" and (x.d_state, x.channels) == (128, 64)]
    assert {x.kernel for x in plain} == {"state", "output", "gradient", "pass"}
    for variant in (x for x in plain if x.kernel == "pass" or x.absent or x.kernel == "state"):
        report = compile_triton.compile_variant(variant)
        assert report.local_accesses_in_loops == 0, variant.title
        assert report.local_bytes <= 128, variant.title
        assert report.shared_bytes <= 64 * 1024, variant.title  # at least three programs side by side
        assert report.programs_per_multiprocessor >= 2, variant.title


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the cases above launch the kernels")
@pytest.mark.parametrize("bare", [False, True])
def test_launches_compile(bare: bool, compiled_launches: Any) -> None:
    """The launcher makes constants of arguments that are 1 or None; the kernels must compile with them."""
    kernels = importlib.import_module("zoo.kernels.ssd.triton_kernels")
    backend = importlib.import_module("zoo.kernels.ssd.triton_backend")
    compiled = compiled_launches(kernels, "state_kernel", "pass_kernel", "output_kernel", "gradient_kernel")
    inputs = make(*((1, 130, 4, 17, 2, 33) if bare else (1, 1, 1, 1, 1, 1)), dtype=torch.bfloat16, softplus=not bare)
    if bare:
        inputs |= dict.fromkeys(("D", "dt_bias", "initial_state", "segment_ids"))
    y, final_state, checkpoints = backend.forward(*inputs.values(), True)
    backend.backward(y, None if bare else final_state, *inputs.values(), checkpoints)
    assert len(compiled) == 6
