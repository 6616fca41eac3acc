"""Each backend of wkv4 against the reference loop, and the reference against the sums it stands for and transformers.

Shape letters: B batch, T time, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import parallel, wkv4, wkv4_flops
from zoo.kernels.errors import ZooError
from zoo.kernels.wkv4 import wkv4_initial_state

# Relative root mean square error against the reference in float64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-10,  # eps 2e-16; du and dk of a token that outweighs the past by e^10 lose as much in v - y
    torch.float32: 5e-6,  # eps 6e-8; exponents of up to 30, rounded, move exp by 30 eps
    torch.float16: 1e-3,  # computed in float32; eps 5e-4 in rounding y and the gradients to fp16
    torch.bfloat16: 8e-3,  # computed in float32; eps 4e-3 in rounding y and the gradients to bf16
}

BACKENDS = ["numba"] + ["triton"] * torch.cuda.is_available()
WIDEST = {"reference": torch.float64, "numba": torch.float64, "triton": torch.float32}


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def make(
    B: int,
    T: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    initial: bool = False,
    segments: bool = False,
    spread: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments; the parameters and the state stay in float32 when the activations are narrower, as in a model.

    Decays are those of a model as it is initialised: w from -exp(-5) to -exp(3). `spread` is the keys' deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    state = torch.stack([normal(B, D), normal(B, D).abs() + 1, normal(B, D)], dim=1).to(wide)
    return {
        "w": -torch.exp(8 * torch.rand(D, generator=generator, dtype=torch.float64) - 5).to(device, wide),
        "u": normal(D, dtype=wide),
        "k": normal(B, T, D) * spread,
        "v": normal(B, T, D),
        "initial_state": state if initial else None,
        "segment_ids": (torch.rand(B, T, generator=generator) < 0.2).cumsum(1).to(device) if segments else None,
    }


@pytest.fixture
def check(all_gradients: Any, assert_close: Any, exact: Any) -> Callable[..., None]:
    """Compares every output and gradient of a backend with the reference in float64."""

    def compare(backend: str, inputs: dict[str, Any]) -> None:
        dtype = inputs["v"].dtype
        expected = all_gradients(wkv4, exact(inputs), backend="reference")
        results = all_gradients(wkv4, inputs, backend=backend)
        assert results["y"].dtype == dtype
        assert results["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                assert results[f"d{name}"].dtype == x.dtype, name
        assert_close({name: x.cpu() for name, x in results.items()}, expected, TOLERANCES[dtype])

    return compare


def by_sums(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor]:
    """y, and the sums P and Q after the last step, straight from their definition; keys must be moderate.

    `first` (B, T) is the first step of each step's segment; an initial state counts as a contribution before step 0.
    """
    steps = torch.arange(k.shape[1])
    earlier = (steps[None, None] < steps[None, :, None]) & (steps[None, None] >= first[..., None])  # (B, T, S)
    distance = (steps[:, None] - 1 - steps[None]).clamp(min=0)  # (T, S)
    weights = torch.exp(distance[..., None] * w + k[:, None]) * earlier[..., None]  # (B, T, S, D)
    current = torch.exp(u + k)
    numerator, denominator = (weights * v[:, None]).sum(2), weights.sum(2)
    if initial_state is not None:
        p, q, o = initial_state.unbind(1)
        carried = torch.exp(steps[:, None] * w + o[:, None]) * (first == 0)[..., None]
        numerator, denominator = numerator + carried * p[:, None], denominator + carried * q[:, None]
    y = (numerator + current * v) / (denominator + current)
    last = torch.exp(w) * torch.stack([numerator[:, -1], denominator[:, -1]], dim=1)
    return y, last + torch.exp(k[:, -1:]) * torch.stack([v[:, -1], torch.ones_like(v[:, -1])], dim=1)


def sums(state: Tensor) -> Tensor:
    """(P, Q) of a state."""
    return state[:, :2] * state[:, 2:].exp()


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("initial", [False, True])
def test_the_sums_of_the_definition(backend: str, initial: bool) -> None:
    inputs = make(2, 40, 6, initial=initial, segments=True)
    ids = inputs["segment_ids"]
    first = torch.stack([(ids < ids[:, t : t + 1]).sum(1) for t in range(40)], dim=1)  # ids never fall
    leaves = [inputs[name].requires_grad_() for name in ("w", "u", "k", "v")]
    expected = by_sums(*leaves, inputs["initial_state"], first)
    y, state = wkv4(**inputs, backend=backend)
    torch.testing.assert_close((y, sums(state)), expected, rtol=1e-11, atol=1e-11)
    # Here the exponent counts as well: what P and Q are sent back must be all that w, k and v see.
    weights = [torch.randn_like(x) for x in expected]
    gradients = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(outs, weights, strict=True)), leaves)
        for outs in ((y, state[:, :2] * state[:, 2:].detach().exp()), expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_agrees_with_transformers(backend: str) -> None:
    rwkv = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    inputs = make(3, 70, 20, dtype=torch.float32, device=device_of(backend))
    state, theirs = None, None
    for part in (slice(0, 33), slice(33, 70)):  # with a carried state too
        k, v = inputs["k"][:, part], inputs["v"][:, part]
        y, state = wkv4(inputs["w"], inputs["u"], k, v, initial_state=state, backend=backend)
        time_decay = torch.log(-inputs["w"])
        expected, theirs = rwkv.rwkv_linear_attention_cpu(time_decay, inputs["u"], k, v, theirs, return_state=True)
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-6)  # both in float32
        torch.testing.assert_close(state, torch.stack(theirs, dim=1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("D", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 63, 65, 127])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, T: int, D: int, check: Any) -> None:
    check(backend, make(2, T, D, dtype=WIDEST[backend], device=device_of(backend), initial=True, segments=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_optionals(backend: str, segments: bool, initial: bool, dtype: torch.dtype, check: Any) -> None:
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("its kernels compute in float32")
    check(backend, make(2, 70, 36, dtype=dtype, device=device_of(backend), initial=initial, segments=segments))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 70)),
    initial=st.booleans(),
    segments=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    sizes: tuple[int, int, int], initial: bool, segments: bool, spread: float, seed: int, check: Any
) -> None:
    check("numba", make(*sizes, initial=initial, segments=segments, spread=spread, seed=seed))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("split", [1, 31, 32, 33, 69])
def test_split_equals_whole(backend: str, split: int, all_gradients: Any, assert_close: Any) -> None:
    """Gradients flow through the carried state: every one of them equals that of the whole sequence."""
    inputs = make(2, 70, 20, dtype=WIDEST[backend], device=device_of(backend), initial=True, segments=True)
    inputs["segment_ids"][:, split:] += (
        inputs["segment_ids"][:, split - 1 : split] - inputs["segment_ids"][:, split : split + 1]
    )  # no boundary between the two calls: the second could not see it

    def in_two(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        state, ys = rest["initial_state"], []
        for part in (slice(0, split), slice(split, None)):
            ids = rest["segment_ids"][:, part]
            y, state = wkv4(w, u, k[:, part], v[:, part], initial_state=state, segment_ids=ids, backend=backend)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = all_gradients(wkv4, inputs, backend=backend)
    assert_close(all_gradients(in_two, inputs), whole, TOLERANCES[WIDEST[backend]])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_equals_separate(backend: str) -> None:
    lengths = [1, 30, 2, 33, 5]
    inputs = make(1, sum(lengths), 18, dtype=WIDEST[backend], device=device_of(backend), initial=True)
    ids = torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 9]), torch.tensor(lengths))[None].to(inputs["k"].device)
    y, final_state = wkv4(**{**inputs, "segment_ids": ids}, backend=backend)
    start, state = 0, inputs["initial_state"]  # belongs to the first document alone
    for length in lengths:
        part = {name: inputs[name][:, start : start + length] for name in ("k", "v")}
        alone, last = wkv4(**{**inputs, **part, "initial_state": state}, backend=backend)
        torch.testing.assert_close(y[:, start : start + length], alone)
        start, state = start + length, None
    torch.testing.assert_close(final_state, last)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_initial_state_is_that_before_any_token(backend: str, all_gradients: Any, assert_close: Any) -> None:
    inputs = make(2, 33, 17, dtype=WIDEST[backend], device=device_of(backend))
    state = wkv4_initial_state(2, 17, device=device_of(backend), dtype=WIDEST[backend])
    without = wkv4(**inputs, backend=backend)
    torch.testing.assert_close(wkv4(**{**inputs, "initial_state": state}, backend=backend), without, rtol=0, atol=0)
    first = wkv4(**{name: x[:, :1] if x is not None and x.dim() == 3 else x for name, x in inputs.items()})[0]
    torch.testing.assert_close(first, inputs["v"][:, :1])  # alone, the first token is the whole average


def test_infinity_stays_in_its_document() -> None:
    inputs = make(1, 10, 4)
    inputs["segment_ids"] = torch.tensor([[0] * 4 + [1] * 6])
    clean = wkv4(**inputs)[0]
    inputs["v"][0, 2] = torch.inf
    assert not wkv4(**inputs)[0][:, :4].isfinite().all()
    torch.testing.assert_close(wkv4(**inputs)[0][:, 4:], clean[:, 4:])


def test_an_infinite_gradient_stays_in_its_document() -> None:
    inputs = make(1, 10, 4)
    inputs["segment_ids"] = torch.tensor([[0] * 4 + [1] * 6])
    leaves = [inputs[name].requires_grad_() for name in ("k", "v")]
    dy = torch.ones(1, 10, 4, dtype=torch.float64)
    dy[0, 7] = torch.inf
    for gradient in torch.autograd.grad(wkv4(**inputs)[0], leaves, dy):
        assert gradient[:, :4].isfinite().all()
        assert not gradient[:, 4:7].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_and_infinity_come_out(backend: str, bad: float, name: str) -> None:
    inputs = make(1, 40, 16, dtype=torch.float32)
    inputs[name][0, 20, 1] = bad
    y, state = wkv4(**inputs, backend=backend)
    assert y[0, :20].isfinite().all()
    assert not state.isfinite().all()
    if (backend, name, bad) == ("numba", "k", torch.inf):  # the limit of ever larger keys, where the reference has NaN
        torch.testing.assert_close(y[0, 20:, 1], inputs["v"][0, 20, 1].expand(20))
    else:
        assert not y[0, 20].isfinite().all()


def extremes(T: int, D: int = 48, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keys of up to 1e4 either way, in some channels with long runs of small ones; decays from 1e-4 to 20."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.logspace(0, 4, D).roll(7)
    k = sizes * (2 * torch.rand(2, T, D, generator=generator) - 1)
    k[:, 1::2, ::3] = -sizes[::3]
    k[:, 5:, 1::3] = -sizes[1::3]  # one large key, then nothing that could push it out but the decay
    return {
        "w": -torch.logspace(-4, 1.3, D).flip(0).to(dtype),
        "u": torch.linspace(-100, 100, D).to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(2, T, D, generator=generator).to(dtype),
    }


def test_extreme_keys(all_gradients: Any, assert_close: Any, exact: Any) -> None:
    """Outputs and gradients where the sums themselves would be exp(10,000)."""
    inputs = extremes(200)

    def outputs_alone(**arguments: Any) -> tuple[Tensor, Tensor]:
        y, _ = wkv4(**arguments)  # of the state only P and Q are comparable, and they are no numbers here
        return y, y[:, -1]

    expected = all_gradients(outputs_alone, exact(inputs), backend="reference")
    results = all_gradients(outputs_alone, inputs, backend="numba")
    for name, x in results.items():
        assert x.isfinite().all(), name
    # eps 6e-8 times exponents of 1e4 would be 6e-4; those that matter are differences near 0
    assert_close(results, expected, 2e-5)


def test_extreme_keys_of_a_long_sequence(all_gradients: Any) -> None:
    results = all_gradients(wkv4, extremes(65_536), backend="numba")
    for name, x in results.items():
        assert x.isfinite().all(), name
    assert (results["final_state"][:, 1] >= 1 - 1e-6).all()  # in the running-maximum form some token counts as 1


def test_slow_decay_next_to_large_keys_is_not_rounded_away(exact: Any) -> None:
    """Steps of 1e-4 taken from an exponent of 200, whose last digit in float32 is 1.5e-5, would drift."""
    T = 65_536
    inputs = {
        "w": torch.full((16,), -1e-4),
        "u": torch.zeros(16),
        "k": torch.full((1, T, 16), 190.0),
        "v": torch.zeros(1, T, 16),
    }
    inputs["k"][:, 0], inputs["v"][:, 0] = 200.0, 1.0
    y, _ = wkv4(**inputs)
    steps = torch.arange(1, T, dtype=torch.float64)
    decay = exact(inputs)["w"][0]
    first = torch.exp((steps - 1) * decay + 10)
    others = torch.expm1((steps - 1) * decay) / torch.expm1(decay)  # a geometric sum, then the current token
    expected = (first / (first + others + 1)).to(torch.float32)
    torch.testing.assert_close(y[0, 1:, 3], expected, rtol=2e-4, atol=0)  # the sum of 65,536 terms is in float32


def test_views_and_expanded_gradients() -> None:
    """As in a model: keys and values are views into a projection; `sum().backward()` gives an expanded gradient."""
    inputs = make(2, 37, 24, dtype=torch.float32)
    views = dict(inputs)
    wide = torch.cat([inputs["k"], inputs["v"]], dim=-1)
    views["k"], views["v"] = wide.split(24, dim=-1)
    torch.testing.assert_close(wkv4(**views), wkv4(**inputs), rtol=0, atol=0)
    views["v"] = inputs["v"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(wkv4(**views), wkv4(**inputs), rtol=0, atol=0)
    leaf = wide.requires_grad_()
    gradients = []
    for backend in ("numba", "reference"):
        k, v = leaf.split(24, dim=-1)
        y, _ = wkv4(inputs["w"], inputs["u"], k, v, backend=backend)
        gradients.append(torch.autograd.grad(y.sum(), leaf))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, all_gradients: Any, assert_close: Any) -> None:
    inputs = make(3, 70, 300, dtype=torch.float32, initial=True, segments=True)
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_gradients(wkv4, inputs)
        torch.set_num_threads(3)
        together = all_gradients(wkv4, inputs)
    finally:
        torch.set_num_threads(before)
    assert_close(together, alone, 0.0)


def test_only_the_final_state_has_a_gradient() -> None:
    inputs = make(2, 40, 5)
    inputs["v"].requires_grad_()
    gradients = [
        torch.autograd.grad(wkv4(**inputs, backend=backend)[1].sum(), inputs["v"])[0]
        for backend in ("numba", "reference")
    ]
    torch.testing.assert_close(*gradients)


def test_no_gradient_reaches_the_exponent_of_a_state(all_gradients: Any) -> None:
    for backend in ("numba", "reference"):
        gradient = all_gradients(wkv4, make(2, 40, 5, initial=True), backend=backend)["dinitial_state"]
        assert (gradient[:, 2] == 0).all()
        assert (gradient[:, :2] != 0).any(dim=(0, 2)).all()


def test_reference_gradcheck() -> None:
    inputs = make(1, 4, 2, initial=True, segments=True)
    exponent = inputs["initial_state"][:, 2]
    leaves = [inputs[name].requires_grad_() for name in ("w", "u", "k", "v")]
    leaves.append(inputs["initial_state"][:, :2].clone().requires_grad_())

    def run(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        initial = torch.cat([state, exponent[:, None]], dim=1)
        ids = inputs["segment_ids"]
        y, final = wkv4(w, u, k, v, initial_state=initial, segment_ids=ids, backend="reference")
        return y, final[:, :2] * final[:, 2:].exp()  # P and Q, which a finite difference of k moves as a whole

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optionals", [False, True])
def test_opcheck(optionals: bool, dtype: torch.dtype) -> None:
    inputs = make(2, 37, 18, dtype=dtype, initial=optionals, segments=optionals)
    for x in inputs.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    forward = (*inputs.values(), True, "numba")
    torch.library.opcheck(torch.ops.zoo.wkv4_forward.default, forward)
    with torch.no_grad():
        y, state, checkpoints = torch.ops.zoo.wkv4_forward(*forward)
    dstate = torch.randn_like(state) if optionals else None
    arguments = [inputs[name] for name in ("w", "u", "k", "v", "segment_ids")]
    backward = (torch.randn_like(y), dstate, *arguments, checkpoints, "numba")
    backward = tuple(a.detach() if isinstance(a, Tensor) else a for a in backward)
    torch.library.opcheck(torch.ops.zoo.wkv4_backward.default, backward)


def test_compiles_to_one_graph(all_gradients: Any, assert_close: Any) -> None:
    torch._dynamo.reset()
    inputs = make(2, 37, 18, dtype=torch.float32, initial=True, segments=True)
    compiled = torch.compile(wkv4, fullgraph=True, backend="aot_eager")
    assert_close(all_gradients(compiled, inputs), all_gradients(wkv4, inputs), 1e-6)


def test_without_gradients_nothing_is_stored() -> None:
    inputs = make(2, 70, 18)
    arguments = (*inputs.values(), True, "numba")
    assert torch.ops.zoo.wkv4_forward(*arguments)[2].shape == (2, 3, 4, 18)
    stored = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.zoo.wkv4_forward.default:
                stored.append(result[2].shape)
            return result

    inputs["w"].requires_grad_()
    with Watch():
        wkv4(**inputs)
        with torch.no_grad():
            wkv4(**inputs)
    assert stored == [(2, 3, 4, 18), (0,)]


def test_meta_tensors_have_the_same_shapes() -> None:
    inputs = make(2, 37, 18, dtype=torch.bfloat16, initial=True, segments=True)
    real = wkv4(**inputs)
    meta = wkv4(**{k: x.to("meta") for k, x in inputs.items()})
    assert [(x.shape, x.dtype, x.stride()) for x in meta] == [(x.shape, x.dtype, x.stride()) for x in real]


def test_flop_counter_agrees_with_the_formula() -> None:
    inputs = make(2, 37, 18)
    inputs["k"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = wkv4(**inputs)[0].sum()
    assert counter.get_total_flops() == wkv4_flops(2, 37, 18) == 2 * 37 * 18 * (12 + 11)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == wkv4_flops(2, 37, 18, backward=True) == 2 * 37 * 18 * (23 + 24)


def bad(change: Callable[[dict[str, Any]], Any], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(lambda a: a.update(k=a["k"][0]), r"k has shape \(5, 4\), expected \(B T D\)"),
        bad(lambda a: a.update(k=a["k"][:, :0]), r"k has shape \(2, 0, 4\): expected no empty dimension"),
        bad(lambda a: a.update(k=[1.0]), r"k is a list: pass a torch.Tensor"),
        bad(lambda a: a.update(v=a["v"][..., :3]), r"v has shape \(2, 5, 3\), expected \(B=2, T=5, D=4\)"),
        bad(lambda a: a.update(w=a["w"][None]), r"w has shape \(1, 4\), expected \(D=4\): reshape w"),
        bad(lambda a: a.update(u=a["u"].long()), r"u has dtype torch.int64, expected a real floating dtype"),
        bad(lambda a: a.update(u=a["u"].to("meta")), r"u is on meta, the first input on cpu: move u there"),
        bad(lambda a: a.update(initial_state=torch.zeros(2, 4, 3)), r"initial_state has shape .* \(B=2, 3=3, D=4\)"),
        bad(lambda a: a.update(segment_ids=torch.zeros(2, 5)), r"segment_ids has dtype torch.float32, .* integer"),
        bad(lambda a: a.update(backend="nunba"), r"no backend is called 'nunba': did you mean 'numba'\?"),
        bad(lambda a: a.update(backend="triton"), r"'triton' cannot run this: "),
    ],
)
def test_bad_arguments(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    arguments = make(2, 5, 4)  # float64, which the Triton kernels refuse
    change(arguments)
    with pytest.raises(ZooError, match=message) as caught:
        wkv4(**arguments)
    assert "\n" not in str(caught.value)
