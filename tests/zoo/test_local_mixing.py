"""Recurrences without their local mixing: the switch takes it out, and what is left still keeps the contract."""

import pytest
import torch

import zoo
from zoo.flops import count_flops

OFF = {"mamba": "short_conv", "mamba2": "short_conv", "rwkv4": "token_shift", "rwkv7": "token_shift"}


@pytest.fixture(params=OFF)
def pair(request) -> tuple[zoo.Model, zoo.Model]:
    """The architecture with and without its local mixing; weights large enough that all of them matter."""
    models = []
    for on in (True, False):
        torch.manual_seed(0)
        model = zoo.create_model(request.param, vocab_size=11, d_model=24, **{OFF[request.param]: on})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.add_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        models.append(model)
    return models[0], models[1]


def test_the_local_mixing_is_gone(pair) -> None:
    with_it, without = pair
    names, fewer = dict(with_it.named_parameters()), dict(without.named_parameters())
    gone = {name.split(".")[4] for name in names.keys() - fewer.keys()}
    assert fewer.keys() < names.keys()
    assert gone in ({"conv"}, {"shift"})
    assert without.state_size(5) < with_it.state_size(5)
    assert sum(t.numel() for layer in without.init_state(3).layers for s in layer for t in s) == (
        3 * (without.state_size(5) - 2)
    )


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv7"])
def test_without_it_the_channel_mix_sees_each_token_alone(arch: str) -> None:
    torch.manual_seed(0)
    channel_mix = zoo.create_model(arch, vocab_size=11, d_model=24, token_shift=False).mixers()[0][1]
    torch.nn.init.normal_(channel_mix.value.weight)
    x = torch.randn(2, 6, 24)
    with torch.no_grad():
        torch.testing.assert_close(channel_mix(x.flip(1))[0], channel_mix(x)[0].flip(1))


def test_whole_equals_token_by_token_and_every_parameter_learns(pair) -> None:
    _, model = pair
    tokens = torch.randint(11, (2, 9))
    whole = model(tokens).logits
    state, pieces = model.init_state(2), []
    for token in tokens.split(1, dim=1):
        out = model(token, state=state)
        state = out.state
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    whole.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_flops_are_those_counted(pair) -> None:
    for model in pair:
        counted = count_flops(lambda m=model: m(torch.zeros(1, 50, dtype=torch.long)))
        assert model.flops(50) == pytest.approx(counted, rel=0.01)
