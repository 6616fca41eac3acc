"""Hybrids: members keep their own settings and see the shell's; a pattern of one kind is that architecture."""

import pytest
import torch

import zoo
from zoo.kernels.errors import ConfigError
from zoo.mixer import Mixer

TOKENS = torch.arange(30).reshape(2, 15) % 11


def kinds(model: zoo.Model) -> list[str]:
    return [type(mixers[0]).__name__ for mixers in model.mixers()]


def hybrid(**settings) -> zoo.Model:
    return zoo.create_model("hybrid", vocab_size=11, d_model=16, **settings)


def test_the_pattern_repeats_over_the_layers() -> None:
    assert kinds(hybrid(n_layers=5, pattern=["transformer", "mamba"])) == [
        "Transformer",
        "Mamba",
        "Transformer",
        "Mamba",
        "Transformer",
    ]
    assert kinds(hybrid()) == ["Mamba", "Mamba", "Transformer"]


@pytest.mark.parametrize("name", [name for name in zoo.list_models() if name != "hybrid"])
def test_a_pattern_of_one_kind_is_that_architecture(name: str) -> None:
    alone = zoo.create_model(name, vocab_size=11, d_model=16, n_layers=3)
    shell = {key: getattr(alone.config, key) for key in ("norm", "embedding_norm", "tie_embeddings")}
    same = hybrid(n_layers=3, pattern=[name], **shell)
    same.load_state_dict(alone.state_dict())
    with torch.no_grad():
        assert torch.equal(same(TOKENS).logits, alone(TOKENS).logits)
    assert same.flops(50) == alone.flops(50)
    assert same.state_size(50) == alone.state_size(50)


def test_every_architecture_can_take_part() -> None:
    names = [name for name in zoo.list_models() if name != "hybrid"]
    model = hybrid(n_layers=2 * len(names), pattern=names)
    state = model.init_state(2)
    with torch.no_grad():
        whole = model(TOKENS).logits
        pieces = []
        for piece in TOKENS.split([4, 1, 10], dim=1):
            out = model(piece, state=state)
            state = out.state
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_members_have_settings_of_their_own() -> None:
    model = hybrid(members={"mamba": {"d_state": 3}, "transformer": {"n_heads": 2}})
    first: Mixer = model.mixers()[0][0]
    assert first.A_log.shape == (32, 3)
    assert model.mixers()[2][0].n_heads == 2
    assert zoo.create_model("hybrid", **vars(model.config)).config == model.config


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"pattern": []}, "expected a list of registered architectures"),
        ({"pattern": ["hybrid"]}, "other than hybrid"),
        ({"pattern": ["mambo"]}, "no architecture 'mambo': did you mean 'mamba'"),
        ({"pattern": "mamba"}, "expected a list"),
        ({"members": {"rwkv9": {}}}, "expected settings of mamba, transformer, not of rwkv9"),
        ({"members": {"mamba": {"d_stat": 3}}}, "no setting 'd_stat': did you mean 'd_state'"),
        ({"members": {"mamba": {"d_model": 3}}}, "d_model belongs to the whole model: set arch.d_model"),
        ({"members": {"mamba": 3}}, "expected a mapping"),
        ({"members": {"mamba": {"d_state": 0}}}, "d_state=0 is not valid: expected at least 1"),
    ],
)
def test_bad_settings_are_one_line(settings, line) -> None:
    with pytest.raises(ConfigError, match=line):
        hybrid(**settings)
