"""Selective scan on a GPU: the zoo's Triton kernels against mamba-ssm's CUDA kernel and against what the chip allows.

    python benchmarks/selective_scan_gpu.py                     # writes benchmarks/results/selective_scan_gpu.json
    python benchmarks/selective_scan_gpu.py --times 1024 4096 --blocks 16 32        # short; other channels per program

Nothing is timed before the Triton kernels agree with the reference in float64 (outputs and every gradient, in both
dtypes) and, where mamba-ssm is installed, with it. Each contender gets its own layout: the zoo (B, T, D), mamba-ssm
(B, D, T); transposing is not part of any time. Two floors are given: bytes (each input read and each output written
once, at the bandwidth that a copy reaches on this device) and exp2 (one per step, channel and state, 16 a clock and
multiprocessor; backward needs at least one more). Memory is the peak beyond the inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.eval.measure import machine_info
from zoo.kernels import selective_scan

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative root mean square error
GRADIENTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def make(B: int, T: int, D: int, N: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs as at the start of training: A = -(1..N), step sizes around 0.05."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = {"u": D, "dt": D, "z": D, "B": N, "C": N}
    inputs = {k: torch.randn(B, T, n, generator=generator, device=DEVICE, dtype=dtype) for k, n in shapes.items()}
    A = -torch.arange(1.0, N + 1, device=DEVICE).repeat(D, 1)
    return inputs | {"A": A, "D": torch.ones(D, device=DEVICE), "dt_bias": torch.full((D,), -3.0, device=DEVICE)}


def triton_call(inputs: dict[str, Tensor], backend: str = "triton") -> Tensor:
    return selective_scan(**inputs, dt_softplus=True, backend=backend)[0]


def mamba_call(inputs: dict[str, Tensor]) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    return selective_scan_fn(*(inputs[name] for name in names), delta_softplus=True)


def time_innermost(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.transpose(1, 2).contiguous() if x.dim() == 3 else x for k, x in inputs.items()}


def results(call: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor, **options: str) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = call(leaves, **options)
    gradients = torch.autograd.grad(y, [leaves[name] for name in GRADIENTS], dy)
    return {"y": y.detach(), **dict(zip((f"d{name}" for name in GRADIENTS), gradients, strict=True))}


def gate(dtype: torch.dtype, mamba: bool) -> dict[str, float]:
    """Errors against the reference in float64; ends the run where one is too large."""
    inputs = make(2, 300, 80, 16, dtype)
    dy = torch.randn_like(inputs["u"])
    exact = {name: x.double() for name, x in inputs.items()}
    truth = results(triton_call, exact, dy.double(), backend="reference")
    contenders = {"triton": results(triton_call, inputs, dy)}
    if mamba:
        found = results(mamba_call, time_innermost(inputs), dy.transpose(1, 2).contiguous())
        contenders["mamba-ssm"] = {k: x.transpose(1, 2) if x.dim() == 3 else x for k, x in found.items()}
    errors = {
        f"{who} {name}": ((x.double() - truth[name]).norm() / truth[name].norm()).item()
        for who, found in contenders.items()
        for name, x in found.items()
    }
    worst = max(errors, key=lambda k: errors[k])
    print(f"{dtype!s:16} worst error against float64: {errors[worst]:.1e} ({worst})")
    if not errors[worst] <= TOLERANCES[dtype]:  # also NaN
        sys.exit(f"selective_scan_gpu: {worst} is wrong, {errors[worst]:.1e} > {TOLERANCES[dtype]:.0e}: nothing timed")
    return errors


def measure(call: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Any]:
    """Median milliseconds of forward (no gradients) and of forward with backward, and peak memory of the latter."""
    from triton.testing import do_bench

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    wanted = [leaves[name] for name in GRADIENTS]

    def both() -> None:
        torch.autograd.grad(call(leaves), wanted, dy)

    try:
        forward = do_bench(lambda: call(inputs), return_mode="median")
        forward_backward = do_bench(both, return_mode="median")
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    peak = torch.cuda.max_memory_allocated() - held
    return {"forward_ms": forward, "forward_backward_ms": forward_backward, "peak_bytes": peak}


def floors(B: int, T: int, D: int, N: int, dtype: torch.dtype, bytes_per_ms: float) -> dict[str, float]:
    from triton.runtime import driver

    chip = driver.active.utils.get_device_properties(torch.cuda.current_device())
    exp2_per_ms = 16 * chip["multiprocessor_count"] * chip["sm_clock_rate"]  # the clock is in kHz
    wide, narrow = B * T * D * dtype.itemsize, 2 * B * T * N * dtype.itemsize
    return {
        "bytes_forward_ms": (4 * wide + narrow) / bytes_per_ms,
        "bytes_forward_backward_ms": (11 * wide + 3 * narrow) / bytes_per_ms,
        "exp2_forward_ms": B * T * D * N / exp2_per_ms,
        "exp2_forward_backward_ms": 2 * B * T * D * N / exp2_per_ms,
    }


def copy_bandwidth() -> float:
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[1024 << i for i in range(7)])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs="+", default=[], help="channels per program to try as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "selective_scan_gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("selective_scan_gpu: no CUDA device here; run it on a machine with one")

    from zoo.kernels.selective_scan import triton_backend

    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401

        mamba = True
    except ImportError as error:
        mamba = False
        print(f"mamba-ssm is left out: {error}")
    errors = {str(dtype): gate(dtype, mamba) for dtype in TOLERANCES}
    bandwidth = copy_bandwidth()
    machine = machine_info(DEVICE) | {"copy_bytes_per_second": bandwidth * 1e3}
    print(f"{machine['device']}, copy {bandwidth / 1e9:.2f} TB/s, versions {machine['versions']}")
    print("floors in ms: bytes, exp2 of forward; of forward and backward")
    print(f"{'dtype':9}{'T':>7}  {'contender':16}{'fwd ms':>9}{'fwd+bwd':>9}{'GiB':>7}   floors")
    default, rows = triton_backend.BLOCK, []
    for dtype in TOLERANCES:
        for T in options.times:
            sizes = (options.batch, T, options.channels, 16)
            floor = floors(*sizes, dtype, bandwidth)
            contenders: list[tuple[str, Callable[..., Tensor], int]] = [("triton", triton_call, default)]
            contenders += [(f"triton block {block}", triton_call, block) for block in options.blocks]
            contenders += [("mamba-ssm", mamba_call, default)] * mamba
            for name, call, block in contenders:
                triton_backend.BLOCK = block
                inputs = make(*sizes, dtype)
                dy = torch.randn_like(inputs["u"])
                if call is mamba_call:
                    inputs, dy = time_innermost(inputs), dy.transpose(1, 2).contiguous()
                row = measure(call, inputs, dy)
                rows.append({"contender": name, "dtype": str(dtype), "T": T, **row, **floor})
                figures = row.get("error") or (
                    f"{row['forward_ms']:9.3f}{row['forward_backward_ms']:9.3f}{row['peak_bytes'] / 2**30:7.2f}"
                    f"   {floor['bytes_forward_ms']:.3f}, {floor['exp2_forward_ms']:.3f}; "
                    f"{floor['bytes_forward_backward_ms']:.3f}, {floor['exp2_forward_backward_ms']:.3f}"
                )
                print(f"{str(dtype)[6:]:9}{T:7}  {name:16}{figures}", flush=True)
    options.output.parent.mkdir(exist_ok=True)
    settings = {"B": options.batch, "D": options.channels, "N": 16}
    report = {"machine": machine, "sizes": settings, "errors": errors, "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
