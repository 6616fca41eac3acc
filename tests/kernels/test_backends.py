"""The choice of backend, its reasons, and the packages behind the `cuda` backends."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo.kernels
from zoo.kernels import backends
from zoo.kernels.__main__ import main
from zoo.kernels.causal_conv1d.reference import reference as conv_reference
from zoo.kernels.errors import BackendError


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(backends, "_operators", dict(backends._operators))
    monkeypatch.setattr(backends, "_used", {})
    backends.register(
        "double",
        [
            backends.Backend("fast", lambda device, features: "not on Sundays" if "sunday" in features else None),
            backends.Backend("slow", lambda device, features: None if device == "cpu" else f"no {device}"),
        ],
    )
    yield "double"
    backends._choose.cache_clear()


def test_auto_takes_the_first_that_can_run(operator: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zoo.kernels"):
        assert backends.resolve(operator, "auto", "cpu") == "fast"
        for _ in range(3):
            assert backends.resolve(operator, "auto", "cpu", ("sunday",)) == "slow"
    assert [r.message for r in caplog.records] == [
        "double on cpu runs on backend fast",
        "double on cpu with sunday runs on backend slow (not fast: not on Sundays)",
    ]
    assert backends.used() == {"double": "fast+slow"}


def test_a_named_backend_is_never_replaced(operator: str) -> None:
    assert backends.resolve(operator, "slow", "cpu") == "slow"
    with pytest.raises(BackendError, match="double: backend 'fast' cannot run this: not on Sundays; or pass"):
        backends.resolve(operator, "fast", "cpu", ("sunday",))
    with pytest.raises(BackendError, match="double: no backend is called 'fest': did you mean 'fast'"):
        backends.resolve(operator, "fest", "cpu")
    with pytest.raises(BackendError, match="no backend runs on tpu: fast: not on Sundays; slow: no tpu"):
        backends.resolve(operator, "auto", "tpu", ("sunday",))
    assert backends.used() == {"double": "slow"}


def test_the_choice_on_this_project_s_devices() -> None:
    choices = {device: {name: choice for name, choice, _ in zoo.kernels.describe(device)} for device in ("cpu", "mps")}
    assert choices["cpu"].pop("linear") in ("onednn", "torch")  # as the processor is
    names = [operator.name for operator in backends.operators() if operator.name != "linear"]
    assert choices["cpu"] == dict.fromkeys(names, "numba")
    assert choices["mps"]["selective_scan"] == "reference"
    assert choices["mps"]["causal_conv1d"] == "torch"


def test_missing_names_the_package_and_the_extra() -> None:
    assert backends.missing("torch", "torch") is None
    assert backends.missing("no_such_package", "'subquadratic-zoo[cuda]'") == (
        "the package no_such_package is not installed (pip install 'subquadratic-zoo[cuda]')"
    )


def test_a_package_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c104cuda\nsecond line")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(
        BackendError, match=r"'cuda' is installed but does not load: .*_ZN3c104cuda; reinstall"
    ) as caught:
        backends.load("selective_scan", "cuda")
    assert "\n" not in str(caught.value)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    for words in (
        "Operators on cpu",
        "selective_scan",
        "causal_conv1d",
        "runs: the first choice",
        "needs a CUDA device",
    ):
        assert words in printed


@pytest.mark.parametrize("features", [("initial_state",), ("segment_ids",), ("float64",), ("d_state > 256",)])
def test_mamba_ssm_says_what_it_does_not_take(features: tuple[str, ...]) -> None:
    with pytest.raises(BackendError, match=f"mamba-ssm's selective_scan_fn does not take {features[0]}"):
        backends.resolve("selective_scan", "cuda", "cuda", features)


@pytest.mark.parametrize("features", [("float64",), ("taps outside 2..4",), ("initial_state", "segment_ids")])
def test_causal_conv1d_says_what_it_does_not_take(features: tuple[str, ...]) -> None:
    with pytest.raises(BackendError, match="causal-conv1d does not take"):
        backends.resolve("causal_conv1d", "cuda", "cuda", features)


def _load(backend: str) -> Any:
    """A fresh copy of a backend module, which stays out of sys.modules."""
    sys.modules.pop(backend, None)
    module = importlib.import_module(backend)
    del sys.modules[backend]
    return module


def test_layouts_of_mamba_ssm(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    """The adapter against a stand-in with the package's signature, layout and autograd behaviour, on the CPU."""
    numba = importlib.import_module("zoo.kernels.selective_scan.numba_backend")

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):  # type: ignore[no-untyped-def]
            steps = (u, delta, B, C, z)
            assert all(x is None or (x.dtype == u.dtype and x.stride(-1) == 1) for x in steps)
            assert all(x is None or x.dtype == torch.float32 for x in (A, D, delta_bias))
            u, delta, B, C, z = (None if x is None else x.mT for x in steps)
            y, state, checkpoints = numba.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, None, True)
            ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, checkpoints)
            ctx.softplus = delta_softplus
            return (y.mT, state) if return_last_state else y.mT

        @staticmethod
        def backward(ctx, dy, *dropped):  # type: ignore[no-untyped-def]
            *inputs, checkpoints = ctx.saved_tensors
            g = numba.backward(dy.mT.contiguous(), None, *inputs, ctx.softplus, None, checkpoints)
            du, ddt, dA, dB, dC, dD, dz, dbias, _ = g
            du, ddt, dB, dC, dz = (None if x is None else x.mT for x in (du, ddt, dB, dC, dz))
            return du, ddt, dA, dB, dC, dD, dz, dbias, None, None

    def selective_scan_fn(  # type: ignore[no-untyped-def]
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        return Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    modules = {"cuda": _load("zoo.kernels.selective_scan.cuda_backend"), "numba": numba}
    monkeypatch.setattr(backends, "load", lambda operator, backend: modules[backend])
    monkeypatch.setattr(backends, "resolve", lambda operator, requested, device, features: requested)

    B, T, D, N = 2, 19, 18, 3
    full: dict[str, Any] = {
        "u": torch.randn(B, T, D), "dt": torch.randn(B, T, D), "A": -torch.rand(D, N),
        "B": torch.randn(B, T, N), "C": torch.randn(B, T, N),
        "D": torch.randn(D), "z": torch.randn(B, T, D), "dt_bias": torch.randn(D), "dt_softplus": True,
    }  # fmt: skip
    bare = {name: full[name] for name in ("u", "dt", "A", "B", "C")}
    for inputs in (full, bare):

        def without_state_gradient(**arguments: Any) -> tuple[Tensor, Tensor]:
            y, state = zoo.kernels.selective_scan(**arguments)
            return y, state.detach()

        expected = all_gradients(without_state_gradient, inputs, backend="numba")
        results = all_gradients(without_state_gradient, inputs, backend="cuda")
        assert_close(results, expected, 1e-6)


def test_layouts_of_causal_conv1d(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    torch_backend = importlib.import_module("zoo.kernels.causal_conv1d.torch_backend")

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, seq_idx, initial_states, activation):  # type: ignore[no-untyped-def]
            assert x.stride(1) == 1
            assert x.stride(0) % 8 == x.stride(2) % 8 == 0
            if seq_idx is not None:  # the package compares ids: an id that comes back would see its earlier self
                assert seq_idx.dtype == torch.int32
                assert (seq_idx.diff(dim=1) >= 0).all()
            state = None if initial_states is None else initial_states.mT
            ctx.save_for_backward(x, weight, bias, seq_idx, state)
            ctx.activation = activation
            return conv_reference(x.mT, weight, bias, activation, state, seq_idx).mT

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            x, weight, bias, seq_idx, state = ctx.saved_tensors
            g = torch_backend.backward(dy.mT, x.mT, weight, bias, ctx.activation, state, seq_idx)
            dx, dweight, dbias, dstate = g
            return dx.mT, dweight, None if bias is None else dbias, None, None if state is None else dstate.mT, None

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):  # type: ignore[no-untyped-def]
        assert seq_idx is None or initial_states is None
        return Conv.apply(x, weight, bias, seq_idx, initial_states, activation)

    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    modules = {"cuda": _load("zoo.kernels.causal_conv1d.cuda_backend"), "torch": torch_backend}
    monkeypatch.setattr(backends, "load", lambda operator, backend: modules[backend])
    monkeypatch.setattr(backends, "resolve", lambda operator, requested, device, features: requested)

    B, T, D, K = 2, 19, 24, 4
    bare: dict[str, Any] = {"x": torch.randn(B, T, D), "weight": torch.randn(D, K)}
    full = {**bare, "bias": torch.randn(D), "activation": "silu"}
    carried = {**full, "initial_state": torch.randn(B, K - 1, D)}
    returning = {**full, "segment_ids": torch.tensor([0] * 5 + [1] * 2 + [0] * 12).expand(B, T)}
    for inputs in (bare, full, carried, returning, {**bare, "x": torch.randn(B, T, D + 1)[..., 1:]}):
        expected = all_gradients(zoo.kernels.causal_conv1d, inputs, backend="torch")
        assert_close(all_gradients(zoo.kernels.causal_conv1d, inputs, backend="cuda"), expected, 1e-6)


HOSTILE = """
import os, torch
from zoo.kernels import parallel, selective_scan, causal_conv1d
parallel.SMALL = 0
torch.set_num_threads(2)
torch.manual_seed(0)
u, w = torch.randn(2, 45, 150) / 4, torch.randn(150, 4) / 4
A, B = -torch.rand(150, 5), torch.randn(2, 45, 5)
leaves = [x.requires_grad_() for x in (u, w, A, B)]

def run(backend):
    v, _ = causal_conv1d(u, w, backend=backend)
    y, state = selective_scan(v, v, A, B, B, dt_softplus=True, backend=backend)
    return y, state, *torch.autograd.grad(y.sum() + state.sum(), leaves)

expected = run("reference")
torch.testing.assert_close(run("auto"), expected, rtol=1e-4, atol=1e-4)
if (child := os.fork()) == 0:
    torch.testing.assert_close(run("auto"), expected, rtol=1e-4, atol=1e-4)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills new memory, and fork is safe to test, on Linux alone")
def test_scratch_memory_and_forked_children() -> None:
    """Scratch inside the kernels is filled with 0xFE (-1.7e38) by the allocator; a forked child has no threads."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HOSTILE],
        env={**__import__("os").environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr
