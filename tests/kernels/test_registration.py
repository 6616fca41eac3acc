"""The operators as torch sees them: schema, fake tensors, compilation, FLOP counter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import (
    causal_conv1d,
    causal_conv1d_flops,
    selective_scan,
    selective_scan_flops,
    ssd,
    wkv7,
)


def scan_inputs(dtype: torch.dtype = torch.float32, *, optionals: bool = True) -> dict[str, Any]:
    B, T, D, N = 2, 37, 18, 5
    u, dt, z = (torch.randn(B, T, D, dtype=dtype) for _ in range(3))
    inputs = {"u": u, "dt": dt, "A": -torch.rand(D, N), "B": torch.randn(B, T, N), "C": torch.randn(B, T, N)}
    if optionals:
        inputs |= {"D": torch.randn(D), "z": z, "dt_bias": torch.randn(D), "initial_state": torch.randn(B, D, N)}
        inputs |= {"segment_ids": torch.arange(T).expand(B, T) // 10}
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    return {**inputs, "dt_softplus": True}


def conv_inputs(dtype: torch.dtype = torch.float32, *, optionals: bool = True) -> dict[str, Any]:
    B, T, D, K = 2, 37, 18, 4
    inputs: dict[str, Any] = {"x": torch.randn(B, T, D, dtype=dtype), "weight": torch.randn(D, K)}
    if optionals:
        inputs |= {"bias": torch.randn(D), "initial_state": torch.randn(B, K - 1, D, dtype=dtype)}
        inputs |= {"segment_ids": torch.arange(T).expand(B, T) // 10}
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    return {**inputs, "activation": "silu"}


def wkv7_inputs(*, optionals: bool = True) -> dict[str, Any]:
    B, T, H, K, V = 2, 37, 3, 5, 18
    inputs = {name: torch.randn(B, T, H, V if name == "v" else K) / 3 for name in ("r", "w", "k", "v", "a", "b")}
    inputs["w"] = -inputs["w"].abs()
    if optionals:
        inputs |= {"initial_state": torch.randn(B, H, V, K), "segment_ids": torch.arange(T).expand(B, T) // 10}
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    return inputs


def ssd_inputs(dtype: torch.dtype = torch.float32, *, optionals: bool = True) -> dict[str, Any]:
    B, T, H, P, G, N = 2, 70, 4, 5, 2, 3
    inputs = {"x": torch.randn(B, T, H, P, dtype=dtype), "dt": torch.randn(B, T, H, dtype=dtype), "A": -torch.rand(H)}
    inputs |= {"B": torch.randn(B, T, G, N, dtype=dtype), "C": torch.randn(B, T, G, N, dtype=dtype)}
    if optionals:
        inputs |= {"D": torch.randn(H), "dt_bias": torch.randn(H), "initial_state": torch.randn(B, H, P, N)}
        inputs |= {"segment_ids": torch.arange(T).expand(B, T) // 10}
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    return {**inputs, "dt_softplus": True}


OPERATORS = [
    pytest.param(selective_scan, scan_inputs, id="selective_scan"),
    pytest.param(causal_conv1d, conv_inputs, id="causal_conv1d"),
    pytest.param(wkv7, wkv7_inputs, id="wkv7"),
    pytest.param(ssd, ssd_inputs, id="ssd"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optionals", [False, True])
def test_opcheck_selective_scan(optionals: bool, dtype: torch.dtype) -> None:
    x = scan_inputs(dtype, optionals=optionals)
    arguments = tuple(x.get(name) for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    forward = (*arguments, True, x.get("initial_state"), x.get("segment_ids"), True, "numba")
    torch.library.opcheck(torch.ops.zoo.selective_scan_forward.default, forward)
    with torch.no_grad():
        y, state, checkpoints = torch.ops.zoo.selective_scan_forward(*forward)
    dstate = torch.randn_like(state) if optionals else None
    backward = (torch.randn_like(y), dstate, *arguments, True, x.get("segment_ids"), checkpoints, "numba")
    backward = tuple(a.detach() if isinstance(a, Tensor) else a for a in backward)
    torch.library.opcheck(torch.ops.zoo.selective_scan_backward.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optionals", [False, True])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_opcheck_causal_conv1d(backend: str, optionals: bool, dtype: torch.dtype) -> None:
    x = conv_inputs(dtype, optionals=optionals)
    arguments = tuple(x.get(name) for name in ("x", "weight", "bias", "activation", "initial_state", "segment_ids"))
    torch.library.opcheck(torch.ops.zoo.causal_conv1d_forward.default, (*arguments, backend))
    backward = tuple(a.detach() if isinstance(a, Tensor) else a for a in (torch.randn(2, 37, 18), *arguments, backend))
    torch.library.opcheck(torch.ops.zoo.causal_conv1d_backward.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optionals", [False, True])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_opcheck_ssd(backend: str, optionals: bool, dtype: torch.dtype) -> None:
    x = ssd_inputs(dtype, optionals=optionals)
    arguments = tuple(x.get(name) for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    options = (True, 0.1, 2.0, x.get("initial_state"), x.get("segment_ids"))
    forward = (*arguments, *options, True, backend)
    torch.library.opcheck(torch.ops.zoo.ssd_forward.default, forward)
    with torch.no_grad():
        y, state, checkpoints = torch.ops.zoo.ssd_forward(*forward)
    dstate = torch.randn_like(state) if optionals else None
    backward = (torch.randn_like(y), dstate, *arguments, *options, checkpoints, backend)
    backward = tuple(a.detach() if isinstance(a, Tensor) else a for a in backward)
    torch.library.opcheck(torch.ops.zoo.ssd_backward.default, backward)


@pytest.mark.parametrize(("operator", "make"), OPERATORS)
@pytest.mark.parametrize("optionals", [False, True])
def test_compiles_to_one_graph(operator: Any, make: Callable[..., dict[str, Any]], optionals: bool) -> None:
    torch._dynamo.reset()
    inputs = make(optionals=optionals)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]

    def run(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        y, state = operator(**inputs)
        return (2 * y).sin(), state

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y, state = function(inputs)
        results.append([y, state, *torch.autograd.grad(y.sum() + state.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_compiled_call_of_a_backend_that_cannot_run_says_why() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: causal_conv1d(x, w, backend="cuda"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="backend 'cuda' cannot run this: needs a CUDA device"):
        compiled(torch.randn(1, 3, 2), torch.randn(2, 4))


@pytest.mark.parametrize(("operator", "make"), OPERATORS)
def test_meta_tensors_have_the_same_shapes(operator: Any, make: Callable[..., dict[str, Any]]) -> None:
    inputs = make()
    real = operator(**inputs)
    meta = operator(**{k: x.to("meta") if isinstance(x, Tensor) else x for k, x in inputs.items()})
    assert [(x.shape, x.dtype, x.stride()) for x in meta] == [(x.shape, x.dtype, x.stride()) for x in real]


def test_flop_counter_agrees_with_the_formulas() -> None:
    x, c = scan_inputs(), conv_inputs()
    with FlopCounterMode(display=False) as counter:
        loss = selective_scan(**x)[0].sum() + causal_conv1d(**c)[0].sum()
    forward = selective_scan_flops(2, 37, 18, 5), causal_conv1d_flops(2, 37, 18, 4)
    assert counter.get_total_flops() == sum(forward)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    backward = (
        selective_scan_flops(2, 37, 18, 5, backward=True),
        causal_conv1d_flops(2, 37, 18, 4, backward=True),
    )
    assert counter.get_total_flops() == sum(backward)
    assert all(f < b < 4 * f for f, b in zip(forward, backward, strict=True))


def test_flops_count_what_the_operation_does() -> None:
    # One token, one channel, one state, nothing optional: delta u, the bias and softplus of delta; delta A, exp,
    # decay h, drive B, sum, h C, sum.
    assert selective_scan_flops(1, 1, 1, 1, D=False, z=False) == 3 + 7
    assert selective_scan_flops(3, 5, 7, 11) == 3 * 5 * 7 * (7 * 11 + 7)
    assert causal_conv1d_flops(1, 1, 1, 4, bias=False, activation=False) == 4 + 3
    assert causal_conv1d_flops(2, 3, 5, 4) == 2 * 3 * 5 * 9


def test_without_gradients_nothing_is_stored() -> None:
    inputs = scan_inputs()
    stored = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.zoo.selective_scan_forward.default:
                stored.append(result[2].shape)
            return result

    with Watch():
        selective_scan(**inputs)
        with torch.no_grad():
            selective_scan(**inputs)
    assert stored == [(2, 2, 18, 5), (0,)]


LIGHT = """
import sys, torch
before = set(sys.modules)
import zoo.kernels
heavy = {"numba", "llvmlite", "triton", "mamba_ssm", "causal_conv1d", "torch._dynamo", "torch.utils.flop_counter"}
assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)
hooks = len(sys.meta_path)
from torch.utils.flop_counter import FlopCounterMode, flop_registry
names = {str(op) for op in flop_registry}
for operator in zoo.kernels.backends.operators():
    assert {f"zoo.{operator.name}_forward", f"zoo.{operator.name}_backward"} <= names, flop_registry
assert len(sys.meta_path) == hooks - 1
"""


def test_import_is_light_and_the_flop_counter_still_knows_the_operators() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
