"""Each backend of the selective scan against the reference loop, and the reference against a closed form.

Shape letters: B batch, T time, D channels, N state size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.kernels import parallel, selective_scan
from zoo.kernels.backends import operators
from zoo.kernels.errors import BackendError, ZooError

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-12,  # eps 2e-16; exp to 2e-15, sums over up to 127 steps and 80 channels
    torch.float32: 5e-6,  # eps 6e-8; the exponent delta * A, rounded at up to 30, moves exp by 30 eps
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}

BACKENDS = ["numba"] + ["triton", "cuda"] * torch.cuda.is_available()


def device_of(backend: str) -> str:
    return "cpu" if backend == "numba" else "cuda"


def make(
    B: int,
    T: int,
    D: int,
    N: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = False,
    segments: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments; the parameters and states stay in float32 when the activations are narrower, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    dt = normal(B, T, D)
    return {
        "u": normal(B, T, D),
        "dt": dt if softplus else dt.abs(),
        "A": -(3 * torch.rand(D, N, generator=generator, dtype=torch.float64) + 0.1).to(device, wide),
        "B": normal(B, T, N),
        "C": normal(B, T, N),
        "D": normal(D, dtype=wide) if skip else None,
        "z": normal(B, T, D) if gate else None,
        "dt_bias": (normal(D, dtype=wide) if softplus else normal(D, dtype=wide).abs()) if bias else None,
        "dt_softplus": softplus,
        "initial_state": normal(B, D, N, dtype=wide) if initial else None,
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.2).cumsum(1).to(device) if segments else None,
    }


def exact(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64 on the CPU."""
    return {
        name: x.detach().cpu().to(torch.float64 if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def check(backend: str, inputs: dict[str, Any], all_gradients: Any, assert_close: Any) -> None:
    """Compares every output and gradient with the reference, or expects a refusal with its reason."""
    (operator,) = (o for o in operators() if o.name == "selective_scan")
    (entry,) = (b for b in operator.backends if b.name == backend)
    dtype = inputs["u"].dtype
    features = tuple(name for name in ("initial_state", "segment_ids") if inputs[name] is not None)
    features += ("float64",) * (dtype == torch.float64)
    if reason := entry.why_not(inputs["u"].device.type, features):
        with pytest.raises(BackendError, match=r"selective_scan: backend .* cannot run this"):
            selective_scan(**inputs, backend=backend)
        pytest.skip(reason)
    expected = all_gradients(selective_scan, exact(inputs), backend="reference")
    results = all_gradients(selective_scan, inputs, backend=backend)
    assert results["y"].dtype == dtype
    assert results["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            assert results[f"d{name}"].dtype == x.dtype, name
    assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("N", [1, 5, 16])
@pytest.mark.parametrize("D", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 63, 65, 127])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, T: int, D: int, N: int, all_gradients: Any, assert_close: Any) -> None:
    dtype = torch.float64 if backend == "numba" else torch.float32
    initial = segments = backend != "cuda"
    inputs = make(2, T, D, N, dtype=dtype, device=device_of(backend), initial=initial, segments=segments)
    check(backend, inputs, all_gradients, assert_close)


OPTIONS = ("skip", "gate", "bias", "softplus", "initial", "segments")


@pytest.mark.parametrize(
    "options", list(itertools.product([False, True], repeat=6)), ids=lambda o: "".join("01"[x] for x in o)
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_optionals(
    backend: str, options: tuple[bool, ...], all_gradients: Any, assert_close: Any
) -> None:
    chosen = dict(zip(OPTIONS, options, strict=True))
    inputs = make(2, 35, 18, 3, dtype=torch.float32, device=device_of(backend), **chosen)
    check(backend, inputs, all_gradients, assert_close)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype, all_gradients: Any, assert_close: Any) -> None:
    # 2 * 80 channels: more than one range, so that the partial sums of dB and dC meet.
    inputs = make(2, 70, 160, 16, dtype=dtype, device=device_of(backend))
    check(backend, inputs, all_gradients, assert_close)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 150), st.integers(1, 20)),
    options=st.fixed_dictionaries({name: st.booleans() for name in OPTIONS}),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    sizes: tuple[int, ...], options: dict[str, bool], seed: int, all_gradients: Any, assert_close: Any
) -> None:
    check("numba", make(*sizes, **options, seed=seed), all_gradients, assert_close)


def closed_form(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor]:
    """y and h without a recurrence: h_t = sum over s <= t of the product of the decays after s, times delta_s B_s u_s.

    `first` (B, T) is the first step of each step's segment; an initial state counts as a contribution before step 0.
    """
    exponent = (dt[..., None] * A).cumsum(1)  # (B, T, D, N)
    between = exponent[:, :, None] - exponent[:, None]  # (B, T, S, D, N), log of the decay from after s to t
    steps = torch.arange(u.shape[1])
    seen = (steps[None, None] <= steps[None, :, None]) & (steps[None, None] >= first[..., None])  # (B, T, S)
    weights = between.masked_fill(~seen[..., None, None], -torch.inf).exp()
    states = torch.einsum("btsdn,bsd,bsn->btdn", weights, dt * u, B)
    if initial_state is not None:
        carried = exponent.exp() * initial_state[:, None]
        states = states + torch.where((first == 0)[..., None, None], carried, 0.0)
    return torch.einsum("btdn,btn->btd", states, C), states[:, -1]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("initial", [False, True])
def test_closed_form(backend: str, initial: bool) -> None:
    if backend in ("triton", "cuda"):
        pytest.skip("the closed form is for float64; these backends are compared with the reference")
    inputs = make(2, 40, 6, 4, skip=False, gate=False, bias=False, softplus=False, initial=initial, segments=True)
    ids = inputs["segment_ids"]
    first = torch.stack([(ids < ids[:, t : t + 1]).sum(1) for t in range(40)], dim=1)  # ids never fall
    y, state = closed_form(*(inputs[name] for name in ("u", "dt", "A", "B", "C", "initial_state")), first)
    result = selective_scan(**inputs, backend=backend)
    torch.testing.assert_close(result, (y, state), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("split", [1, 31, 32, 33, 69])
def test_split_equals_whole(backend: str, split: int, all_gradients: Any, assert_close: Any) -> None:
    """Gradients flow through the carried state: every one of them equals that of the whole sequence."""
    if backend == "cuda":
        pytest.skip("mamba-ssm takes no initial state")
    double = backend in ("reference", "numba")
    dtype = torch.float64 if double else torch.float32
    inputs = make(2, 70, 20, 4, dtype=dtype, device="cpu" if double else "cuda", initial=True, segments=True)
    inputs["segment_ids"][:, split:] += (
        inputs["segment_ids"][:, split - 1 : split] - inputs["segment_ids"][:, split : split + 1]
    )  # no boundary between the two calls: the second could not see it

    def in_two(**arguments: Any) -> tuple[Tensor, Tensor]:
        state, ys = arguments.pop("initial_state"), []
        for part in (slice(0, split), slice(split, None)):
            here = {k: x[:, part] if isinstance(x, Tensor) and x.dim() == 3 else x for k, x in arguments.items()}
            here["segment_ids"] = arguments["segment_ids"][:, part]
            y, state = selective_scan(**here, initial_state=state)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = all_gradients(selective_scan, inputs, backend=backend)
    halves = all_gradients(lambda **kw: in_two(**kw), {**inputs, "backend": backend})
    assert_close(halves, whole, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_equals_separate(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("mamba-ssm takes no segment ids")
    lengths = [1, 30, 2, 33, 5]
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = make(1, sum(lengths), 18, 4, dtype=dtype, device="cuda" if backend == "triton" else "cpu", initial=True)
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 9]), torch.tensor(lengths))[None].to(inputs["u"].device)
    y, final_state = selective_scan(**{**inputs, "segment_ids": ids}, backend=backend)
    start, state = 0, inputs["initial_state"]  # belongs to the first document alone
    for length in lengths:
        part = {
            name: x[:, start : start + length] if isinstance(x, Tensor) and x.dim() == 3 else x
            for name, x in inputs.items()
        }
        alone, last = selective_scan(**{**part, "initial_state": state}, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], alone)
        start, state = start + length, None
    torch.testing.assert_close(final_state, last)


def test_infinity_stays_in_its_document() -> None:
    inputs = make(1, 10, 4, 3, segments=True)
    inputs["segment_ids"] = torch.tensor([[0] * 4 + [1] * 6])
    clean = selective_scan(**inputs)[0]
    inputs["u"][0, 2] = torch.inf
    assert not selective_scan(**inputs)[0][:, :4].isfinite().all()
    torch.testing.assert_close(selective_scan(**inputs)[0][:, 4:], clean[:, 4:])


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_nan_and_infinity_come_out(backend: str) -> None:
    for bad in (torch.nan, torch.inf):
        for name in ("u", "dt", "B", "C", "z"):
            inputs = make(1, 40, 16, 4, dtype=torch.float32, skip=False)
            inputs[name][0, 20, 1] = bad
            y, state = selective_scan(**inputs, backend=backend)
            assert y[0, :20].isfinite().all(), name
            assert not (y[0, 20].isfinite().all() and state.isfinite().all()), name


@pytest.mark.parametrize("scale", [1e-8, 30.0, 1e4])
def test_extreme_decays(scale: float, all_gradients: Any, assert_close: Any) -> None:
    """Decays of almost 1, of almost 0, and below the smallest float32."""
    inputs = make(2, 40, 16, 4, dtype=torch.float32, softplus=False)
    inputs["A"] = inputs["A"] * scale
    expected = all_gradients(selective_scan, exact(inputs), backend="reference")
    results = all_gradients(selective_scan, inputs, backend="numba")
    del results["dA"], expected["dA"]  # at 1e4 it is all below the smallest float32
    assert_close(results, expected, 2e-5)


def test_growing_state(all_gradients: Any, assert_close: Any) -> None:
    """A positive A is unusual but legal."""
    inputs = make(2, 40, 16, 4, dtype=torch.float32)
    inputs["A"] = inputs["A"].abs() * 0.3
    expected = all_gradients(selective_scan, exact(inputs), backend="reference")
    assert_close(all_gradients(selective_scan, inputs, backend="numba"), expected, 2e-5)


def test_views_and_expanded_gradients(all_gradients: Any, assert_close: Any) -> None:
    """As in a model: z, B and C are views into projections; `sum().backward()` gives an expanded gradient."""
    inputs = make(2, 37, 24, 5, dtype=torch.float32)
    views = dict(inputs)
    views["u"], views["z"] = torch.cat([inputs["u"], inputs["z"]], dim=-1).split(24, dim=-1)
    views["B"], views["C"] = torch.cat([inputs["B"], inputs["C"]], dim=-1).split(5, dim=-1)
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(selective_scan(**views), selective_scan(**inputs), rtol=0, atol=0)
    views = {name: x.requires_grad_() if name in ("u", "dt") else x for name, x in inputs.items()}
    gradients = []
    for backend in ("numba", "reference"):
        y, _ = selective_scan(**views, backend=backend)
        gradients.append(torch.autograd.grad(y.sum(), [views["u"], views["dt"]]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    inputs = make(3, 70, 300, 5, dtype=torch.float32, initial=True, segments=True)
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_gradients(selective_scan, inputs)
        torch.set_num_threads(3)
        together = all_gradients(selective_scan, inputs)
    finally:
        torch.set_num_threads(before)
    assert_close(together, alone, 0.0)


def test_only_the_final_state_has_a_gradient() -> None:
    inputs = make(2, 40, 5, 3)
    inputs["u"].requires_grad_()
    gradients = [
        torch.autograd.grad(selective_scan(**inputs, backend=backend)[1].sum(), inputs["u"])[0]
        for backend in ("numba", "reference")
    ]
    torch.testing.assert_close(*gradients)


def test_reference_gradcheck() -> None:
    inputs = make(1, 4, 2, 2, initial=True, segments=True)
    flags = {name: inputs.pop(name) for name in ("dt_softplus", "segment_ids")}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(inputs, values, strict=True)), **flags, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def bad(change: Callable[[dict[str, Any]], Any], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(lambda a: a.update(u=a["u"][0]), r"u has shape \(5, 4\), expected \(B T D\)"),
        bad(lambda a: a.update(u=a["u"][:, :0]), r"u has shape \(2, 0, 4\): expected no empty dimension"),
        bad(lambda a: a.update(u=[1.0]), r"u is a list: pass a torch.Tensor"),
        bad(lambda a: a.update(dt=a["dt"][..., :3]), r"dt has shape \(2, 5, 3\), expected \(B=2, T=5, D=4\)"),
        bad(lambda a: a.update(A=a["A"].t()), r"A has shape \(3, 4\), expected \(D=4, N=3\): reshape A"),
        bad(lambda a: a.update(B=a["B"][:, :4]), r"B has shape \(2, 4, 3\), expected \(B=2, T=5, N=3\)"),
        bad(lambda a: a.update(C=a["C"].long()), r"C has dtype torch.int64, expected a real floating dtype"),
        bad(lambda a: a.update(C=a["C"].to(torch.complex64)), r"C has dtype torch.complex64, expected a real"),
        bad(lambda a: a.update(D=a["D"][None]), r"D has shape \(1, 4\), expected \(D=4\)"),
        bad(lambda a: a.update(z=a["z"].to("meta")), r"z is on meta, the first input on cpu: move z there"),
        bad(lambda a: a.update(dt_bias=0.5), r"dt_bias is a float"),
        bad(lambda a: a.update(initial_state=torch.zeros(2, 3, 4)), r"initial_state has shape .* \(B=2, D=4, N=3\)"),
        bad(lambda a: a.update(segment_ids=torch.zeros(2, 5)), r"segment_ids has dtype torch.float32, .* integer"),
        bad(lambda a: a.update(backend="nunba"), r"no backend is called 'nunba': did you mean 'numba'\?"),
        bad(lambda a: a.update(backend="cuda"), r"'cuda' cannot run this: needs a CUDA device"),
    ],
)
def test_bad_arguments(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arguments = make(2, 5, 4, 3, dtype=torch.float32)
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        selective_scan(**arguments)
    assert "\n" not in str(caught.value)
