"""Each backend of ssd against the reference loop, and the reference against code and identities from elsewhere.

Shape letters: B batch, T time, H heads, P channels per head, G groups, N state size.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import parallel, selective_scan, ssd, ssd_flops
from zoo.kernels.backends import operators
from zoo.kernels.errors import BackendError, ZooError
from zoo.kernels.ssd import CHUNK

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-12,  # eps 2e-16; dA and ddt_bias sum a few hundred steps of either sign
    torch.float32: 1e-5,  # eps 6e-8; the exponent delta * A, rounded at up to 30, moves exp by 30 eps
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}

ON_CPU = ["torch", "numba"]
BACKENDS = ON_CPU + ["triton", "cuda"] * torch.cuda.is_available()


def device_of(backend: str) -> str:
    return "cpu" if backend in ON_CPU else "cuda"


def make(
    B: int,
    T: int,
    H: int,
    P: int,
    G: int,
    N: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    skip: bool = True,
    bias: bool = True,
    softplus: bool = True,
    limit: bool = False,
    initial: bool = False,
    segments: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments; the parameters and states stay in float32 when the activations are narrower, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    dt = normal(B, T, H)
    return {
        "x": normal(B, T, H, P),
        "dt": dt if softplus else dt.abs(),
        "A": -(3 * torch.rand(H, generator=generator, dtype=torch.float64) + 0.1).to(device, wide),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
        "D": normal(H, dtype=wide) if skip else None,
        "dt_bias": (normal(H, dtype=wide) if softplus else normal(H, dtype=wide).abs()) if bias else None,
        "dt_softplus": softplus,
        "dt_limit": (0.2, 1.5) if limit else (0.0, math.inf),
        "initial_state": normal(B, H, P, N, dtype=wide) if initial else None,
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.1).cumsum(1).to(device) if segments else None,
    }


def part(inputs: dict[str, Any], steps: slice) -> dict[str, Any]:
    """The arguments of some of the steps; parameters and states as they are."""
    along_time = ("x", "dt", "B", "C", "segment_ids")
    return {name: x[:, steps] if name in along_time and x is not None else x for name, x in inputs.items()}


@pytest.fixture
def check(all_gradients: Any, assert_close: Any, exact: Any) -> Callable[[str, dict[str, Any]], None]:
    """Compares every output and gradient with the reference, or expects a refusal with its reason."""

    def compare(backend: str, inputs: dict[str, Any]) -> None:
        (operator,) = (o for o in operators() if o.name == "ssd")
        (entry,) = (b for b in operator.backends if b.name == backend)
        dtype = inputs["x"].dtype
        if reason := entry.why_not(inputs["x"].device.type, ("float64",) * (dtype == torch.float64)):
            with pytest.raises(BackendError, match=r"ssd: backend .* cannot run this"):
                ssd(**inputs, backend=backend)
            pytest.skip(reason)
        expected = all_gradients(ssd, exact(inputs), backend="reference")
        results = all_gradients(ssd, inputs, backend=backend)
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                assert results[f"d{name}"].dtype == x.dtype, name
        assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])

    return compare


# H, P, G, N: one of each; less than a vector; whole vectors; more heads than a task takes, more states than a tile.
WIDTHS = [(1, 1, 1, 1), (4, 3, 2, 5), (2, 64, 1, 16), (6, 17, 1, 40), (3, 80, 3, 33)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, T: int, widths: tuple[int, ...], check: Any) -> None:
    on_cpu = backend in ON_CPU
    dtype = torch.float64 if on_cpu else torch.float32
    inputs = make(2, T, *widths, dtype=dtype, device=device_of(backend), initial=True, segments=True)
    check(backend, inputs)


OPTIONS = ("skip", "bias", "softplus", "limit", "initial", "segments")


@pytest.mark.parametrize(
    "options", list(itertools.product([False, True], repeat=6)), ids=lambda o: "".join("01"[x] for x in o)
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_optionals(backend: str, options: tuple[bool, ...], check: Any) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    inputs = make(2, 67, 2, 5, 1, 3, dtype=torch.float32, device=device_of(backend), **chosen)
    check(backend, inputs)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, check: Any) -> None:
    inputs = make(2, 100, 12, 32, 2, 24, dtype=dtype, device=device_of(backend))
    check(backend, inputs)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 140, 3, 70, 3, 40))),
    options=st.fixed_dictionaries({name: st.booleans() for name in OPTIONS}),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_any_size(
    backend: str,
    sizes: tuple[int, ...],
    options: dict[str, bool],
    seed: int,
    check: Any,
) -> None:
    batch, time, heads_per_group, channels, groups, d_state = sizes
    inputs = make(batch, time, heads_per_group * groups, channels, groups, d_state, **options, seed=seed)
    check(backend, inputs)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_same_as_a_selective_scan_with_shared_steps(backend: str) -> None:
    """H heads of P channels are H P channels of Mamba-1 with one step size and one A for each head."""
    inputs = make(2, 70, 3, 4, 1, 5, initial=True, segments=True)
    y, state = ssd(**inputs, backend=backend)

    def wide(x: Tensor) -> Tensor:
        return x.repeat_interleave(4, dim=-1)

    scan_y, scan_state = selective_scan(
        inputs["x"].flatten(2), wide(inputs["dt"]), wide(inputs["A"])[:, None].expand(-1, 5),
        inputs["B"][:, :, 0], inputs["C"][:, :, 0], D=wide(inputs["D"]), dt_bias=wide(inputs["dt_bias"]),
        dt_softplus=True, initial_state=inputs["initial_state"].flatten(1, 2), segment_ids=inputs["segment_ids"],
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(2), scan_y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.flatten(1, 2), scan_state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_same_as_transformers(backend: str, all_gradients: Any, assert_close: Any) -> None:
    """The chunked scan of transformers' Mamba2Mixer, which is float32 inside whatever it is given."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(modeling, "mamba2_chunk_scan"):
        pytest.skip("this transformers has its scan inside the mixer")
    inputs = make(2, 37, 4, 8, 2, 6, dtype=torch.float32, limit=True, initial=True)
    del inputs["segment_ids"]

    def theirs(*, x: Tensor, initial_state: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        return modeling.mamba2_chunk_scan(  # type: ignore[no-any-return]
            x, initial_states=initial_state, chunk_size=16, return_final_states=True, **others
        )

    expected = all_gradients(theirs, inputs)
    assert_close(all_gradients(ssd, inputs, backend=backend), expected, 1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("split", [1, 63, 64, 65, 129])
def test_split_equals_whole(backend: str, split: int, all_gradients: Any, assert_close: Any) -> None:
    """Gradients flow through the carried state: every one of them equals that of the whole sequence."""
    double = backend in ("reference", *ON_CPU)
    dtype = torch.float64 if double else torch.float32
    device = "cpu" if double else "cuda"
    inputs = make(2, 130, 4, 6, 2, 5, dtype=dtype, device=device, initial=True, segments=True)
    ids = inputs["segment_ids"]
    # no boundary between the two calls: the second could not see it
    ids[:, split:] += ids[:, split - 1 : split] - ids[:, split : split + 1]

    def in_two(**arguments: Any) -> tuple[Tensor, Tensor]:
        y, state = ssd(**part(arguments, slice(0, split)))
        rest, state = ssd(**{**part(arguments, slice(split, None)), "initial_state": state})
        return torch.cat([y, rest], dim=1), state

    whole = all_gradients(ssd, inputs, backend=backend)
    halves = all_gradients(in_two, inputs, backend=backend)
    assert_close(halves, whole, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_equals_separate(backend: str) -> None:
    lengths = [1, 30, 2, 95, 5]
    double = backend in ("reference", *ON_CPU)
    dtype = torch.float64 if double else torch.float32
    inputs = make(1, sum(lengths), 4, 18, 1, 4, dtype=dtype, device="cpu" if double else "cuda", initial=True)
    # The id 3 comes back: it is another document then.
    ids = torch.repeat_interleave(torch.tensor([3, 4, 3, 8, 3]), torch.tensor(lengths))[None].to(inputs["x"].device)
    y, final_state = ssd(**{**inputs, "segment_ids": ids}, backend=backend)
    start, state = 0, inputs["initial_state"]  # belongs to the first document alone
    for length in lengths:
        alone, last = ssd(**{**part(inputs, slice(start, start + length)), "initial_state": state}, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], alone)
        start, state = start + length, None
    torch.testing.assert_close(final_state, last)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_infinity_stays_in_its_document_and_its_chunks(backend: str) -> None:
    inputs = make(1, 3 * CHUNK, 4, 16, 1, 4)
    inputs["segment_ids"] = (torch.arange(3 * CHUNK) >= 2 * CHUNK).long()[None]
    clean = ssd(**inputs, backend=backend)[0]
    inputs["x"][0, CHUNK + 2] = torch.inf
    y = ssd(**inputs, backend=backend)[0]
    assert not y[:, CHUNK + 2 : 2 * CHUNK].isfinite().any()
    for unharmed in (slice(0, CHUNK), slice(2 * CHUNK, None)):
        torch.testing.assert_close(y[:, unharmed], clean[:, unharmed])


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_nan_and_infinity_come_out(backend: str) -> None:
    for bad in (torch.nan, torch.inf):
        for name in ("x", "dt", "B", "C"):
            inputs = make(1, 80, 1, 16, 1, 4, dtype=torch.float32, skip=False)
            inputs[name][0, 70, 0] = bad
            y, state = ssd(**inputs, backend=backend)
            assert y[0, :CHUNK].isfinite().all(), name
            assert not (y[0, 70].isfinite().all() and state.isfinite().all()), name


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("decay", [-1e-6, -50.0, None])
def test_extreme_decays(backend: str, decay: float | None, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """delta A near 0, so far below that nothing survives a step, and the two mixed within each chunk."""
    inputs = make(2, 150, 3, 16, 1, 8, dtype=torch.float32, softplus=False, bias=False)
    inputs["A"] = torch.full((3,), -50.0 if decay is None else decay)
    inputs["dt"] = torch.ones(2, 150, 3)
    if decay is None:
        inputs["dt"][torch.rand(2, 150, 3) < 0.8] = 2e-8
    expected = all_gradients(ssd, exact(inputs), backend="reference")
    results = all_gradients(ssd, inputs, backend=backend)
    if decay == -50.0:
        del results["dA"], expected["dA"]  # below the smallest float32 but for rounding
    assert_close(results, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", ON_CPU)
def test_long_sequences(backend: str, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """65,536 steps, of which the state forgets nothing; the gradients are those of a sum over all of them."""
    T = 65536
    inputs = make(1, T, 1, 2, 1, 2, dtype=torch.float32, softplus=False, bias=False, skip=False)
    inputs["A"], inputs["dt"] = torch.tensor([-1e-6]), torch.ones(1, T, 1)
    results = all_gradients(ssd, inputs, backend=backend)
    expected = all_gradients(ssd, exact(inputs), backend="torch")  # a loop over so many steps takes minutes
    assert all(x.isfinite().all() for x in results.values())
    assert_close(results, expected, 5e-4)  # dA, one sum of 65,536 terms of either sign, cancels to a hundredth


@pytest.mark.parametrize("backend", ON_CPU)
def test_growing_state(backend: str, all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """A positive A is unusual but legal."""
    inputs = make(2, 80, 2, 16, 1, 4, dtype=torch.float32)
    inputs["A"] = inputs["A"].abs() * 0.2
    expected = all_gradients(ssd, exact(inputs), backend="reference")
    assert_close(all_gradients(ssd, inputs, backend=backend), expected, 2e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_and_expanded_gradients(backend: str) -> None:
    """As in a model: x, B and C are views into one projection; `sum().backward()` gives an expanded gradient."""
    inputs = make(2, 70, 3, 8, 1, 5, dtype=torch.float32)
    views = dict(inputs)
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=-1)
    views["x"], views["B"], views["C"] = (
        value.unflatten(2, (heads, -1)) for value, heads in zip(joined.split([24, 5, 5], -1), (3, 1, 1), strict=True)
    )
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(ssd(**views, backend=backend), ssd(**inputs, backend=backend), rtol=0, atol=0)
    views["x"] = inputs["x"].transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(ssd(**views, backend=backend), ssd(**inputs, backend=backend), rtol=0, atol=0)
    inputs["x"].requires_grad_()
    inputs["dt"].requires_grad_()
    gradients = []
    for name in (backend, "reference"):
        y, _ = ssd(**inputs, backend=name)
        gradients.append(torch.autograd.grad(y.sum(), [inputs["x"], inputs["dt"]]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    inputs = make(3, 70, 12, 20, 2, 5, dtype=torch.float32, initial=True, segments=True)
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_gradients(ssd, inputs, backend="numba")
        torch.set_num_threads(3)
        together = all_gradients(ssd, inputs, backend="numba")
    finally:
        torch.set_num_threads(before)
    assert_close(together, alone, 0.0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_only_the_final_state_has_a_gradient(backend: str) -> None:
    inputs = make(2, 70, 2, 5, 1, 3)
    inputs["x"].requires_grad_()
    gradients = [
        torch.autograd.grad(ssd(**inputs, backend=name)[1].sum(), inputs["x"])[0] for name in (backend, "reference")
    ]
    torch.testing.assert_close(*gradients)


def test_reference_gradcheck() -> None:
    inputs = make(1, 4, 2, 2, 1, 2, initial=True, segments=True)
    flags = {name: inputs.pop(name) for name in ("dt_softplus", "dt_limit", "segment_ids")}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**dict(zip(inputs, values, strict=True)), **flags, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


HOSTILE = """
import torch
from zoo.kernels import parallel, ssd
parallel.SMALL = 0
torch.set_num_threads(2)
torch.manual_seed(0)
x, dt, A = torch.randn(2, 70, 6, 17), torch.rand(2, 70, 6), -torch.rand(6)
B, C = torch.randn(2, 70, 2, 5), torch.randn(2, 70, 2, 5)
leaves = [x.requires_grad_() for x in (x, dt, A, B, C)]

def run(backend):
    y, state = ssd(*leaves, backend=backend)
    return y, state, *torch.autograd.grad(y.sum() + state.sum(), leaves)

torch.testing.assert_close(run("numba"), run("reference"), rtol=1e-4, atol=1e-4)
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills new memory on Linux alone")
def test_scratch_memory() -> None:
    """Scratch inside the kernels is filled with 0xFE (-1.7e38) by the allocator: none of it may be read."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE],
        env={**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


def test_flops() -> None:
    # One token, head, channel and state: bias, softplus, delta A, exp; delta x; decay, drive B, sum, C S, sum.
    assert ssd_flops(1, 1, 1, 1, 1, D=False) == 4 + 1 + 5
    assert ssd_flops(2, 3, 5, 7, 11) == 2 * 3 * 5 * (7 * (5 * 11 + 3) + 4)
    inputs = make(2, 70, 6, 5, 3, 4)
    inputs["x"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = ssd(**inputs)[0].sum()
    assert counter.get_total_flops() == ssd_flops(2, 70, 6, 5, 4)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == ssd_flops(2, 70, 6, 5, 4, backward=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_gradients_nothing_is_stored(backend: str) -> None:
    inputs = make(2, 130, 3, 5, 1, 4)
    inputs["x"].requires_grad_()
    stored = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.zoo.ssd_forward.default:
                stored.append(result[2].shape)
            return result

    with Watch():
        ssd(**inputs, backend=backend)
        with torch.no_grad():
            ssd(**inputs, backend=backend)
    assert stored == [(2, 3, 3, 5, 4), (0,)]


def bad(change: Callable[[dict[str, Any]], Any], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(lambda a: a.update(x=a["x"][0]), r"x has shape \(5, 4, 3\), expected \(B T H P\)"),
        bad(lambda a: a.update(x=a["x"][:, :0]), r"x has shape \(2, 0, 4, 3\): expected no empty dimension"),
        bad(lambda a: a.update(x=[1.0]), r"x is a list: pass a torch.Tensor"),
        bad(lambda a: a.update(dt=a["dt"][..., :3]), r"dt has shape \(2, 5, 3\), expected \(B=2, T=5, H=4\)"),
        bad(lambda a: a.update(A=a["A"][:, None]), r"A has shape \(4, 1\), expected \(H=4\): reshape A"),
        bad(lambda a: a.update(C=a["C"][:, :4]), r"C has shape \(2, 4, 2, 6\), expected \(B=2, T=5, G=2, N=6\)"),
        bad(lambda a: a.update(C=a["C"].long()), r"C has dtype torch.int64, expected a real floating dtype"),
        bad(lambda a: a.update(D=a["D"][None]), r"D has shape \(1, 4\), expected \(H=4\)"),
        bad(lambda a: a.update(dt_bias=0.5), r"dt_bias is a float"),
        bad(lambda a: a.update(initial_state=torch.zeros(2, 4, 6, 3)), r"initial_state has shape .*, P=3, N=6\)"),
        bad(lambda a: a.update(segment_ids=torch.zeros(2, 5)), r"segment_ids has dtype torch.float32, .* integer"),
        bad(lambda a: a.update(B=a["B"].repeat(1, 1, 2, 1)[:, :, :3], C=a["C"].repeat(1, 1, 2, 1)[:, :, :3]),
            r"4 heads do not divide into 3 groups"),
        bad(lambda a: a.update(dt_limit=(1.0, 0.1)), r"dt_limit is \(1.0, 0.1\), expected \(smallest, largest\)"),
        bad(lambda a: a.update(backend="numbs"), r"no backend is called 'numbs': did you mean 'numba'\?"),
        bad(lambda a: a.update(backend="cuda"), r"'cuda' cannot run this: needs a CUDA device"),
    ],
)  # fmt: skip
def test_bad_arguments(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arguments = make(2, 5, 4, 3, 2, 6, dtype=torch.float32)
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        ssd(**arguments)
    assert "\n" not in str(caught.value)
