"""Models that look both ways, and the switches of the shell that encoders need.

Letters: B batch, T time, D d_model.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.kernels.errors import ConfigError, DataError, ZooError
from zoo.layers.bidirectional import Bidirectional
from zoo.mixer import Mixer

VOCAB = 11
TOKENS = torch.arange(40).reshape(2, 20) * 7 % VOCAB
IDS = torch.tensor([[0] * 8 + [1] * 12, [3] * 1 + [4] * 12 + [9] * 7])


def create(name: str, **settings: Any) -> zoo.Model:
    """A model in which every parameter matters."""
    torch.manual_seed(0)
    model = zoo.create_model(name, vocab_size=VOCAB, d_model=24, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def backwards(x: Tensor, ids: Tensor | None) -> Tensor:
    """Each document from its end, where it stands; undoes itself."""
    if ids is None:
        return x.flip(1)
    rows = []
    for row, row_ids in zip(x, ids, strict=True):
        _, lengths = row_ids.unique_consecutive(return_counts=True)
        rows.append(torch.cat([piece.flip(0) for piece in row.split(lengths.tolist())]))
    return torch.stack(rows)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv4", "rwkv7"])
def test_two_mixers_by_hand(name: str, ids: Tensor | None) -> None:
    model = create(name, causal=False, n_layers=3)
    found, by_hand = model(TOKENS, segment_ids=ids).logits, forward_by_hand(model, ids)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weight).sum(), list(model.parameters())) for y in (found, by_hand)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item() + 1e-7)


def forward_by_hand(model: zoo.Model, ids: Tensor | None) -> Tensor:
    """The shell without its wrapper: each direction a chain of its own through `shared`."""
    x = model.embedding_norm(model.embedding(TOKENS))
    shared: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for block in model.blocks:
        for norm, mixer in zip(block.norms, block.mixers, strict=True):
            y = norm(x)
            if isinstance(mixer, Bidirectional):
                onward = run(mixer.onward, y, ids, shared[0])
                x = x + onward + backwards(run(mixer.backward, backwards(y, ids), ids, shared[1]), ids)
            else:
                x = x + run(mixer, y, ids, shared[0])
    return F.linear(model.norm(x), model.embedding.weight if model.head is None else model.head.weight)


def run(mixer: Mixer, x: Tensor, ids: Tensor | None, shared: dict[str, Any]) -> Tensor:
    return mixer(x, None, ids, shared)[0] if mixer.shares else mixer(x, None, ids)[0]


def test_values_of_rwkv7_are_shared_in_each_direction() -> None:
    model = create("rwkv7", causal=False, n_layers=3)
    first: Bidirectional = model.mixers()[0][0]
    upper: Bidirectional = model.mixers()[2][0]
    x, shared = torch.randn(2, 20, 24), {}
    first(x, None, None, shared)
    onward, reverse = {k: v for k, v in shared.items() if k != "reversed"}, shared["reversed"]
    assert onward.keys() == reverse.keys()
    assert onward, "the first layer leaves its values"
    y, _ = upper(x, None, None, shared)
    expected = upper.onward(x, None, None, onward)[0] + upper.backward(x.flip(1), None, None, reverse)[0].flip(1)
    torch.testing.assert_close(y, expected)
    swapped = upper.onward(x, None, None, reverse)[0] + upper.backward(x.flip(1), None, None, onward)[0].flip(1)
    assert (y - swapped).abs().max() > 1e-3, "the values of the other direction would not do"


@pytest.mark.parametrize("name", zoo.list_models())
def test_a_state_of_the_causal_form_is_refused(name: str) -> None:
    state = create(name).init_state(2)
    with pytest.raises(ConfigError, match="causal=false and so no state: give it whole sequences"):
        create(name, causal=False)(TOKENS, state=state)


@pytest.mark.parametrize("name", ["transformer", "mamba"])
def test_post_norm(name: str) -> None:
    model = create(name, post_norm=True, norm="layer", norm_eps=1e-3)
    assert not list(model.norm.parameters()), "the last block has normalised already"
    x = model.embedding(TOKENS)
    for block in model.blocks:
        for norm, mixer in zip(block.norms, block.mixers, strict=True):
            x = x + mixer(x)[0]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
            x = x * norm.weight + norm.bias
    expected = x @ model.embedding.weight.T
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_mlm_head(activation: str) -> None:
    model = create("transformer", mlm_head=activation)
    hidden: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, given, result: hidden.append(result))
    logits = model(TOKENS).logits
    dense, _, norm = model.transform
    x = F.gelu(dense(hidden[0]), approximate="tanh" if activation == "gelu_tanh" else "none")
    torch.testing.assert_close(logits, norm(x) @ model.embedding.weight.T + model.head_bias)
    assert {"head_bias", "transform.0.bias", "transform.2.weight"} <= model.no_weight_decay()
    assert "transform.0.weight" not in model.no_weight_decay()


def positions_of(model: zoo.Model, ids: Tensor | None, cuts: list[int]) -> Tensor:
    """Rows of the table that were looked up, (B, T)."""
    seen: list[Tensor] = []
    handle = model.positions.register_forward_hook(lambda module, given, result: seen.append(given[0]))
    state = model.init_state(2)
    for begin, end in itertools.pairwise([0, *cuts, 20]):
        piece = None if ids is None else ids[:, begin:end]
        state = model(TOKENS[:, begin:end], state=state, segment_ids=piece).state
    handle.remove()
    return torch.cat(seen, dim=1)


@pytest.mark.parametrize("cuts", [[], [5], [1, 8, 13], list(range(1, 20))], ids=str)
def test_positions_count_from_the_beginning_of_each_document(cuts: list[int]) -> None:
    model = create("transformer", max_positions=20)
    assert torch.equal(positions_of(model, None, cuts), torch.arange(20).expand(2, -1))
    expected = [[*range(8), *range(12)], [*range(1), *range(12), *range(7)]]
    assert positions_of(model, IDS, cuts).tolist() == expected


@pytest.mark.parametrize("name", ["transformer", "mamba", "longformer"])
def test_positions_matter(name: str) -> None:
    model = create(name, max_positions=20, **({} if name == "mamba" else {"rotary": False}))
    same = torch.full((1, 20), 3)
    logits = model(same).logits[0]
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-3, "one token at each place"


def test_no_document_is_longer_than_the_table() -> None:
    model = create("transformer", max_positions=12)
    assert model(TOKENS, segment_ids=IDS).logits.shape == (2, 20, VOCAB)  # two rows of 20, documents of 12 at most
    state = model(TOKENS[:, :12], state=model.init_state(2), segment_ids=torch.zeros(2, 12, dtype=torch.int64)).state
    for refused in (
        lambda: model(TOKENS[:, :13]),
        lambda: model(TOKENS[:, :1], state=state),
        lambda: model(TOKENS, segment_ids=torch.zeros_like(IDS)),
    ):
        with pytest.raises(DataError, match=r"a document of (13|20) tokens") as caught:
            refused()
        assert "longer than max_positions=12: give shorter ones" in str(caught.value)
    fresh = torch.full((2, 1), 5)
    assert model(TOKENS[:, :1], state=state, segment_ids=fresh).state.position.tolist() == [1, 1]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("longformer", {"window": 0}, "window=0 is not valid: expected at least 1"),
    ("longformer", {"windows": [4]}, "windows=.4. is not valid: expected 2 numbers, one per block"),
    ("longformer", {"windows": [4, 0]}, "expected 2 numbers, one per block, from 1 to 1073741824"),
    ("longformer", {"windows": [4, 2**31]}, "expected 2 numbers, one per block, from 1 to"),
    ("longformer", {"window": 2**70}, "expected at most 1073741824"),
    ("transformer", {"window": 2**70}, "expected at most 1073741824"),
    ("bigbird", {"block_size": 2**70}, "expected at most 1073741824"),
    ("bigbird", {"n_window_blocks": 2**70}, "expected at most 1073741824"),
    ("longformer", {"window_growth": 1e300}, "expected windows of at most 1073741824"),
    ("longformer", {"window_growth": 1e300, "n_layers": 5}, "expected windows of at most 1073741824"),
    ("longformer", {"windows": [4, 4, 4]}, "expected 2 numbers"),
    ("longformer", {"windows": []}, "expected 2 numbers"),
    ("longformer", {"dilations": [1]}, "dilations=.1. is not valid: expected 2 numbers"),
    ("longformer", {"dilation": 0}, "dilation=0 is not valid: expected at least 1"),
    ("longformer", {"dilated_heads": 5}, "dilated_heads=5 is not valid: expected at most n_heads=4"),
    ("longformer", {"dilated_heads": 1, "n_kv_heads": 2}, "a multiple of 2, the query heads per key/value head"),
    ("longformer", {"window": 4, "n_global": 5}, "n_global=5 is not valid: expected at most the narrowest window, 4"),
    ("longformer", {"window": 4, "window_growth": 0.5, "n_global": 3}, "expected at most the narrowest window, 2"),
    ("longformer", {"windows": [8, 3], "n_global": 4}, "expected at most the narrowest window, 3"),
    ("transformer", {"window": 0}, "window=0 is not valid: expected at least 1"),
    ("bigbird", {"block_size": 0}, "block_size=0 is not valid: expected at least 1"),
    ("bigbird", {"n_window_blocks": 2, "causal": False}, "n_window_blocks=2 is not valid: expected an odd number"),
    ("bigbird", {"n_random_blocks": -1}, "n_random_blocks=-1 is not valid: expected at least 0"),
    ("bigbird", {"plan": "transformers"}, "plan='transformers' is not valid: expected hash, or causal=false"),
    ("bigbird", {"plan": "transformers", "causal": False, "max_positions": 100}, "a multiple of block_size"),
    ("transformer", {"mlm_head": "relu"}, "mlm_head='relu' is not valid: did you mean 'gelu'"),
]


@pytest.mark.parametrize(("name", "settings", "line"), WRONG)
def test_bad_settings_are_one_line(name, settings, line) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        create(name, **settings)
    assert "\n" not in str(caught.value)


RIGHT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # What is larger than the sequence of 20 tokens is as if it were just as large.
    ("transformer", {"window": 10**9}, {}),
    ("longformer", {"window": 10**9}, {"window": 20}),
    ("longformer", {"dilation": 1000}, {"dilation": 20}),
    ("longformer", {"window": 30, "n_global": 30}, {"window": 20}),
    ("bigbird", {"block_size": 10**9}, {"block_size": 20}),
    ("bigbird", {"n_window_blocks": 99, "block_size": 3}, {"block_size": 20}),
    ("bigbird", {"n_global_blocks": 99, "block_size": 3}, {"block_size": 20}),
    ("bigbird", {"n_random_blocks": 99, "block_size": 3}, {"block_size": 20}),
]


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("name", "settings", "same"), RIGHT)
def test_larger_than_the_sequence(name, settings, same, causal, ids) -> None:
    if not causal and "n_global" in settings:
        same = same | {"n_global": 20}
    actual, expected = (create(name, causal=causal, **s)(TOKENS, segment_ids=ids).logits for s in (settings, same))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "marks", "line"),
    [
        ("longformer", {"causal": False}, torch.zeros(2, 7, dtype=torch.bool), r"global_tokens of shape \(2, 7\)"),
        ("longformer", {"causal": False}, torch.tensor([0, 25]), "expected bool of the shape of the tokens"),
        ("longformer", {"causal": False}, torch.zeros(2, 20), "type torch.float32: expected bool"),
        ("longformer", {}, torch.zeros(2, 20, dtype=torch.bool), "this longformer takes no global_tokens"),
        ("bigbird", {"causal": False}, torch.zeros(2, 20, dtype=torch.bool), "this bigbird takes no global_tokens"),
        ("mamba", {"causal": False}, torch.zeros(2, 20, dtype=torch.bool), "this mamba takes no global_tokens"),
    ],
)
def test_bad_global_tokens_are_one_line(name, settings, marks, line) -> None:
    with pytest.raises(ZooError, match=line) as caught:
        create(name, **settings)(TOKENS, global_tokens=marks)
    assert "\n" not in str(caught.value)


def test_the_plan_of_transformers_takes_one_document() -> None:
    model = create("bigbird", causal=False, plan="transformers", max_positions=64)
    with pytest.raises(DataError, match="takes no segment_ids: give one document per row, unpadded"):
        model(TOKENS, segment_ids=IDS)


def test_more_blocks_than_there_are_cost_nothing() -> None:
    torch.manual_seed(0)
    many = zoo.create_model("bigbird", vocab_size=9, block_size=4, n_global_blocks=2**30, n_random_blocks=2**30)
    tokens = torch.randint(9, (2, 40))
    dense = zoo.create_model("transformer", vocab_size=9)
    dense.load_state_dict(many.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(many(tokens).logits, dense(tokens).logits)


def test_a_state_of_another_model_is_one_line() -> None:
    names = ("transformer", "longformer", "bigbird")
    models = {name: zoo.create_model(name, vocab_size=9) for name in names}
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    for one, other in (("longformer", "bigbird"), ("bigbird", "longformer"), ("transformer", "longformer")):
        with pytest.raises(DataError, match=r"the state is a \w+, of another model or cache: begin with one from init"):
            models[one](tokens, state=models[other].init_state(1))
