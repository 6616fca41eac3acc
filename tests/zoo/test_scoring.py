"""Scoring in chunks is scoring the whole sequence at once, in memory that its length does not change.

Letters: B batch, T time.
"""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo
from zoo import scoring
from zoo.kernels.errors import ConfigError, DataError
from zoo.memory import PeakMemory

from ..test_contract import FORMS, make  # noqa: TID252  (tests are no package that could be named)

VOCAB = 11
NAMES = [*zoo.list_models(), *FORMS]
# float64: the two ways add up in another order, and nothing more.
CLOSE = {"rtol": 0, "atol": 1e-9, "equal_nan": True}


def model_of(name: str) -> zoo.Model:
    return make(name).double()


def whole(model: zoo.Model, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """The same from one forward pass."""
    with torch.no_grad():
        logits = model(tokens, segment_ids=segment_ids).logits[:, :-1]
    scores = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    if segment_ids is not None:
        scores = scores.masked_fill(segment_ids[:, 1:] != segment_ids[:, :-1], float("nan"))
    return scores


def cut(tokens: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    begin = 0
    for size in [*sizes, tokens.shape[1]]:
        if tokens[:, begin : begin + size].numel():
            yield tokens[:, begin : begin + size]
        begin += size


FORMS_OF_TOKENS = {
    "tensor": lambda tokens, sizes: tokens,
    "int32": lambda tokens, sizes: tokens.int(),
    "bytes": lambda tokens, sizes: tokens.numpy().astype(np.uint8),
    "pieces": cut,
    "pieces of numpy": lambda tokens, sizes: (piece.numpy() for piece in cut(tokens, sizes)),
}


@st.composite
def cases(draw):
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 90))
    chunk = draw(st.integers(1, 100))
    packed, padded = draw(st.booleans()), draw(st.booleans())
    lengths = draw(st.lists(st.integers(1, time), min_size=batch, max_size=batch)) if padded else None
    form = draw(st.sampled_from(sorted(FORMS_OF_TOKENS) if not padded else ["tensor", "int32", "bytes"]))
    sizes = draw(st.lists(st.integers(1, 40), max_size=4))
    return batch, time, chunk, packed, lengths, form, sizes, draw(st.integers(0, 2**31))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cases())
@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_the_whole(name: str, case) -> None:
    batch, time, chunk, packed, lengths, form, sizes, seed = case
    generator = torch.Generator().manual_seed(seed)
    model, tokens = model_of(name), torch.randint(VOCAB, (batch, time), generator=generator)
    ids = torch.randint(4, (batch, time), generator=generator).sort(dim=1).values if packed else None
    expected = whole(model, tokens, ids)
    if lengths is not None:
        expected[torch.arange(1, time) >= torch.tensor(lengths)[:, None]] = float("nan")
        tokens = torch.where(torch.arange(time) < torch.tensor(lengths)[:, None], tokens, 200)  # no token at all
    given_ids = None if ids is None else FORMS_OF_TOKENS[form](ids, sizes[::-1])
    given_tokens = FORMS_OF_TOKENS[form](tokens, sizes)
    actual = zoo.score(model, given_tokens, chunk=chunk, segment_ids=given_ids, lengths=lengths)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(("chunk", "overlap"), [(20, 0), (20, 7), (20, 19), (1, 0), (61, 3), (200, 100)])
@pytest.mark.parametrize("name", ["mamba", "transformer", "transformer like BERT"])
def test_windows(name: str, chunk: int, overlap: int) -> None:
    model, tokens = model_of(name), torch.randint(VOCAB, (2, 61))
    actual = zoo.score(model, tokens, chunk=chunk, overlap=overlap, carry=False)
    expected = torch.full_like(actual, float("nan"))
    for begin in range(0, 60, chunk - overlap):  # each window scores all it can; what an earlier one did stays
        part = whole(model, tokens[:, begin : begin + chunk + 1])
        place = expected[:, begin : begin + chunk]
        place.copy_(torch.where(place.isnan(), part, place))
    torch.testing.assert_close(actual, expected, **CLOSE)
    if chunk < 60:
        assert (actual - whole(model, tokens)).abs().max() > 1e-3, "windows forget"


def test_windows_serve_documents_longer_than_the_positions() -> None:
    model = zoo.create_model("transformer", vocab_size=VOCAB, d_model=24, max_positions=16)
    tokens = torch.randint(VOCAB, (1, 50))
    assert zoo.score(model, tokens, chunk=16, overlap=4, carry=False).isfinite().all()
    for given_tokens in (tokens, iter([tokens])):
        with pytest.raises(DataError, match=r"more than max_positions=16: pass carry=false and chunk=16"):
            zoo.score(model, given_tokens)
    with pytest.raises(ConfigError, match="chunk=17 is more than max_positions=16: pass chunk=16 or less"):
        zoo.score(model, tokens, chunk=17, carry=False)


def test_few_logits_exist_at_once(monkeypatch) -> None:
    model, tokens = model_of("mamba"), torch.randint(VOCAB, (3, 40))
    expected, seen, predict = zoo.score(model, tokens, chunk=20), [], model.predict
    monkeypatch.setattr(scoring, "_SLICE_LOGITS", 70)
    monkeypatch.setattr(model, "predict", lambda x: seen.append(predict(x)) or seen[-1])
    torch.testing.assert_close(zoo.score(model, tokens, chunk=20), expected, **CLOSE)
    assert max(logits.numel() for logits in seen) <= 70
    assert sum(logits.numel() for logits in seen) == 3 * 39 * VOCAB


def test_it_reads_no_further_than_it_must() -> None:
    taken = []

    def pieces() -> Iterator[Tensor]:
        for _ in range(10):
            taken.append(1)
            yield torch.randint(VOCAB, (1, 8))

    scores = scoring.stream(model_of("mamba"), pieces(), chunk=16)
    assert next(scores).shape == (1, 15)
    assert len(taken) == 2
    assert sum(part.shape[1] for part in scores) == 80 - 16


@pytest.mark.parametrize("settings", [{"arch": "mamba"}, {"arch": "transformer", "window": 8}], ids=["mamba", "window"])
def test_memory_does_not_grow(settings, tmp_path) -> None:
    time, vocab = 65_536, 1000
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(vocab, size=time, dtype=np.uint16))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    model = zoo.create_model(settings.pop("arch"), vocab_size=vocab, d_model=16, n_layers=1, **settings)
    zoo.score(model, tokens[:4000], chunk=1024)
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.bytes()
    assert zoo.score(model, tokens, chunk=1024).shape == (1, time - 1)
    assert memory.bytes() - before < 128 * 2**20, "the logits of all would be 250 MiB"


def refused(error: type[Exception], message: str, tokens, **settings) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        zoo.score(settings.pop("model", None) or make("mamba"), tokens, **settings)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_line() -> None:
    tokens = torch.randint(VOCAB, (2, 9))
    refused(ConfigError, "chunk=0 is not valid: expected at least 1", tokens, chunk=0)
    refused(ConfigError, "overlap=-1 is not valid", tokens, overlap=-1, carry=False)
    refused(ConfigError, "overlap=8 is not valid: expected 0 to 7", tokens, chunk=8, overlap=8, carry=False)
    refused(ConfigError, "overlap=2 is for windows that carry no state", tokens, overlap=2)
    refused(ConfigError, "has causal=false: it predicts hidden", tokens, model=make("mamba", causal=False))
    refused(ConfigError, "has causal=false", tokens, model=make("transformer", causal=False), carry=False)
    refused(DataError, "no tokens to score", tokens[:, :0])
    refused(DataError, "no tokens to score", iter([]))
    refused(DataError, "token id 11 is outside the vocabulary 0..10", torch.full((1, 3), 11))
    refused(DataError, "expected integers of shape (batch, time)", tokens.float())
    refused(DataError, "expected integers of shape (batch, time)", tokens[None])
    refused(DataError, "tokens of type int", [1, 2])
    refused(DataError, "pieces of 2 and of 1 rows", iter([tokens, tokens[:1]]))
    refused(DataError, "segment_ids of another shape", tokens, segment_ids=torch.zeros(2, 8, dtype=torch.int64))
    refused(
        DataError, "segment_ids of another shape", tokens, segment_ids=torch.zeros(2, 12, dtype=torch.int64), chunk=9
    )
    for lengths in ([0, 9], [1, 10], [3], [1.5, 2.0]):
        refused(
            DataError, "do not fit tokens of shape (2, 9): expected 2 integers from 1 to 9", tokens, lengths=lengths
        )
    refused(DataError, "lengths= belongs to tokens in one array", iter([tokens]), lengths=[1, 2])


def test_a_cache_policy_needs_a_state() -> None:
    model = zoo.create_model("transformer", vocab_size=9, d_model=16)
    zoo.set_cache(model, "window", window=4)
    with pytest.raises(ConfigError, match="a cache acts where a state is carried: pass carry=true"):
        zoo.score(model, torch.zeros(1, 9, dtype=torch.int64), chunk=3, carry=False)
