"""Each backend of wkv7 against the reference loop, and the reference against formulas and code from elsewhere.

Shape letters: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import backends, parallel, wkv7, wkv7_flops
from zoo.kernels.errors import BackendError, ZooError

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-12,  # eps 2e-16; sums over up to 130 steps and 80 channels
    torch.float32: 5e-6,  # eps 6e-8; the state is a sum over hundreds of steps that partly cancel
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}

BACKENDS = ["numba"] + ["triton"] * torch.cuda.is_available()
NAMES = ("r", "w", "k", "v", "a", "b")


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def make(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    initial: bool = False,
    segments: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments about those of RWKV-7, but with a and b off from one another, as the general form allows."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kappa = F.normalize(normal(B, T, H, K), dim=-1)
    rate = torch.rand(B, T, H, K, generator=generator, dtype=torch.float64)
    inputs: dict[str, Any] = {
        "r": normal(B, T, H, K),
        "w": -0.6065 * torch.rand(B, T, H, K, generator=generator, dtype=torch.float64),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "a": -kappa + 0.1 * normal(B, T, H, K) / K**0.5,
        "b": kappa * rate,
    }
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    inputs["initial_state"] = normal(B, H, V, K).to(device, wide) if initial else None
    inputs["segment_ids"] = (torch.rand(B, T, generator=generator) < 0.1).cumsum(1).to(device) if segments else None
    return inputs


@pytest.fixture
def check(all_gradients: Any, assert_close: Any, exact: Any) -> Callable[..., None]:
    """Compares outputs, final state and every gradient with the reference in float64."""

    def compare(backend: str, inputs: dict[str, Any], tolerance: float | None = None) -> None:
        expected = all_gradients(wkv7, exact(inputs), backend="reference")
        results = all_gradients(wkv7, inputs, backend=backend)
        dtype = inputs["v"].dtype
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                assert results[f"d{name}"].dtype == x.dtype, name
        results = {name: x.cpu() for name, x in results.items()}
        assert_close(results, expected, TOLERANCES[dtype] if tolerance is None else tolerance)

    return compare


@pytest.mark.parametrize(("H", "K", "V"), [(1, 1, 1), (3, 5, 33), (1, 16, 64), (5, 17, 3), (2, 64, 32)])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 63, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, T: int, H: int, K: int, V: int, check: Any) -> None:
    """Among them one head (whose blocks of value channels are tasks of their own) and several."""
    dtype = torch.float64 if backend == "numba" else torch.float32
    check(backend, make(2, T, H, K, V, dtype=dtype, device=device_of(backend), initial=True, segments=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, check: Any) -> None:
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("refused: see test_bad_arguments")
    # 2 * 2 heads with three blocks each in one task, so that the sums over blocks meet in place.
    check(backend, make(2, 70, 2, 64, 80, dtype=dtype, device=device_of(backend), initial=True, segments=True))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 40), st.integers(1, 100)),
    initial=st.booleans(),
    segments=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_size(sizes: tuple[int, ...], initial: bool, segments: bool, seed: int, check: Any) -> None:
    check("numba", make(*sizes, initial=initial, segments=segments, seed=seed))


def unrolled(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The formula without a recurrence: every token's share times the product of all later matrices."""
    x = {name: value.numpy() for name, value in zip(NAMES, (r, w, k, v, a, b), strict=True)}
    B, T, H, K = x["r"].shape
    y, state = np.zeros(x["v"].shape), initial_state.numpy().copy()
    for n in range(B):
        for h in range(H):
            matrices = [np.diag(np.exp(x["w"][n, t, h])) + np.outer(x["a"][n, t, h], x["b"][n, t, h]) for t in range(T)]
            for t in range(T):
                product, total = np.eye(K), np.zeros(state.shape[2:])
                for s in range(t, -1, -1):
                    total += np.outer(x["v"][n, s, h], x["k"][n, s, h]) @ product
                    product = matrices[s] @ product
                total += initial_state[n, h].numpy() @ product
                y[n, t, h] = total @ x["r"][n, t, h]
            state[n, h] = total
    return y, state


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_product_of_matrices(backend: str) -> None:
    inputs = make(2, 21, 2, 4, 6, initial=True)
    tensors = {name: inputs[name] for name in (*NAMES, "initial_state")}
    y, state = wkv7(**tensors, backend=backend)
    expected = unrolled(*tensors.values())
    np.testing.assert_allclose(y, expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state, expected[1], rtol=1e-10, atol=1e-12)


def _naive() -> types.ModuleType:
    """The CPU functions of fla-core, whose package cannot be imported without a warning where there is no GPU."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    path = f"{package.submodule_search_locations[0]}/ops/generalized_delta_rule/dplr/naive.py"
    spec = importlib.util.spec_from_file_location("dplr_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("oracle", ["dplr_recurrence", "dplr_chunkwise"])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_against_fla_core(backend: str, oracle: str) -> None:
    """Their recurrence, and their chunked form, which gets the same by triangular matrices. Both compute in float32."""
    inputs = make(2, 64, 3, 16, 24, initial=True)
    r, w, k, v, a, b = (inputs[name].transpose(1, 2).float() for name in NAMES)
    y, state = getattr(_naive(), oracle)(r * 16**0.5, k, v, a, b, w, inputs["initial_state"].mT.float())
    result = wkv7(**inputs, backend=backend)
    torch.testing.assert_close(result[0], y.transpose(1, 2).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[1], state.mT.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("split", [1, 31, 32, 33, 69])
def test_split_equals_whole(backend: str, split: int, all_gradients: Any, assert_close: Any) -> None:
    """Gradients flow through the carried state: every one of them equals that of the whole sequence."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = make(2, 70, 2, 5, 34, dtype=dtype, device=device_of(backend), initial=True)

    def in_two(**arguments: Any) -> tuple[Tensor, Tensor]:
        state, ys = arguments.pop("initial_state"), []
        for part in (slice(0, split), slice(split, None)):
            here = {name: arguments[name][:, part] for name in NAMES}
            y, state = wkv7(**here, initial_state=state, backend=backend)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = all_gradients(wkv7, inputs, backend=backend)
    assert_close(all_gradients(in_two, inputs), whole, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_equals_separate(backend: str) -> None:
    lengths = [1, 30, 2, 33, 5]
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = make(1, sum(lengths), 2, 6, 33, dtype=dtype, device=device_of(backend), initial=True)
    ids = torch.repeat_interleave(torch.tensor([3, 4, 3, 8, 9]), torch.tensor(lengths))[None].to(inputs["r"].device)
    y, final_state = wkv7(**{**inputs, "segment_ids": ids}, backend=backend)
    start, state = 0, inputs["initial_state"]  # belongs to the first document alone
    for length in lengths:
        part = {name: inputs[name][:, start : start + length] for name in NAMES}
        alone, last = wkv7(**part, initial_state=state, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], alone)
        start, state = start + length, None
    torch.testing.assert_close(final_state, last)


def test_infinity_stays_in_its_document() -> None:
    inputs = make(1, 10, 2, 4, 3)
    inputs["segment_ids"] = torch.tensor([[0] * 4 + [1] * 6])
    clean = wkv7(**inputs)[0]
    inputs["k"][0, 2] = torch.inf
    assert not wkv7(**inputs)[0][:, :4].isfinite().all()
    torch.testing.assert_close(wkv7(**inputs)[0][:, 4:], clean[:, 4:])


def test_infinite_gradient_stays_in_its_document() -> None:
    inputs = make(1, 40, 1, 4, 3)
    inputs["segment_ids"] = torch.tensor([[0] * 34 + [1] * 6])
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    dy = torch.ones(1, 40, 1, 3, dtype=torch.float64)
    clean = torch.autograd.grad(wkv7(**inputs)[0], leaves, dy)
    dy[0, 37] = torch.inf
    for name, gradient, truth in zip(NAMES, torch.autograd.grad(wkv7(**inputs)[0], leaves, dy), clean, strict=True):
        assert not gradient[:, 34:38].isfinite().all(), name
        torch.testing.assert_close(gradient[:, :34], truth[:, :34], msg=name)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_nan_and_infinity_come_out(backend: str) -> None:
    for bad in (torch.nan, torch.inf):
        for name in NAMES:
            inputs = make(1, 40, 1, 16, 4, dtype=torch.float32)
            inputs[name][0, 20, 0, 1] = bad
            y, state = wkv7(**inputs, backend=backend)
            assert y[0, :20].isfinite().all(), name
            assert not (y[0, 20].isfinite().all() and state.isfinite().all()), name


@pytest.mark.parametrize("decay", [0.0, 1e-6, 1e-3, 1 - 1e-6, 1.0])
def test_extreme_decays(decay: float, check: Any) -> None:
    """Nothing is ever divided by a decay: the state may be forgotten within a step, or kept for the whole sequence."""
    inputs = make(2, 70, 2, 16, 32, dtype=torch.float32, initial=True)
    inputs["w"][..., ::2] = torch.tensor(decay, dtype=torch.float64).log().to(torch.float32)
    check("numba", inputs)


@pytest.mark.parametrize("decay", [1e-6, 1 - 1e-6])
def test_long_sequence(decay: float, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """65,536 steps in float32 against float64, the kernel in both: the reference loop would take minutes."""
    inputs = make(1, 65_536, 1, 8, 4, dtype=torch.float32)
    inputs["w"][:] = torch.tensor(decay, dtype=torch.float64).log()
    expected = all_gradients(wkv7, exact(inputs))
    assert_close(all_gradients(wkv7, inputs), expected, 1e-4)  # the state adds up tens of thousands of steps


def test_views_and_expanded_gradients(all_gradients: Any, assert_close: Any) -> None:
    """As in a model: heads cut from projections, time and heads swapped; `sum().backward()` expands its gradient."""
    inputs = make(2, 37, 3, 5, 32, dtype=torch.float32)
    views = dict(inputs)
    wide = torch.cat([inputs[name] for name in ("r", "k", "v")], dim=-1)
    views["r"], views["k"], views["v"] = wide.split([5, 5, 32], dim=-1)
    views["w"] = inputs["w"].transpose(1, 2).contiguous().transpose(1, 2)
    views["a"] = inputs["a"].transpose(1, 3).contiguous().transpose(1, 3)
    views["b"] = inputs["b"][:, :1].expand(-1, 37, -1, -1)
    plain = {**inputs, "b": views["b"].contiguous()}
    torch.testing.assert_close(wkv7(**views), wkv7(**plain), rtol=0, atol=0)
    leaves = [x.requires_grad_() for name, x in plain.items() if name in NAMES]
    gradients = [
        torch.autograd.grad(wkv7(**plain, backend=backend)[0].sum(), leaves) for backend in ("numba", "reference")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 5])
def test_threads_do_not_change_a_bit(
    heads: int, monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any
) -> None:
    inputs = make(1, 70, heads, 20, 100, dtype=torch.float32, initial=True, segments=True)
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_gradients(wkv7, inputs)
        torch.set_num_threads(3)
        together = all_gradients(wkv7, inputs)
    finally:
        torch.set_num_threads(before)
    assert_close(together, alone, 0.0)


def test_one_head_is_work_for_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    monkeypatch.setattr(parallel, "run", lambda kernel, count, *rest: tasks.append(count))
    for B, H in ((1, 1), (1, 4)):
        wkv7(**make(B, 8, H, 64, 64, dtype=torch.float32))
    assert tasks == [2, 4]


def test_only_the_final_state_has_a_gradient() -> None:
    inputs = make(2, 40, 2, 5, 3)
    inputs["b"].requires_grad_()
    gradients = [
        torch.autograd.grad(wkv7(**inputs, backend=backend)[1].sum(), inputs["b"])[0]
        for backend in ("numba", "reference")
    ]
    torch.testing.assert_close(*gradients)


def test_reference_gradcheck() -> None:
    inputs = make(1, 4, 2, 2, 3, initial=True, segments=True)
    ids = inputs.pop("segment_ids")
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return wkv7(**dict(zip(inputs, values, strict=True)), segment_ids=ids, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optionals", [False, True])
def test_opcheck(optionals: bool, dtype: torch.dtype) -> None:
    inputs = make(2, 37, 3, 5, 18, dtype=dtype, initial=optionals, segments=optionals)
    state, ids = inputs["initial_state"], inputs["segment_ids"]
    steps = tuple(inputs[name].requires_grad_() for name in NAMES)
    if state is not None:
        state.requires_grad_()
    torch.library.opcheck(torch.ops.zoo.wkv7_forward.default, (*steps, state, ids, True, "numba"))
    with torch.no_grad():
        y, final, checkpoints = torch.ops.zoo.wkv7_forward(*steps, state, ids, True, "numba")
    dfinal = torch.randn_like(final) if optionals else None
    backward = (torch.randn_like(y), dfinal, *steps, state, ids, checkpoints, "numba")
    backward = tuple(x.detach() if isinstance(x, Tensor) else x for x in backward)
    torch.library.opcheck(torch.ops.zoo.wkv7_backward.default, backward)


def test_flops_count_what_the_operation_does() -> None:
    # One entry of the state: S a (product, sum), decay, its share of b and of k (product, sum each), S r; and one exp.
    assert wkv7_flops(1, 1, 1, 1, 1) == 2 + 1 + 4 + 2 + 1
    assert wkv7_flops(2, 3, 5, 7, 11) == 2 * 3 * 5 * 7 * (9 * 11 + 1)
    inputs = make(2, 37, 3, 5, 18, dtype=torch.float32)
    inputs["r"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = wkv7(**inputs)[0].sum()
    assert counter.get_total_flops() == wkv7_flops(2, 37, 3, 5, 18)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == wkv7_flops(2, 37, 3, 5, 18, backward=True)


def test_checkpoints_of_chunks_alone_are_stored_and_only_for_gradients() -> None:
    inputs = make(2, 37, 3, 5, 18, dtype=torch.float32)
    inputs["r"].requires_grad_()
    stored = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.zoo.wkv7_forward.default:
                stored.append(result[2].shape)
            return result

    with Watch():
        wkv7(**inputs)
        with torch.no_grad():
            wkv7(**inputs)
    assert stored == [(2, 2, 3, 32, 5), (0,)]


def bad(change: Callable[[dict[str, Any]], Any], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(lambda a: a.update(r=a["r"][0]), r"r has shape \(5, 2, 4\), expected \(B T H K\)"),
        bad(lambda a: a.update(r=a["r"][:, :0]), r"r has shape \(2, 0, 2, 4\): expected no empty dimension"),
        bad(lambda a: a.update(v=[1.0]), r"v is a list: pass a torch.Tensor"),
        bad(lambda a: a.update(w=a["w"][..., :3]), r"w has shape \(2, 5, 2, 3\), expected \(B=2, T=5, H=2, K=4\)"),
        bad(lambda a: a.update(v=a["v"][:, :4]), r"v has shape \(2, 4, 2, 3\), expected \(B=2, T=5, H=2, V=3\)"),
        bad(lambda a: a.update(k=a["k"].long()), r"k has dtype torch.int64, expected a real floating dtype"),
        bad(lambda a: a.update(a=a["a"].to("meta")), r"a is on meta, the first input on cpu: move a there"),
        bad(lambda a: a.update(b=0.5), r"b is a float"),
        bad(lambda a: a.update(initial_state=torch.zeros(2, 2, 4, 3)), r"initial_state has shape .* V=3, K=4\)"),
        bad(lambda a: a.update(segment_ids=torch.zeros(2, 5)), r"segment_ids has dtype torch.float32, .* integer"),
        bad(lambda a: a.update(backend="nunba"), r"no backend is called 'nunba': did you mean 'numba'\?"),
        bad(lambda a: a.update(backend="cuda"), r"'cuda' cannot run this: needs a CUDA device"),
    ],
)
def test_bad_arguments(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arguments = make(2, 5, 2, 4, 3, dtype=torch.float32)
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        wkv7(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("feature", ["segment_ids", "float32", "float64", "K > 256"])
def test_fla_core_says_what_it_does_not_take(feature: str) -> None:
    with pytest.raises(BackendError, match=f"fla-core's chunk_rwkv7 does not take {feature}"):
        backends.resolve("wkv7", "cuda", "cuda", (feature,))


def test_float64_is_not_for_triton() -> None:
    with pytest.raises(BackendError, match="kernels compute in float32, the inputs are float64"):
        backends.resolve("wkv7", "triton", "cuda", ("float64",))


@pytest.mark.parametrize("initial", [False, True])
def test_layouts_of_fla_core(
    initial: bool, monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any
) -> None:
    """The adapter against a stand-in with the package's signature, layout and autograd behaviour, on the CPU."""
    numba = importlib.import_module("zoo.kernels.wkv7.numba_backend")

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, r, w, k, v, a, b, initial_state):  # type: ignore[no-untyped-def]
            assert all(x.is_contiguous() and x.dtype == v.dtype for x in (r, k, v, a, b))
            assert w.dtype == torch.float32
            assert initial_state is None or (initial_state.is_contiguous() and initial_state.dtype == torch.float32)
            state = None if initial_state is None else initial_state.mT
            y, state, checkpoints = numba.forward(r, w, k, v, a, b, state, None, True)
            ctx.save_for_backward(r, w, k, v, a, b, checkpoints)
            return y, state.mT.contiguous()

        @staticmethod
        def backward(ctx, dy, dstate):  # type: ignore[no-untyped-def]
            *steps, checkpoints = ctx.saved_tensors
            *gradients, dinitial = numba.backward(dy.contiguous(), dstate.mT, *steps, None, None, checkpoints)
            return (*(g.to(x.dtype) for g, x in zip(gradients, steps, strict=True)), dinitial.mT)

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False):  # type: ignore[no-untyped-def]
        assert scale == 1.0
        assert output_final_state
        return Chunked.apply(r, w, k, v, a, b, initial_state)

    package = types.ModuleType("fla.ops.rwkv7")
    package.chunk_rwkv7 = chunk_rwkv7  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    name = "zoo.kernels.wkv7.cuda_backend"
    sys.modules.pop(name, None)
    adapter = importlib.import_module(name)
    del sys.modules[name]  # tied to the stand-in
    monkeypatch.setattr(backends, "resolve", lambda operator, requested, device, features: requested)

    inputs = make(2, 19, 2, 5, 3, dtype=torch.bfloat16, initial=initial)
    inputs["w"] = inputs["w"].float()
    inputs["r"] = inputs["r"].transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(backends, "load", lambda operator, backend: {"cuda": adapter, "numba": numba}[backend])
    expected = all_gradients(wkv7, inputs, backend="numba")
    assert_close(all_gradients(wkv7, inputs, backend="cuda"), expected, 1e-6)


HOSTILE = """
import torch
from zoo.kernels import wkv7
torch.manual_seed(0)
x = {name: (torch.randn(2, 45, 3, 37 if name == "v" else 5) / 4).requires_grad_() for name in "rwkvab"}
x["w"] = x["w"].detach().abs().neg().requires_grad_()

def run(backend):
    y, state = wkv7(**x, backend=backend)
    return y, state, *torch.autograd.grad(y.sum() + state.sum(), list(x.values()))

torch.testing.assert_close(run("numba"), run("reference"), rtol=1e-4, atol=1e-4)
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills new memory on Linux alone")
def test_scratch_memory() -> None:
    """Scratch inside the kernels is filled with 0xFE (-1.7e38) by the allocator."""
    environment = {**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", HOSTILE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr
