"""Selective scan on a CPU: the numba backend against the reference loop, same inputs, one run.

    python benchmarks/selective_scan_cpu.py          # writes benchmarks/results/selective_scan_cpu.json

Both backends get the same tensors and must agree before anything is timed. Memory is what forward and backward need
beyond their inputs, each backend in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.eval.measure import machine_info, median_time, peak_memory_bytes
from zoo.kernels import selective_scan

RESULTS = Path(__file__).parent / "results"
SIZES = {"B": 4, "T": 2048, "D": 512, "N": 16}


def make(B: int, T: int, D: int, N: int) -> dict[str, Any]:
    """Inputs as at the start of training: A = -(1..N), step sizes around 0.05, all optional parts but carried state."""
    generator = torch.Generator().manual_seed(0)
    u, dt, z, dy = (torch.randn(B, T, D, generator=generator) for _ in range(4))
    b, c = (torch.randn(B, T, N, generator=generator) for _ in range(2))
    inputs = {"u": u, "dt": dt, "A": -torch.arange(1.0, N + 1).repeat(D, 1), "B": b, "C": c}
    inputs |= {"D": torch.ones(D), "z": z, "dt_bias": torch.full((D,), -3.0)}
    return {"inputs": {name: x.requires_grad_() for name, x in inputs.items()}, "dy": dy}


def forward(case: dict[str, Any], backend: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return selective_scan(**case["inputs"], dt_softplus=True, backend=backend)[0]

    return run


def forward_backward(case: dict[str, Any], backend: str) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        y, _ = selective_scan(**case["inputs"], dt_softplus=True, backend=backend)
        return torch.autograd.grad(y, list(case["inputs"].values()), case["dy"])

    return run


def prepare(backend: str, sizes: dict[str, int]) -> Callable[[], Any]:
    """For the memory measurement: a short call first, so that compiled code is loaded."""
    forward_backward(make(**{**sizes, "B": 1, "T": 2}), backend)()
    return forward_backward(make(**sizes), backend)


def agree(case: dict[str, Any]) -> float:
    """Largest relative error of numba's gradients against the reference's: no figures for wrong results."""
    pairs = zip(*(forward_backward(case, backend)() for backend in ("numba", "reference")), strict=True)
    error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    if not error < 1e-5:
        raise SystemExit(f"selective_scan_cpu: numba and reference differ by {error:.1e}: nothing was timed")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of numba and of the reference's forward")
    parser.add_argument(
        "--slow-repeats", type=int, default=3, help="timed calls of the reference's forward and backward"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "selective_scan_cpu.json")
    options = parser.parse_args()

    case = make(**SIZES)
    error = agree(case)
    timed: dict[str, dict[str, Any]] = {}
    for pass_, build, slow in (
        ("forward", forward, options.repeats),
        ("forward+backward", forward_backward, options.slow_repeats),
    ):
        for backend, repeats in (("numba", options.repeats), ("reference", slow)):
            # `agree` was the warm-up
            timed[f"{pass_} {backend}"] = median_time(build(case, backend), repeats=repeats, warmup=0)
    memory = {backend: peak_memory_bytes(prepare, backend, SIZES) for backend in ("numba", "reference")}

    ratios = {
        name: timed[f"{name} reference"]["median"] / timed[f"{name} numba"]["median"]
        for name in ("forward", "forward+backward")
    }
    ratios["peak memory"] = memory["reference"] / memory["numba"]
    table = Table("", "reference", "numba", "ratio", title=f"selective_scan, float32, {SIZES}", title_justify="left")
    for name in ("forward", "forward+backward"):
        cells = [_spread(timed[f"{name} {backend}"]) for backend in ("reference", "numba")]
        table.add_row(name, *cells, f"{ratios[name]:.1f}x")
    cells = [f"{memory[backend] / 2**20:.0f} MiB" for backend in ("reference", "numba")]
    table.add_row("peak memory of forward+backward", *cells, f"{ratios['peak memory']:.1f}x")
    Console().print(table)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine_info(),
        "sizes": {**SIZES, "dtype": "float32"},
        "largest_gradient_error": error,
        "seconds": timed,
        "peak_memory_bytes": memory,
        "ratios": ratios,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def _spread(times: dict[str, Any]) -> str:
    return (
        f"{times['median'] * 1e3:.1f} ms ({times['min'] * 1e3:.1f} to {times['max'] * 1e3:.1f}, n={times['repeats']})"
    )


if __name__ == "__main__":
    main()
