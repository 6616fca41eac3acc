"""RoPE scalings against `transformers` and against their own definition, and changed on a finished model.

Letters: B batch, T time, H query heads, G key/value heads, K head width.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import zoo
from zoo.kernels.errors import ConfigError
from zoo.layers.rope_scaling import SCALINGS, make_scaling
from zoo.layers.rotary import Rotary
from zoo.train.config import train_config

from .parity import copy_weights, randomise, relative_error
from .test_parity_transformers import llama

SIZES = {"vocab_size": 53, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "rope_base": 100.0}
ORIGINAL = 24
EXAMPLES: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"factor": 3.0},
    "ntk": {"factor": 3.0},
    "dynamic": {"factor": 2.0, "original_length": ORIGINAL},
    "yarn": {"factor": 4.0, "original_length": ORIGINAL, "beta_fast": 3.0, "beta_slow": 0.5},
    "dynamic_yarn": {"original_length": ORIGINAL, "beta_fast": 3.0, "beta_slow": 0.5},
    "llama3": {"factor": 4.0, "original_length": ORIGINAL, "low_freq_factor": 0.5, "high_freq_factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "original_length": ORIGINAL,
        "short_factor": [1.0, 1.1, 1.2, 1.4],
        "long_factor": [1.0, 2.0, 3.0, 4.5],
    },
}
GROWING = [name for name, scaling in SCALINGS.items() if scaling.grows]


def model_with(name: str, arch: str = "transformer", **sizes: Any) -> zoo.Model:
    scaling = {"type": name, **EXAMPLES[name]}
    model = zoo.create_model(arch, **SIZES | sizes, rope_scaling=scaling)
    randomise(model)
    return model.eval()


def theirs_of(name: str, scaling: dict[str, Any], base: float, width: int) -> dict[str, Any]:
    """`rope_parameters` in the names of transformers."""
    values = {key: value for key, value in scaling.items() if key not in ("original_length", "form")}
    if name == "ntk":
        factor = values.pop("factor")
        return {"rope_type": "default", "rope_theta": base * factor ** (width / (width - 2))}
    if "original_length" in scaling and name != "dynamic":
        values["original_max_position_embeddings"] = scaling["original_length"]
    return {"rope_type": "default" if name == "none" else name, "rope_theta": base, **values}


@st.composite
def drawn_scalings(draw) -> tuple[str, dict[str, Any], float, int]:
    name = draw(st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope"]))
    pairs = draw(st.integers(2, 64))
    base = draw(st.floats(10, 1e6))
    values: dict[str, Any] = {"factor": draw(st.floats(1, 64))}
    if name != "linear":
        values["original_length"] = draw(st.integers(16, 10_000))
    if name == "yarn":
        values["beta_slow"] = draw(st.floats(0.1, 4))
        values["beta_fast"] = values["beta_slow"] + draw(st.floats(0.5, 60))
        values["truncate"] = draw(st.booleans())
        values |= draw(
            st.sampled_from([{}, {"attention_factor": 1.3}, {"mscale": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.2}])
        )
    if name == "llama3":
        values["low_freq_factor"] = draw(st.floats(0.5, 1.5))
        values["high_freq_factor"] = values["low_freq_factor"] + draw(st.floats(2, 4))
    if name == "longrope":
        numbers = st.lists(st.floats(0.5, 50), min_size=pairs, max_size=pairs)
        values |= {"short_factor": draw(numbers), "long_factor": draw(numbers)}
        values |= draw(st.sampled_from([{}, {"attention_factor": 1.3}]))
    return name, values, base, 2 * pairs


@settings(max_examples=200, deadline=None)
@given(drawn_scalings(), st.floats(0.1, 20))
def test_frequencies_and_attention_factor_are_those_of_transformers(drawn, share: float) -> None:
    name, values, base, width = drawn
    original = values.get("original_length", 100)
    length = max(1, int(share * original))
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        max_position_embeddings=original if name == "dynamic" else 100 * original,
        rope_parameters=theirs_of(name, values, base, width),
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), seq_len=length)
    scaling = make_scaling({"type": name, **values}, None, width)
    exponents = torch.arange(0, width, 2) / width
    frequencies, factor = scaling.frequencies(base, exponents, torch.tensor([length]))
    # Between slow and fast, theirs multiplies by a difference of rotations in fp32, where some digits cancel.
    tolerance = 2e-6 if name == "llama3" else 1e-6
    torch.testing.assert_close(frequencies, expected, rtol=tolerance, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-6)


def test_ntk_aware_keeps_the_fastest_pair_and_divides_the_slowest() -> None:
    exponents = torch.arange(0, 64, 2) / 64
    plain = make_scaling({}, None, 64).frequencies(1e4, exponents, None)[0]
    scaled = make_scaling({"type": "ntk", "factor": 8}, None, 64).frequencies(1e4, exponents, None)[0]
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 8, rel=1e-5)
    assert (scaled[1:-1] < plain[1:-1]).all()


def test_yarn_by_rotations() -> None:
    # By the paper: gamma of r, the rotations in the original length, is 0 below 1, 1 above 32, linear between.
    base, width, original, factor = 1e4, 128, 4096, 16.0
    values = {"type": "yarn", "factor": factor, "original_length": original, "form": "rotations"}
    frequencies, sharper = make_scaling(values, None, width).frequencies(base, torch.arange(0, width, 2) / width, None)
    for j, frequency in enumerate(frequencies.tolist()):
        theta = base ** (-2 * j / width)
        gamma = min(max((original * theta / (2 * math.pi) - 1) / 31, 0), 1)
        assert frequency == pytest.approx((1 - gamma) * theta / factor + gamma * theta, rel=2e-6)
    assert sharper == pytest.approx(0.1 * math.log(factor) + 1)
    by_index = make_scaling({**values, "form": "index"}, None, width)
    other = by_index.frequencies(base, torch.arange(0, width, 2) / width, None)[0]
    differ = (other / frequencies - 1).abs() > 1e-3
    assert int(differ.sum()) == 25
    assert (other / frequencies - 1).abs().max() > 0.5


@pytest.mark.parametrize("length", [1, ORIGINAL, 60, 200])
def test_dynamic_yarn_is_yarn_with_the_factor_of_the_length(length: int) -> None:
    exponents = torch.arange(0, 8, 2) / 8
    dynamic = make_scaling({"type": "dynamic_yarn", **EXAMPLES["dynamic_yarn"]}, None, 8)
    fixed = {"type": "yarn", **EXAMPLES["yarn"], "factor": max(1.0, length / ORIGINAL)}
    expected, sharper = make_scaling(fixed, None, 8).frequencies(100.0, exponents, None)
    actual, factor = dynamic.frequencies(100.0, exponents, torch.tensor([length]))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert float(factor) == pytest.approx(sharper, rel=1e-6)


@pytest.mark.parametrize("time", [13, 70])
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "dynamic_yarn"])
def test_logits_are_those_of_llama(name: str, time: int) -> None:
    # In deeper models the keys of the second layer come from what the first drew when the text was shorter.
    depth = {"n_layers": 1} if name in GROWING else {}
    ours = model_with(name, **depth)
    plain = zoo.create_model("transformer", **SIZES, **depth)
    theirs, sources = llama(plain)
    theirs.config.rope_parameters = theirs_of(name, EXAMPLES[name], 100.0, 8)
    theirs.config.max_position_embeddings = ORIGINAL if name == "dynamic" else 4 * ORIGINAL
    theirs = type(theirs)(theirs.config).eval()
    copy_weights(ours, theirs, sources)
    tokens = torch.randint(53, (2, time))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert relative_error(ours(tokens).logits, expected) < 1e-4
        # Lengths beyond the original one matter: the test sees which scaling it is.
        plain.load_state_dict(ours.state_dict())
        assert name == "none" or time == 13 or relative_error(plain(tokens).logits, expected) > 1e-3
        state = ours.init_state(2)
        for part in tokens.split(9, dim=1):
            logits, state, _ = ours(part, state=state)
        assert relative_error(logits[:, -1], expected[:, -1]) < 1e-4


def dense(rotary: Rotary, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one document over T tokens, rotated for the length T; q (T, H, K), k and v (T, G, K)."""
    lengths = torch.tensor([q.shape[0]])
    positions = torch.arange(q.shape[0])
    q, k = (rotary(t[None], positions, lengths)[0] for t in (q, k))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
    unseen = torch.ones(logits.shape[1:]).triu(1).bool()
    return torch.einsum("hts,shk->thk", logits.masked_fill(unseen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("cuts", [[5, 30], [30, 31, 32, 50], [1, 59]])
def test_keys_are_rotated_for_the_length_that_each_document_has_now(name: str, cuts: list[int]) -> None:
    mixer = model_with(name).double().mixers()[0][0]
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    # Documents of the two rows end at different times, one between calls, one within.
    begins = [[0, 30], [0, 7, 33]]
    ids = torch.stack([(torch.arange(60)[:, None] >= torch.tensor(row)).sum(1) for row in begins])
    state = mixer.init_state(2, dtype=torch.float64)
    edges = [0, *cuts, 60]
    for begin, end in pairwise(edges):
        if begin:
            state = mixer.reset_state(state, ids[:, begin] != ids[:, begin - 1])
        y, state = mixer(x[:, begin:end], state, ids[:, begin:end])
        for row in range(2):
            for document in ids[row, begin:end].unique():
                whole = (ids[row] == document).nonzero()[:, 0]
                read = whole[whole < end]
                qk, v = mixer._project(x[row : row + 1, read])
                drawn = dense(mixer.rotary, qk[0, :, :4], qk[0, :, 4:], v[0])
                expected = mixer.out_proj(drawn.flatten(1))[read >= begin]
                torch.testing.assert_close(y[row, read[read >= begin] - begin], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arch", ["longformer", "bigbird"])
@pytest.mark.parametrize("name", GROWING)
def test_sparse_architectures_read_the_last_tokens_as_in_the_whole(arch: str, name: str) -> None:
    sizes = {
        "longformer": {"window": 7, "n_global": 3},
        "bigbird": {"block_size": 4, "n_random_blocks": 1, "n_window_blocks": 2},
    }
    model = model_with(name, arch, n_layers=1, **sizes[arch]).double()
    tokens = torch.randint(53, (2, 70))
    ids = (torch.arange(70) >= torch.tensor([[20], [33]])).long()
    state = model.init_state(2)
    with torch.no_grad():
        for begin in range(0, 70, 6):
            end = min(begin + 6, 70)
            logits, state, _ = model(tokens[:, begin:end], state=state, segment_ids=ids[:, begin:end])
            whole = model(tokens[:, :end], segment_ids=ids[:, :end]).logits
            torch.testing.assert_close(logits, whole[:, begin:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_there_and_back_restores_the_logits(name: str, causal: bool, tmp_path) -> None:
    model = zoo.create_model("transformer", **SIZES, causal=causal, trained_length=ORIGINAL)
    randomise(model)
    tokens = torch.randint(53, (2, 60))
    given_settings = {key: value for key, value in EXAMPLES[name].items() if key != "original_length"}
    with torch.no_grad():
        before = model(tokens).logits
        zoo.set_rope_scaling(model, name, **given_settings)
        changed = model(tokens).logits
        assert torch.equal(changed, before) == (name == "none")
        zoo.save_pretrained(model, tmp_path)
        assert torch.equal(zoo.load_pretrained(tmp_path)(tokens).logits, changed)
        built = zoo.create_model("transformer", **SIZES, causal=causal, rope_scaling={"type": name, **EXAMPLES[name]})
        built.load_state_dict(model.state_dict())
        assert torch.equal(built(tokens).logits, changed)
        zoo.set_rope_scaling(model, "none")
        assert torch.equal(model(tokens).logits, before)
    assert model.config.rope_scaling == {}


def test_all_members_of_a_hybrid_that_have_rotary_positions_change(tmp_path) -> None:
    pattern = ["transformer", "mamba", "longformer"]
    members = {"longformer": {"rotary": False}, "transformer": {"n_heads": 2, "trained_length": 16}}
    model = zoo.create_model("hybrid", vocab_size=11, d_model=16, n_layers=4, pattern=pattern, members=members)
    zoo.set_rope_scaling(model, "yarn", factor=8)
    assert [type(mixers[0].rotary.scaling).__name__ for mixers in model.mixers()[::3]] == ["Yarn", "Yarn"]
    assert model.mixers()[2][0].rotary is None
    assert model.config.members["transformer"] == {
        "n_heads": 2,
        "trained_length": 16,
        "rope_scaling": {"type": "yarn", "factor": 8},
    }
    zoo.save_pretrained(model, tmp_path)
    tokens = torch.randint(11, (1, 20))
    assert torch.equal(zoo.load_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_hydra_carries_it() -> None:
    words = ["arch=transformer", "data=mqar", "arch.rope_scaling={type: yarn, factor: 4, original_length: 64}"]
    assert train_config(words).model["rope_scaling"] == {"type": "yarn", "factor": 4, "original_length": 64}
    with pytest.raises(ConfigError, match=r"factor=0.5 is not valid: expected at least 1"):
        train_config(["arch=transformer", "arch.rope_scaling={type: linear, factor: 0.5}"])


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        ({"type": "yran", "factor": 2}, "rope_scaling has type 'yran': did you mean 'yarn'"),
        ({"factor": 2}, "rope_scaling has type None: .*known: dynamic"),
        ({"type": "linear"}, "rope_scaling 'linear' needs factor: pass factor="),
        ({"type": "linear", "factor": 0.9}, "rope_scaling.factor=0.9 is not valid: expected at least 1"),
        ({"type": "linear", "fcator": 2}, "rope_scaling 'linear' has no setting 'fcator': did you mean 'factor'"),
        ({"type": "none", "factor": 2}, "rope_scaling 'none' has no setting 'factor'"),
        ({"type": "yarn", "factor": 2}, "rope_scaling 'yarn' needs original_length, the length that the model was"),
        ({"type": "yarn", "factor": 2, "original_length": 9, "beta_fast": 1}, "expected more than beta_slow=1"),
        ({"type": "llama3", "original_length": 9, "high_freq_factor": 1}, "expected more than low_freq_factor=1"),
        (
            {"type": "longrope", "factor": 2, "original_length": 9, "short_factor": [1.0], "long_factor": [1.0]},
            r"rope_scaling.short_factor=\[1.0\] is not valid: expected 4 numbers above 0",
        ),
    ],
)
def test_bad_settings_are_one_line(scaling: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        zoo.create_model("transformer", **SIZES, rope_scaling=scaling)
    assert "\n" not in str(caught.value)
    model = zoo.create_model("transformer", **SIZES)
    if "type" in scaling:
        with pytest.raises(ConfigError, match=line):
            zoo.set_rope_scaling(model, scaling["type"], **{k: v for k, v in scaling.items() if k != "type"})
        assert model.config.rope_scaling == {}, "a model that could not be changed is as before"


@pytest.mark.parametrize("name", ["mamba", "rwkv4"])
def test_a_model_without_rotary_positions_has_none_to_scale(name: str) -> None:
    model = zoo.create_model(name, vocab_size=11, d_model=16)
    with pytest.raises(ConfigError, match=f"this {name} has no rotary positions to scale"):
        zoo.set_rope_scaling(model, "linear", factor=2)
    with pytest.raises(ConfigError, match="this transformer has no rotary positions"):
        zoo.set_rope_scaling(zoo.create_model("transformer", **SIZES, rotary=False), "linear", factor=2)
    with pytest.raises(ConfigError, match="expected nothing where rotary=false"):
        zoo.create_model("transformer", **SIZES, rotary=False, rope_scaling={"type": "linear", "factor": 2})


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("linear", {"type": "ntk", "factor": 3}, "rope_scaling 'linear' has no setting 'type'"),
        ("ntk", {"factor": 1e300}, "expected at most"),
        ("longrope", {"factor": 2, "short_factor": [1, 1], "long_factor": [1, float("nan")]}, "numbers above 0"),
        (["a"], {}, "is no name: expected one of none, linear"),
    ],
)
def test_what_would_be_wrong_later_is_one_line_now(name, values, line) -> None:
    model = zoo.create_model("transformer", vocab_size=9, d_model=16, n_heads=4, trained_length=8)
    with pytest.raises(ConfigError, match=line):
        zoo.set_rope_scaling(model, name, **values)
