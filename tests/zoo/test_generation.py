"""Generation: every row of a padded batch as if it were alone, against the whole sequence and against `transformers`.

Letters: B batch, T time, V vocabulary.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import zoo
from zoo.generation import keep_likely, stream
from zoo.kernels.errors import ConfigError, DataError
from zoo.memory import PeakMemory

from ..test_contract import FORMS, make  # noqa: TID252  (tests are no package that could be named)
from .parity import copy_weights, randomise
from .test_parity_transformers import llama

VOCAB = 11
NAMES = [*zoo.list_models(), *FORMS]
RECURRENT = ["mamba", "mamba2", "rwkv4", "rwkv7"]


def prompts_of(sizes: list[int], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (size,), generator=generator) for size in sizes]


def left(prompts: list[Tensor], padding: int) -> tuple[Tensor, list[int]]:
    """The prompts in one array, and how long each is."""
    longest = max(map(len, prompts))
    rows = [torch.cat((torch.full((longest - len(prompt),), padding), prompt)) for prompt in prompts]
    return torch.stack(rows), list(map(len, prompts))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), chunk=st.integers(1, 50), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_argmax_of_the_whole_in_every_row(name: str, sizes: list[int], chunk: int, seed: int) -> None:
    model, prompts = make(name).double(), prompts_of(sizes, seed)
    array, lengths = left(prompts, padding=5)
    made = zoo.generate(model, array, lengths=lengths, max_new_tokens=6, temperature=0, prefill_chunk=chunk)
    assert made.shape == (len(sizes), max(sizes) + 6)
    for row, size in zip(made, sizes, strict=True):
        with torch.no_grad():
            own = row[max(sizes) - size :][None]
            assert torch.equal(model(own[:, :-1]).logits.argmax(-1)[0, -6:], own[0, -6:])


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_it_is_alone(name: str) -> None:
    """Draws, stop tokens and padding: neighbours change nothing."""
    model, prompts = make(name).double(), prompts_of([7, 1, 19, 12])
    choice = {"max_new_tokens": 15, "temperature": 1.3, "top_k": 8, "top_p": 0.95, "stop": [3, 7], "pad": -1}
    outlived = False
    for seed in (5, 50, 500):
        made = zoo.generate(model, prompts, seed=seed, prefill_chunk=4, **choice)
        sizes = []
        for row, prompt in enumerate(prompts):
            alone = zoo.generate(model, prompt, seed=seed + row, **choice)[0]
            padding, mine = made[row].split([19 - len(prompt), made.shape[1] - 19 + len(prompt)])
            assert (padding == -1).all()
            assert torch.equal(mine[: len(alone)], alone)
            assert (mine[len(alone) :] == -1).all()
            new = alone[len(prompt) :].tolist()
            assert not {3, 7} & set(new[:-1])
            assert len(new) == 15 or new[-1] in (3, 7)
            sizes.append(len(new))
        outlived |= any(size < max(sizes[row:]) for row, size in enumerate(sizes))
    assert outlived, "some row must go on after one above it has stopped, or this tests little"


def test_seeds_of_rows() -> None:
    model, prompt = make("mamba").double(), prompts_of([4])[0]
    same = zoo.generate(model, [prompt, prompt, prompt], max_new_tokens=30, seed=[9, 9, 10])
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    assert torch.equal(same[1:], zoo.generate(model, [prompt, prompt], max_new_tokens=30, seed=9))
    before = torch.get_rng_state()
    zoo.generate(model, prompt, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before), "no other random state is touched"


def test_draws_follow_the_probabilities() -> None:
    model, rows = make("mamba"), 4000
    prompt = prompts_of([6])[0]
    with torch.no_grad():
        logits = model(prompt[None]).logits[:, -1]
    token = next(stream(model, prompt.expand(rows, -1), max_new_tokens=1, temperature=0.7, top_k=6))
    expected = keep_likely(logits / 0.7, 6, None).softmax(-1)[0]
    counted = token.bincount(minlength=VOCAB) / rows
    assert (counted[expected == 0] == 0).all()
    # Five standard deviations of a share of 4000 draws.
    assert ((counted - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt() + 1e-9).all()


def test_finished_rows_leave_the_batch() -> None:
    model, read, rows = make("transformer"), zoo.Model.read, []
    prompts = prompts_of([5, 9, 3, 6])
    choice = {"max_new_tokens": 12, "seed": 2}
    free = zoo.generate(model, prompts, **choice)[:, 9:]
    stop = free[1, 4].item()
    stopped_at = [next((at for at, t in enumerate(row.tolist()) if t == stop), 12) for row in free]
    model.read = lambda tokens, *more: rows.append(tokens.shape) or read(model, tokens, *more)
    assert zoo.generate(model, prompts, stop=[stop], pad=0, **choice).shape[1] == 9 + min(12, max(stopped_at) + 1)
    steps = [(sum(at > step for at in stopped_at), 1) for step in range(min(11, max(stopped_at)))]
    assert [tuple(shape) for shape in rows] == [(4, 9), *steps]


def test_at_least_so_many_tokens() -> None:
    model, prompts = make("mamba"), prompts_of([3, 8] * 12)
    everything = list(range(1, VOCAB))  # all but 0 stop
    made = zoo.generate(model, prompts, max_new_tokens=9, min_new_tokens=5, stop=everything, pad=-1)[:, 8:]
    assert (made[:, :5] == 0).all()
    free = zoo.generate(model, prompts, max_new_tokens=9, stop=everything, pad=-1)[:, 8:]
    assert (free[:, :5] != 0).any()


@pytest.mark.parametrize("name", RECURRENT)
def test_memory_does_not_grow_on_a_recurrent_model(name: str, monkeypatch) -> None:
    model, held = zoo.create_model(name, vocab_size=VOCAB, d_model=16, n_layers=1), []
    read, memory = model.read, PeakMemory(torch.device("cpu"))

    def watched(*args):
        x, state = read(*args)
        held.append(zoo.state_bytes(state))
        return x, state

    monkeypatch.setattr(model, "read", watched)
    made = stream(model, torch.zeros(2, 100, dtype=torch.int64), max_new_tokens=2000, prefill_chunk=16)
    for at, _ in enumerate(made):
        if at == 200:  # pools have grown, code is loaded
            memory.reset()
            before = memory.bytes()
    assert len(held) == 7 + 1999
    assert len(set(held)) == 1
    # Keys and values of a Transformer would be no more; what a leaked step holds (hundreds of kilobytes) would be.
    assert memory.bytes() - before < 8 * 2**20


@pytest.fixture(scope="module", params=[None, 9], ids=["Llama", "Mistral"])
def pair(request):
    """The same weights in ours and in theirs."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "window": request.param}
    ours = zoo.create_model("transformer", vocab_size=53, **sizes)
    randomise(ours)
    theirs, sources = llama(ours)
    copy_weights(ours, theirs, sources)
    return ours.double().eval(), theirs.double().eval()


@pytest.mark.parametrize("ends", [[], [7, 20, 33]])
def test_greedy_with_padding_is_that_of_transformers(pair, ends: list[int]) -> None:
    ours, theirs = pair
    array, lengths = left(prompts_of([9, 2, 17, 5, 12]), padding=0)
    mask = (torch.arange(17) >= 17 - torch.tensor(lengths)[:, None]).long()
    more = {"eos_token_id": ends} if ends else {}
    expected = theirs.generate(array, attention_mask=mask, do_sample=False, max_new_tokens=25, pad_token_id=52, **more)
    actual = zoo.generate(ours, array, lengths=lengths, temperature=0, max_new_tokens=25, stop=ends, pad=52)
    assert torch.equal(actual, expected)
    assert not ends or (expected[:, 17:] == 52).any(), "some row must end, or this tests nothing"


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (9, 0.6), (100, 1.0)])
def test_processed_logits_are_those_of_transformers(pair, top_k: int | None, top_p: float | None) -> None:
    ours, theirs = pair
    prompt = torch.stack(prompts_of([9, 9, 9]))
    out = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=10,
        temperature=0.8,
        top_k=top_k or 0,
        top_p=top_p or 1.0,
        pad_token_id=52,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        logits = ours(out.sequences).logits[:, 8:-1]
    for step, expected in enumerate(out.scores):
        actual = keep_likely(logits[:, step] / 0.8, top_k, top_p)
        torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.05, 5), k=st.integers(1, 60), p=st.floats(0.01, 0.99))
def test_masks_are_those_of_transformers(seed: int, temperature: float, k: int, p: float) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = logits
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        expected = warper(None, expected)
    torch.testing.assert_close(keep_likely(logits / temperature, k, p), expected)


def refused(error: type[Exception], message: str, tokens, **settings) -> None:
    model = settings.pop("model", None) or make("mamba")
    for function in (zoo.generate, stream):  # at the call, before anything is made
        with pytest.raises(error, match=re.escape(message)) as caught:
            function(model, tokens, **{"max_new_tokens": 3} | settings)
        assert "\n" not in str(caught.value)


def test_bad_input_is_one_line() -> None:
    tokens = torch.randint(VOCAB, (2, 9))
    refused(DataError, "an empty prompt: expected at least one token", tokens[:, :0])
    refused(DataError, "an empty prompt: expected at least one token", [[1, 2], []])
    refused(DataError, "an empty list of prompts", [])
    refused(DataError, "expected integer ids of shape (batch, time)", tokens.float())
    refused(DataError, "expected integer ids of shape (time,)", [[[1, 2]]])
    refused(DataError, "token id 11 is outside the vocabulary 0..10", [[1, 11]])
    refused(ConfigError, "stop token 11 is outside the vocabulary 0..10", tokens, stop=[1, 11])
    refused(ConfigError, "stop token -1 is outside the vocabulary", tokens, stop=[-1])
    refused(ConfigError, "max_new_tokens=-1 is not valid", tokens, max_new_tokens=-1)
    refused(ConfigError, "min_new_tokens=4 is not valid: expected 0 to max_new_tokens", tokens, min_new_tokens=4)
    refused(ConfigError, "prefill_chunk=0 is not valid", tokens, prefill_chunk=0)
    refused(ConfigError, "temperature=-1 is not valid", tokens, temperature=-1)
    refused(ConfigError, "top_k=0 is not valid", tokens, top_k=0)
    refused(ConfigError, "top_p=1.5 is not valid", tokens, top_p=1.5)
    refused(ConfigError, "3 seeds for 2 prompts", tokens, seed=[1, 2, 3])
    refused(ConfigError, "seed=-1 is not valid", tokens, seed=-1)
    for lengths in ([0, 9], [1, 10], [3], [1.5, 2.0]):
        refused(
            DataError, "do not fit prompts of shape (2, 9): expected 2 integers from 1 to 9", tokens, lengths=lengths
        )
    refused(DataError, "a list of prompts has lengths of its own", [[1], [2]], lengths=[1, 1])
    few = make("transformer", max_positions=10)
    refused(DataError, "a prompt of 9 tokens and 3 new ones do not fit max_positions=10", tokens, model=few)
    assert zoo.generate(few, tokens, max_new_tokens=2).shape == (2, 11)
    both = make("mamba", causal=False)
    refused(ConfigError, "causal=false and so no state", tokens, model=both)


def test_tiny_temperatures_choose_the_most_likely_and_no_number_is_refused() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("transformer", vocab_size=16, d_model=16)
    prompt = torch.randint(16, (2, 5))
    coldest = zoo.generate(model, prompt, max_new_tokens=4, temperature=0)
    assert torch.equal(zoo.generate(model, prompt, max_new_tokens=4, temperature=1e-40), coldest)
    assert torch.equal(zoo.generate(model, prompt.int(), max_new_tokens=4, temperature=0, stop=()), coldest)
    for temperature in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ConfigError, match=r"temperature=.* is not valid"):
            zoo.generate(model, prompt, max_new_tokens=1, temperature=temperature)
    with pytest.raises(ConfigError, match="all tokens are stop tokens"):
        zoo.generate(model, prompt, max_new_tokens=2, min_new_tokens=1, stop=range(16))


def test_padding_may_be_longer_than_the_learned_positions() -> None:
    torch.manual_seed(0)
    model = zoo.create_model("transformer", vocab_size=16, d_model=16, rotary=False, max_positions=16)
    prompts = torch.randint(16, (2, 40))
    together = zoo.generate(model, prompts, lengths=[3, 14], max_new_tokens=2, temperature=0)
    for row, length in enumerate((3, 14)):
        alone = zoo.generate(model, prompts[row : row + 1, -length:], max_new_tokens=2, temperature=0)
        assert torch.equal(together[row, -2:], alone[0, -2:])
