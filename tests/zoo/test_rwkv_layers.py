"""The parts that the generations of RWKV share."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.layers.rwkv import squared_relu
from zoo.layers.token_shift import TokenShift


def plain(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squared_relu(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 7, dtype=dtype)
    x[0, 0] = 0
    x.requires_grad_()
    results = []
    for function in (squared_relu, plain, torch.compile(squared_relu, fullgraph=True, backend="aot_eager")):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
        assert all(tensor.dtype == dtype for tensor in results[-1])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(squared_relu, x)


def test_squared_relu_under_autocast() -> None:
    x, weight = torch.randn(4, 6), torch.randn(8, 6, requires_grad=True)
    gradients = []
    for function in (squared_relu, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(torch.nn.functional.linear(x, weight))
            assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.float().square().sum(), weight))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=2e-2)  # eps of bf16 4e-3


def test_squared_relu_goes_back_in_one_pass() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    y, gradient = squared_relu(x), torch.randn(8, 16)
    passes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if result.numel() == x.numel() and result.data_ptr() not in (x.data_ptr(), gradient.data_ptr()):
                passes.append(str(function))
            return result

    with Watch():
        torch.autograd.grad(y, x, gradient)
    assert passes == ["aten.addcmul.default"]


def test_token_shift_that_is_off() -> None:
    shift = TokenShift(torch.rand(3, 4), enabled=False)
    x, last = torch.randn(2, 5, 4), torch.zeros(2, 0)
    mixes, state = shift(x, last, None)
    assert len(mixes) == 3
    assert all(mix is x for mix in mixes)
    assert state is last
    assert (shift.flops(5), shift.state_size(), list(shift.parameters())) == (0, 0, [])


def test_token_shift_keeps_the_dtype_of_its_state() -> None:
    shift = TokenShift(torch.rand(3, 4))
    x = torch.randn(2, 5, 4, dtype=torch.bfloat16)
    mixes, state = shift(x, shift.init_state(2, None, None), None)
    assert [mix.dtype for mix in mixes] == [torch.bfloat16] * 3
    assert state.dtype == torch.float32
    assert torch.equal(state, x[:, -1].float())
    assert shift(x, None, None)[1] is None
