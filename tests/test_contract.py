"""The contract of the registry: what every architecture must do, checked with no edit when one is added.

Letters: B batch, T time, V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.checkpoint import load_pretrained, save_pretrained
from zoo.flops import count_flops
from zoo.kernels.errors import ConfigError
from zoo.layers.attention import BERT
from zoo.registry import architecture

VOCAB = 11
LENGTHS = [1, 2, 63, 65, 127]
# fp32 relative to the scale of the logits; recurrences and softmax add up in another order when they are cut up.
TOLERANCE = 2e-5

# Forms of some architectures whose code differs from that of the default form, where lengths of the tests reach it.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer in a window": ("transformer", {"window": 9, "n_kv_heads": 2, "max_positions": 200}),
    "transformer like BERT": ("transformer", {**BERT, "max_positions": 200}),
    "longformer, narrow": ("longformer", {"window": 5, "n_global": 3, "n_kv_heads": 2}),
    "longformer, dilated": (
        "longformer",
        {"windows": [3, 6], "dilations": [1, 4], "dilated_heads": 2, "n_global": 2, "rotary": False},
    ),
    "bigbird, small blocks": ("bigbird", {"block_size": 4, "n_random_blocks": 2, "n_kv_heads": 2}),
    "bigbird, no window": (
        "bigbird",
        {"block_size": 3, "n_window_blocks": 1, "n_random_blocks": 1, "n_global_blocks": 2},
    ),
    "landmark, local first": ("landmark", {"block_size": 5, "local_layers": 1, "n_kv_heads": 2}),
    "transformer_xl, small segments": ("transformer_xl", {"segment": 8, "memory": 13}),
    "compressive, convolution": (
        "compressive",
        {"segment": 8, "memory": 12, "compressed_memory": 7, "rate": 3, "compression": "conv", "bias": True},
    ),
    "compressive, most used": (
        "compressive",
        {"segment": 9, "memory": 4, "compressed_memory": 6, "rate": 2, "compression": "most_used"},
    ),
    "compressive, dilated, decoder": (
        "compressive",
        {"segment": 6, "memory": 6, "compressed_memory": 4, "compression": "dilated", "loss": "autoencoding"},
    ),
}

pytestmark = pytest.mark.parametrize("name", [*zoo.list_models(), *FORMS])
in_both_forms = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def create(name: str, **settings) -> zoo.Model:
    arch, form = FORMS.get(name, (name, {}))
    return zoo.create_model(arch, **form | settings)


def make(name: str, causal: bool = True, **settings) -> zoo.Model:
    """A small model whose outputs have a scale worth comparing: published initialisations start almost silent."""
    torch.manual_seed(0)
    model = create(name, **{"vocab_size": VOCAB, "d_model": 24, "causal": causal} | settings)
    with torch.no_grad():
        for parameter in model.parameters():
            marked = getattr(parameter, "_no_weight_decay", False)
            if parameter.ndim >= 2 and not (marked and parameter.any()):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def tokens_of(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert scale > 1e-3, "the outputs are too small for the comparison to mean anything"
    assert (actual - expected).abs().max().item() <= TOLERANCE * scale


def in_pieces(model: zoo.Model, tokens: Tensor, cuts: list[int], segment_ids: Tensor | None = None):
    state = model.init_state(tokens.shape[0])
    logits = []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        ids = None if segment_ids is None else segment_ids[:, begin:end]
        out = model(tokens[:, begin:end], state=state, segment_ids=ids)
        logits.append(out.logits)
        state = out.state
    return torch.cat(logits, dim=1), state


@in_both_forms
@pytest.mark.parametrize("time", LENGTHS)
def test_forward_and_every_gradient(name: str, causal: bool, time: int) -> None:
    model = make(name, causal=causal)
    out = model(tokens_of(2, time))
    assert out.logits.shape == (2, time, VOCAB)
    assert out.state is None
    loss = F.cross_entropy(out.logits.flatten(0, 1), tokens_of(2, time, seed=2).flatten()) + sum(out.losses.values())
    loss.backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    # With one token there is nothing to attend to or to remember, with two nothing that has decayed in between, so some
    # parameters rightly have no effect.
    assert time <= 2 or not silent


@pytest.mark.parametrize("time", [2, 63, 65])
def test_causality(name: str, time: int) -> None:
    model, tokens = make(name), tokens_of(2, time)
    at = time // 2
    changed = tokens.clone()
    changed[:, at:] = (changed[:, at:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    assert_same(after[:, :at], before[:, :at])
    assert (after[:, at] - before[:, at]).abs().max() > 1e-3, "the present token must have an effect"


@pytest.mark.parametrize("at", [0, 31, 62])
def test_bidirectional_sees_both_sides(name: str, at: int) -> None:
    model, tokens = make(name, causal=False), tokens_of(2, 63)
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % VOCAB
    with torch.no_grad():
        moved = (model(changed).logits - model(tokens).logits).abs().amax(-1)  # (B, T)
    for place in {at - 1, at, at + 1} & set(range(63)):
        assert (moved[:, place] > 1e-6).all(), f"token {place} does not see token {at}"


def test_bidirectional_refuses_a_state(name: str) -> None:
    model, tokens = make(name, causal=False), tokens_of(2, 5)
    assert model.state_size(5) == 0
    with pytest.raises(ConfigError, match="causal=false and so no state: give it whole sequences"):
        model.init_state(2)
    with pytest.raises(ConfigError, match="causal=false and so no state"):
        zoo.generate(model, tokens, max_new_tokens=1)


@pytest.mark.parametrize("time", LENGTHS)
def test_whole_equals_chunks_equals_token_by_token(name: str, time: int) -> None:
    model, tokens = make(name), tokens_of(2, time)
    with torch.no_grad():
        whole = model(tokens).logits
        one_call, state_whole = in_pieces(model, tokens, [])
        chunked, state_chunked = in_pieces(model, tokens, sorted({time // 3, time // 2} - {0, time}))
        stepped, state_stepped = in_pieces(model, tokens, list(range(1, time)))
    for logits in (one_call, chunked, stepped):
        assert_same(logits, whole)
    follow = tokens_of(2, 3, seed=5)
    with torch.no_grad():
        after = [model(follow, state=s).logits for s in (state_whole, state_chunked, state_stepped)]
    assert_same(after[1], after[0])
    assert_same(after[2], after[0])


def test_gradient_flows_through_the_state(name: str) -> None:
    model, tokens, targets = make(name), tokens_of(2, 37), tokens_of(2, 37, seed=2)
    grads = []
    for cuts in ([], [11, 30]):
        model.zero_grad()
        logits, _ = in_pieces(model, tokens, cuts)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for parameter, expected in grads[0].items():
        torch.testing.assert_close(grads[1][parameter], expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


@in_both_forms
def test_packed_equals_separate(name: str, causal: bool) -> None:
    model = make(name, causal=causal)
    lengths = [[1, 29, 33], [40, 2, 21]]  # documents per row
    tokens = tokens_of(2, 63)
    ids = torch.stack([torch.repeat_interleave(torch.arange(3) * 2, torch.tensor(row)) for row in lengths])
    with torch.no_grad():
        packed = model(tokens, segment_ids=ids).logits
        for row, row_lengths in enumerate(lengths):
            begin = 0
            for length in row_lengths:
                alone = model(tokens[row : row + 1, begin : begin + length]).logits[0]
                assert_same(packed[row, begin : begin + length], alone)
                begin += length
        for cuts in (
            ([30], [1, 30, 40], list(range(1, 63))) if causal else ()
        ):  # on a boundary, inside a document, and everywhere
            assert_same(in_pieces(model, tokens, cuts, ids)[0], packed)


@in_both_forms
def test_rows_do_not_see_each_other(name: str, causal: bool) -> None:
    model, tokens = make(name, causal=causal), tokens_of(3, 20)
    with torch.no_grad():
        together = model(tokens).logits
        for row in range(3):
            assert_same(model(tokens[row : row + 1]).logits[0], together[row])


def test_state_is_as_large_as_declared(name: str) -> None:
    model, state = make(name), None
    seen = 0
    for more in (1, 2, 60, 64):
        with torch.no_grad():
            state = model(tokens_of(3, more), state=state or model.init_state(3)).state
        seen += more
        held = tensors(state)
        assert sum(t.numel() for t in held) == 3 * model.state_size(seen)
        assert all(t.shape[0] == 3 for t in held), "the first dimension of each state tensor is the batch"
        assert zoo.state_bytes(state) == sum(t.numel() * t.element_size() for t in held), "views keep more alive"


def tensors(state) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [t for item in state for t in tensors(item)]


@in_both_forms
def test_save_and_load_round_trip(name: str, causal: bool, tmp_path) -> None:
    model, tokens = make(name, causal=causal, tie_embeddings=False), tokens_of(2, 9)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.architecture == model.architecture
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@in_both_forms
def test_bf16_autocast_is_finite_and_close(name: str, causal: bool) -> None:
    model, tokens = make(name, causal=causal), tokens_of(2, 33)
    expected = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens)
        loss = out.logits.float().logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # bf16 keeps 8 bits (4e-3); a few layers of products and sums lose one more digit.
    assert (out.logits.float() - expected).abs().max() <= 0.06 * expected.abs().max()


@in_both_forms
def test_torch_compile(name: str, causal: bool) -> None:
    torch._dynamo.reset()  # its limit of recompilations counts what other tests compiled
    model, tokens = make(name, causal=causal), tokens_of(2, 17)
    expected = model(tokens).logits
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(tokens).logits
    logits.square().mean().backward()
    assert_same(logits, expected)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


@in_both_forms
@pytest.mark.parametrize("time", [65, 200])
def test_declared_flops_are_counted(name: str, causal: bool, time: int) -> None:
    model = make(name, causal=causal)
    assert model.flops(time) == pytest.approx(count_flops(lambda: model(tokens_of(1, time))), rel=0.01)
    assert 2 * model.flops(time) == pytest.approx(count_flops(lambda: model(tokens_of(2, time))), rel=0.01)


@in_both_forms
def test_weight_decay_exemptions(name: str, causal: bool) -> None:
    model = make(name, causal=causal)
    exempt = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert exempt <= parameters.keys()
    assert "embedding.weight" in exempt
    assert "blocks.0.norms.0.weight" in exempt
    assert all(parameter in exempt for parameter in parameters if parameter.endswith("bias"))
    assert any(parameter not in exempt for parameter in parameters)


def test_generation_is_the_argmax_of_the_whole(name: str) -> None:
    model, prompt = make(name), tokens_of(2, 7)
    made = zoo.generate(model, prompt, max_new_tokens=6, temperature=0)
    with torch.no_grad():
        expected = model(made[:, :-1]).logits.argmax(-1)[:, -6:]
    assert torch.equal(made[:, -6:], expected)


@in_both_forms
def test_fresh_loss_is_that_of_guessing(name: str, causal: bool) -> None:
    torch.manual_seed(0)
    model = create(name, vocab_size=64, causal=causal, d_model=64, n_layers=2)
    tokens = torch.randint(64, (4, 50))
    loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), torch.randint(64, (200,)))
    assert loss.item() == pytest.approx(math.log(64), rel=0.05)


def test_config_is_checked(name: str) -> None:
    config = architecture(FORMS.get(name, (name,))[0]).config
    for key, value in {"d_model": -1, "n_layers": 0, "vocab_size": 0, "norm_eps": 0.0}.items():
        with pytest.raises(ConfigError, match=f"{key}=.* is not valid: expected"):
            config(**{"vocab_size": 5} | {key: value})
    with pytest.raises(ConfigError, match="d_model='abc' is not valid: expected an integer"):
        create(name, vocab_size=5, d_model="abc")
    with pytest.raises(ConfigError, match="no setting 'd_modle': did you mean 'd_model'"):
        create(name, vocab_size=5, d_modle=8)
    with pytest.raises(ConfigError, match="needs vocab_size"):
        create(name)
