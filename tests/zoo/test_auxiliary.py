"""What leaves a model beside its logits: auxiliary losses and diagnostics.

Letters: B batch, T time, D d_model.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.config import ModelConfig
from zoo.mixer import Mixer, add_loss
from zoo.model import Model
from zoo.registry import Architecture

TOKENS = torch.tensor([[1, 2, 3], [4, 0, 2]])


class Shy(Mixer):
    """Says how far its weight is from one, and shows the first token of each row."""

    shares = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer = layer
        self.weight = nn.Parameter(torch.tensor(3.0 + layer))

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        segment_ids: Tensor | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Any]:
        assert shared is not None
        if "losses" in shared:
            add_loss(shared, "distance", (self.weight - 1) ** 2)
        if "diagnostics" in shared:
            shared["diagnostics"][f"first/{self.layer}"] = x[:, 0]
        return self.weight.detach() * x, state


def make(**settings: Any) -> Model:
    return Model(Architecture("shy", Shy, ModelConfig), ModelConfig(vocab_size=5, d_model=4, **settings))


@pytest.mark.parametrize(("causal", "expected"), [(True, 4.0 + 9.0), (False, 2 * (4.0 + 9.0))])
def test_losses_add_up_over_layers_and_directions(causal: bool, expected: float) -> None:
    model = make(causal=causal)
    out = model(TOKENS)
    assert {name: loss.item() for name, loss in out.losses.items()} == {"distance": expected}
    out.losses["distance"].backward()
    weights = [p for n, p in model.named_parameters() if ".mixers." in n]
    assert len(weights) == (2 if causal else 4)
    assert all(p.grad == 2 * (p - 1) for p in weights)


def test_losses_are_made_only_where_somebody_can_use_them() -> None:
    model = make()
    with torch.no_grad():
        assert model(TOKENS).losses == {}
    assert model.read(TOKENS)[0].shape == (2, 3, 4)  # would fail in `add_loss` if they were made


def test_diagnostics() -> None:
    model = make()
    shown = model.diagnose(TOKENS)
    assert shown.keys() == {"first/0", "first/1"}
    torch.testing.assert_close(
        shown["first/1"], model.blocks[1].norms[0](shown["first/0"] * 3 + model.embedding(TOKENS)[:, 0])
    )
    assert not shown["first/0"].requires_grad


def test_diagnostics_of_both_directions() -> None:
    model = make(causal=False)
    shown = model.diagnose(TOKENS)
    assert shown.keys() == {"first/0", "first/1", "reversed/first/0", "reversed/first/1"}
    torch.testing.assert_close(shown["reversed/first/0"], model.blocks[0].norms[0](model.embedding(TOKENS[:, -1])))


def test_others_show_nothing() -> None:
    model = zoo.create_model("mamba", vocab_size=5, d_model=8, n_layers=1)
    assert model.diagnose(TOKENS) == {}
    state = model(TOKENS, state=model.init_state(2)).state
    assert model.diagnose(TOKENS, state=state, segment_ids=torch.zeros_like(TOKENS)) == {}
