"""The shell, the settings and generation, apart from any one architecture."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.generation import stream
from zoo.kernels.errors import ConfigError, DataError
from zoo.settings import parse_overrides

MODEL = zoo.create_model("mamba", vocab_size=9, d_model=8, n_layers=1).eval()


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "expected integer ids of shape"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one time step"),
        (torch.zeros(1, 2), "expected integer ids"),
        (ids([0, 9]), "token id 9 is outside the vocabulary 0..8"),
        (ids([-1, 3]), "token id -1 is outside the vocabulary"),
    ],
)
def test_bad_tokens(tokens, message) -> None:
    with pytest.raises(DataError, match=message):
        MODEL(tokens)


def test_bad_companions() -> None:
    with pytest.raises(DataError, match="segment_ids of shape"):
        MODEL(ids([1, 2]), segment_ids=ids([0]))
    with pytest.raises(DataError, match="the state holds 2 rows and the tokens 1"):
        MODEL(ids([1, 2]), state=MODEL.init_state(2))


def test_state_bytes_count_the_memory_that_views_keep() -> None:
    whole = torch.zeros(10, 4)
    assert zoo.state_bytes(((whole[:1],), whole[1:])) == 160
    with pytest.raises(ConfigError, match="not int"):
        zoo.state_bytes((3,))


@settings(max_examples=40, deadline=None)
@given(
    temperature=st.floats(0.05, 3),
    top_k=st.one_of(st.none(), st.integers(1, 20)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
    seed=st.integers(0, 99),
)
def test_draws_are_likely_tokens_and_repeat(temperature, top_k, top_p, seed) -> None:
    prompt = ids([1, 2, 3], [4, 5, 6])
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    made = zoo.generate(MODEL, prompt, max_new_tokens=3, **options)
    assert torch.equal(made, zoo.generate(MODEL, prompt, max_new_tokens=3, **options))
    with torch.no_grad():
        probabilities = (MODEL(made[:, :-1]).logits[:, 2:] / temperature).softmax(-1)
    for row, step in itertools.product(range(2), range(3)):
        p, token = probabilities[row, step], made[row, 3 + step]
        rank = int((p > p[token]).sum())
        assert top_k is None or rank < top_k
        assert top_p is None or p[p > p[token]].sum() < top_p + 1e-5


def test_generation_is_a_stream_and_its_settings_are_checked_at_once() -> None:
    assert len(list(itertools.islice(stream(MODEL, ids([1]), max_new_tokens=10**9), 4))) == 4
    for bad in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"max_new_tokens": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))}=.* is not valid"):
            stream(MODEL, ids([1]), **{"max_new_tokens": 1, **bad})


def test_words_of_a_command_line() -> None:
    config = type(MODEL.config)
    parsed = parse_overrides(config, ["vocab_size=5", "norm_eps=1e-3", "dt_rank=null", "tie_embeddings=false"], "me")
    assert (parsed.vocab_size, parsed.norm_eps, parsed.dt_rank, parsed.tie_embeddings) == (5, 1e-3, None, False)
    for word, message in {
        "vocab_size": "write key=value",
        "vocab_size=x": "vocab_size='x' is not valid: expected an integer",
        "norm_eps=NaN": "norm_eps=nan is not valid",
        "tie_embeddings=1": "expected true or false",
        "dt_rank=2.5": "expected an integer or null",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_overrides(config, ["vocab_size=5", word], "me")
