"""`linear` against its definition: values, every gradient, gradients of gradients, and which product is taken when."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from zoo.flops import count_flops
from zoo.kernels import backends, linear, linear_flops
from zoo.kernels.errors import BackendError
from zoo.kernels.linear import op
from zoo.layers.linear import Linear

ONEDNN = op._onednn("cpu", ())
BACKENDS = [
    pytest.param("onednn", marks=pytest.mark.skipif(ONEDNN is not None, reason=f"onednn: {ONEDNN}")),
    "torch",
    "reference",
]
SHAPES = [((5, 7), 3), ((2, 9, 16), 16), ((65, 33), 40), ((3, 1, 12), 1), ((1, 1), 50), ((70, 8), 130)]


def tensors(shape: tuple[int, ...], outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + outputs)
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (outputs, shape[-1]), (outputs,))
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def product(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The op itself, as `linear` gives small products to torch."""
    if backend != "onednn":
        return linear(x, weight, bias, backend=backend)
    return torch.ops.zoo.linear_forward(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # fp32 keeps 24 bits; sums of a few hundred products in another order lose a digit.
    assert (actual - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_values_and_gradients(shape, outputs, with_bias, backend) -> None:
    x, weight, bias = tensors(shape, outputs)
    inputs = [x, weight, *([bias] if with_bias else [])]
    truth = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.linear(truth[0], truth[1], truth[2] if with_bias else None)
    y = product(x, weight, bias if with_bias else None, backend)
    assert y.shape == expected.shape
    assert_close(y, expected)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, truth, dy.double()), strict=True):
        assert gradient.is_contiguous()
        assert_close(gradient, right)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_gradients_of_gradients(shape, outputs, backend) -> None:
    seconds = []
    for which in (backend, "torch"):
        x, weight, bias = tensors(shape, outputs)
        y = product(x, weight, bias, which).sin()
        first = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))
    for actual, expected in zip(*seconds, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS[:1])
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 80), inputs=st.integers(1, 70), outputs=st.integers(1, 70), data=st.data())
def test_any_size_and_stride(backend, rows, inputs, outputs, data) -> None:
    whole = torch.randn(2 * rows, inputs + 3)
    x = whole[:: data.draw(st.sampled_from([1, 2]))][:rows, data.draw(st.integers(0, 3)) :][:, :inputs]
    weight = torch.randn(inputs, outputs).t() if data.draw(st.booleans()) else torch.randn(outputs, inputs)
    assert_close(product(x, weight, None, backend), x.double() @ weight.double().t())


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_registration(backend) -> None:
    x, weight, bias = tensors((33, 20), 12)
    torch.library.opcheck(torch.ops.zoo.linear_forward, (x, weight, bias))
    torch.library.opcheck(torch.ops.zoo.linear_forward, (x, weight, None))
    torch.library.opcheck(torch.ops.zoo.linear_backward, (torch.randn(33, 12, requires_grad=True), x))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_flops_are_counted(backend) -> None:
    x, weight, bias = tensors((33, 20), 12)
    assert count_flops(lambda: product(x, weight, bias, backend)) == linear_flops(33, 20, 12)
    with FlopCounterMode(display=False) as counter:
        product(x, weight, bias, backend).sum().backward()
    assert counter.get_total_flops() == 3 * linear_flops(33, 20, 12)


def test_what_onednn_does_not_take_goes_to_torch() -> None:
    for kwargs in ({"dtype": torch.float64}, {"dtype": torch.bfloat16}):
        x, weight = torch.randn(512, 128, **kwargs), torch.randn(128, 128, **kwargs)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        with pytest.raises(BackendError, match="takes float32 without autocast"):
            linear(x, weight, backend="onednn")
    x, weight = torch.randn(512, 128), torch.randn(128, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with pytest.raises(BackendError, match="as fast for few rows"):
        linear(x[:2], weight, backend="onednn")
    empty = linear(x[:0], weight)
    assert empty.shape == (0, 128)


@pytest.mark.parametrize(
    ("capability", "intel", "taken"), [("AVX512", False, "onednn"), ("AVX512", True, "torch"), ("AVX2", False, "torch")]
)
def test_the_processor_decides(monkeypatch, capability, intel, taken) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(op, "_intel", lambda: intel)
    backends._choose.cache_clear()
    try:
        assert backends.resolve("linear", "auto", "cpu") == taken
        assert backends.resolve("linear", "auto", "cpu", ("small",)) == "torch"
        assert backends.resolve("linear", "auto", "cuda") == "torch"
    finally:
        backends._choose.cache_clear()


def test_the_layer_is_an_nn_linear() -> None:
    torch.manual_seed(0)
    ours = Linear(64, 96)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(64, 96)
    x = torch.randn(4, 300, 64)
    assert_close(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
