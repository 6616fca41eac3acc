"""Cache policies against the same rule applied token by token with dense attention, in float64.

Letters: B batch, T time, H query heads, G key/value heads, K head width.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo
from zoo.kernels.errors import ConfigError, DataError
from zoo.layers.cache import CachedAttention
from zoo.layers.rotary import Rotary

from .largest import Largest
from .parity import randomise

WIDTH = 4
ORIGINAL = 6
SCALINGS: dict[str, dict[str, Any] | None] = {
    "no positions": None,
    "plain": {},
    "yarn": {"type": "yarn", "factor": 3.0, "original_length": ORIGINAL, "beta_fast": 2.0, "beta_slow": 0.2},
    "dynamic": {"type": "dynamic", "factor": 2.0, "original_length": ORIGINAL},
    "longrope": {
        "type": "longrope",
        "factor": 4.0,
        "original_length": ORIGINAL,
        "short_factor": [1.0, 1.5],
        "long_factor": [1.5, 4.0],
    },
}


def make(n_heads: int = 4, n_kv_heads: int = 2, scaling: str = "plain", **more: Any) -> zoo.Model:
    values = SCALINGS[scaling]
    rope = {"rotary": False} if values is None else {"rope_scaling": values, "rope_base": 20.0}
    sizes = {"vocab_size": 13, "d_model": n_heads * WIDTH, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    model = zoo.create_model("transformer", **sizes | rope | more)
    randomise(model)
    return model.double().eval()


@st.composite
def situations(draw) -> dict[str, Any]:
    """Tokens in documents, differently in each row, read in chunks."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 34))
    n_kv_heads = draw(st.integers(1, 2))
    begins = [sorted({0, *draw(st.lists(st.integers(0, length - 1), max_size=3))}) for _ in range(batch)]
    ids = torch.stack([(torch.arange(length)[:, None] >= torch.tensor(row)).sum(1) for row in begins])
    cuts = draw(st.one_of(st.just(range(1, length)), st.sets(st.integers(1, length), max_size=6)))
    return {
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.integers(1, 3)),
        "scaling": draw(st.sampled_from(list(SCALINGS))),
        "ids": ids,
        "edges": sorted({0, *cuts, length}),
        "seed": draw(st.integers(0, 999)),
    }


def read(mixer: CachedAttention, x: Tensor, ids: Tensor, edges: list[int]) -> Tensor:
    """Reads x (B, T, D) in chunks, as the shell does."""
    state = mixer.init_state(x.shape[0], dtype=torch.float64)
    parts = []
    for begin, end in pairwise(edges):
        if begin:
            state = mixer.reset_state(state, ids[:, begin] != ids[:, begin - 1])
        y, state = mixer(x[:, begin:end], state, ids[:, begin:end])
        parts.append(y)
        assert all(t.shape[0] == x.shape[0] for t in state)
    return torch.cat(parts, dim=1)


def project(mixer: CachedAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one document, (n, H, K) each: keys and values of each query head's group."""
    qk, v = mixer._project(x[None])
    q, k = qk[0].split([mixer.n_heads, mixer.n_kv_heads], dim=1)
    per_group = mixer.n_heads // mixer.n_kv_heads
    return q, k.repeat_interleave(per_group, dim=1), v[0].repeat_interleave(per_group, dim=1)


def logits_at(rotary: Rotary | None, q: Tensor, k: Tensor, distances: Tensor, length: int) -> Tensor:
    """Logits (H, n) of one query (H, K) with keys (n, H, K) that stand `distances` (n,) before it."""
    q = q.expand_as(k)
    if rotary is not None:
        lengths = torch.tensor([length])
        q, k = rotary(q[None], distances, lengths)[0], rotary(k[None], torch.zeros_like(distances), lengths)[0]
    return (q * k).sum(-1).T * WIDTH**-0.5


def dense_streaming(mixer: CachedAttention, x: Tensor, sinks: int, window: int) -> Tensor:
    """What each token of one document, x (n, D), gets by the rule."""
    q, k, v = project(mixer, x)
    drawn = []
    for t in range(len(x)):
        seen = torch.tensor([j for j in range(t + 1) if j < sinks or j > t - window])
        distances = torch.where(seen > t - window, t - seen, min(t, sinks + window - 1) - seen)
        shares = logits_at(mixer.rotary, q[t], k[seen], distances, min(t + 1, sinks + window)).softmax(-1)
        drawn.append(torch.einsum("hn,nhk->hk", shares, v[seen]))
    return mixer.out_proj(torch.stack(drawn).flatten(1))


def documents_of(ids: Tensor) -> list[tuple[int, Tensor]]:
    """Row and times of each document."""
    return [(row, (ids[row] == i).nonzero()[:, 0]) for row in range(len(ids)) for i in ids[row].unique()]


@torch.no_grad()
def check_streaming(situation: dict[str, Any], name: str, sinks: int, window: int) -> None:
    s = situation
    torch.manual_seed(s["seed"])
    model = make(s["n_heads"], s["n_kv_heads"], s["scaling"], n_layers=1)
    zoo.set_cache(model, name, **({"sinks": sinks} if name == "streaming" else {}), window=window)
    mixer = model.mixers()[0][0]
    x = torch.randn(*s["ids"].shape, model.config.d_model, dtype=torch.float64)
    y = read(mixer, x, s["ids"], s["edges"])
    for row, times in documents_of(s["ids"]):
        expected = dense_streaming(mixer, x[row, times], sinks, window)
        torch.testing.assert_close(y[row, times], expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(situations(), st.integers(0, 4), st.integers(0, 9))
def test_streaming_is_its_rule(situation: dict[str, Any], sinks: int, more: int) -> None:
    check_streaming(situation, "streaming", sinks, max(1, sinks + more))


@settings(max_examples=30, deadline=None)
@given(situations(), st.integers(1, 12))
def test_window_is_its_rule(situation: dict[str, Any], window: int) -> None:
    check_streaming(situation, "window", 0, window)


def dense_h2o(
    mixer: CachedAttention, x: Tensor, edges: list[int], recent: int | float, heavy: int | float
) -> tuple[Tensor, list[dict[int, float]]]:
    """What each token of one document, x (n, D), gets by the rule, calls ending at `edges`, and the scores kept."""
    q, k, v = project(mixer, x)
    per_group = mixer.n_heads // mixer.n_kv_heads
    drawn = torch.zeros_like(q)
    n_recent = max(1, round(recent * edges[1])) if isinstance(recent, float) else recent
    n_heavy = round(heavy * edges[1]) if isinstance(heavy, float) else heavy
    kept: list[dict[int, float]] = [{} for _ in range(mixer.n_kv_heads)]
    for begin, end in pairwise(edges):
        for group, scores in enumerate(kept):
            old = list(scores)
            scores |= dict.fromkeys(range(begin, end), 0.0)
            heads = slice(group * per_group, (group + 1) * per_group)
            for t in range(begin, end):
                seen = torch.tensor([*old, *range(begin, t + 1)])
                shares = logits_at(mixer.rotary, q[t, heads], k[seen, heads], t - seen, end).softmax(-1)
                drawn[t, heads] = torch.einsum("hn,nhk->hk", shares, v[seen, heads])
                for j, share in zip(seen.tolist(), shares.sum(0).tolist(), strict=True):
                    scores[j] += share
            older = sorted((j for j in scores if j < end - n_recent), key=lambda j: -scores[j])
            for j in older[n_heavy:]:
                del scores[j]
    return mixer.out_proj(drawn.flatten(1)), kept


@settings(max_examples=60, deadline=None)
@given(
    situations(),
    st.one_of(st.integers(1, 8), st.sampled_from([0.1, 0.5, 1.0])),
    st.one_of(st.integers(0, 6), st.sampled_from([0.0, 0.2, 0.5])),
)
@torch.no_grad()
def test_h2o_is_its_rule(s: dict[str, Any], recent: int | float, heavy: int | float) -> None:
    torch.manual_seed(s["seed"])
    model = make(s["n_heads"], s["n_kv_heads"], s["scaling"], n_layers=1)
    zoo.set_cache(model, "h2o", recent=recent, heavy=heavy)
    mixer = model.mixers()[0][0]
    x = torch.randn(*s["ids"].shape, model.config.d_model, dtype=torch.float64)
    y = read(mixer, x, s["ids"], s["edges"])
    for row, times in documents_of(s["ids"]):
        first, last = int(times[0]), int(times[-1]) + 1
        edges = sorted({0, last - first, *(edge - first for edge in s["edges"] if first < edge < last)})
        expected, _ = dense_h2o(mixer, x[row, times], edges, recent, heavy)
        torch.testing.assert_close(y[row, times], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_h2o_keeps_the_keys_and_scores_of_its_rule(monkeypatch) -> None:
    monkeypatch.setattr("zoo.layers.heavy_hitters.LOGITS", 200)  # several blocks of queries
    model = make(n_layers=1)
    zoo.set_cache(model, "h2o", recent=3, heavy=4)
    mixer = model.mixers()[0][0]
    x, edges = torch.randn(2, 30, 16, dtype=torch.float64), [0, 12, 13, 20, 30]
    state = mixer.init_state(2, dtype=torch.float64)
    for begin, end in pairwise(edges):
        y, state = mixer(x[:, begin:end], state)
    for row in range(2):
        expected, kept = dense_h2o(mixer, x[row], edges, 3, 4)
        torch.testing.assert_close(y[row], expected[20:], rtol=1e-10, atol=1e-10)
        for group, scores in enumerate(kept):
            places = state.places[row, :, group].tolist()
            assert sorted(places) == sorted(scores)
            torch.testing.assert_close(state.scores[row, :, group].tolist(), [scores[j] for j in places])


POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("window", {"window": 9}),
    ("window", {"window": 1}),
    ("streaming", {"sinks": 3, "window": 7}),
    ("streaming", {"sinks": 1, "window": 1}),
    ("h2o", {"recent": 5, "heavy": 4}),
    ("h2o", {"recent": 0.25, "heavy": 0.1}),
]
each_policy = pytest.mark.parametrize(("name", "values"), POLICIES, ids=[f"{n} {v}" for n, v in POLICIES])


def in_pieces(model: zoo.Model, tokens: Tensor, cuts: list[int], ids: Tensor | None = None) -> Tensor:
    state, parts = model.init_state(tokens.shape[0]), []
    for begin, end in pairwise([0, *cuts, tokens.shape[1]]):
        out = model(tokens[:, begin:end], state=state, segment_ids=None if ids is None else ids[:, begin:end])
        state = out.state
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("name", "values"), [p for p in POLICIES if p[0] in ("window", "streaming")])
@torch.no_grad()
def test_a_model_reads_chunks_as_it_reads_tokens(name: str, values: dict[str, Any], scaling: str) -> None:
    model, tokens = make(scaling=scaling), torch.randint(13, (2, 60))
    zoo.set_cache(model, name, **values)
    ids = torch.stack((torch.arange(60) // 41, torch.arange(60) // 27))
    one_by_one = in_pieces(model, tokens, list(range(1, 60)), ids)
    for cuts in ([], [1, 40, 41], [13, 27, 50]):
        torch.testing.assert_close(in_pieces(model, tokens, cuts, ids), one_by_one, rtol=1e-9, atol=1e-9)
    alone = values["window"] == 1 and name == "window"  # each token sees itself only
    assert alone or (in_pieces(model, tokens, [], None) - one_by_one).abs().max() > 1e-3, "documents matter"
    assert (model(tokens, segment_ids=ids).logits - one_by_one).abs().max() > 1e-3, "the policy matters"


@each_policy
@torch.no_grad()
def test_what_fits_into_the_cache_is_read_as_ever(name: str, values: dict[str, Any]) -> None:
    model = make()
    length = {"full": 50, "window": values.get("window"), "streaming": 0, "h2o": values.get("recent")}[name]
    length = values["sinks"] + values["window"] if name == "streaming" else length if isinstance(length, int) else 20
    tokens = torch.randint(13, (2, length))
    expected = model(tokens).logits
    zoo.set_cache(model, name, **values)
    cuts = [] if isinstance(values.get("recent"), float) else list(range(1, length))
    torch.testing.assert_close(in_pieces(model, tokens, cuts), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(tokens).logits, expected), "without a state attention is what it was"
    zoo.set_cache(model, "full")
    torch.testing.assert_close(in_pieces(model, tokens, cuts), expected, rtol=1e-9, atol=1e-9)


@each_policy
@torch.no_grad()
def test_memory_is_as_declared_and_bounded(name: str, values: dict[str, Any]) -> None:
    model, seen = make().float(), 0
    zoo.set_cache(model, name, **values)
    state = model.init_state(3)
    sizes = []
    for more in (16, 1, 40, 3, 100):
        state = model(torch.randint(13, (3, more)), state=state).state
        seen += more
        held = [t for layer in state.layers for s in layer for t in s]
        prompt = 16 if isinstance(values.get("recent"), float) else seen  # shares are those of the first call
        assert sum(t.numel() for t in held) + 6 == 3 * model.state_size(prompt)
        assert zoo.state_bytes(state) == sum(t.numel() * t.element_size() for t in (*held, *state[1:]))
        sizes.append(zoo.state_bytes(state))
    assert name == "full" or sizes[-1] == sizes[2]


@each_policy
@torch.no_grad()
def test_rows_do_not_see_each_other(name: str, values: dict[str, Any]) -> None:
    model, tokens = make(), torch.randint(13, (3, 40))
    zoo.set_cache(model, name, **values)
    ids = torch.stack([(torch.arange(40) >= begin).long() for begin in (9, 40, 30)])
    together = in_pieces(model, tokens, [20, 21, 33], ids)
    for row in range(3):
        alone = in_pieces(model, tokens[row : row + 1], [20, 21, 33], ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)


@each_policy
@torch.no_grad()
def test_a_new_document_begins_with_an_empty_memory(name: str, values: dict[str, Any]) -> None:
    model, tokens = make(), torch.randint(13, (2, 50))
    zoo.set_cache(model, name, **values)
    ids = (torch.arange(50) >= 24).long().expand(2, -1)
    packed = in_pieces(model, tokens, [10, 24, 30, 31], ids)
    alone = in_pieces(model, tokens[:, 24:], [6, 7])
    torch.testing.assert_close(packed[:, 24:], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_streaming_two_million_tokens_on_is_the_same_in_fp32() -> None:
    model = make(n_layers=1).float()
    zoo.set_cache(model, "streaming", sinks=2, window=5)
    mixer, shift = model.mixers()[0][0], 2_000_000
    state = model(torch.randint(13, (1, 30)), state=model.init_state(1)).state
    (kept, nothing), follow = state.layers[0], torch.randint(13, (1, 8))
    # The cache is full, so that sinks stand as far from the query here as there; recent keys turn with it.
    turned = mixer.rotary(kept.k.double(), torch.tensor([shift])).float()
    later = kept._replace(k=turned, position=kept.position + shift)
    near, far = (model(follow, state=state._replace(layers=((s, nothing),))).logits for s in (kept, later))
    # fp32 angles would be wrong by up to 0.06.
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-5 * near.abs().max().item())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("name", "values"), [("window", {"window": 9}), ("streaming", {"sinks": 3, "window": 7})])
@torch.no_grad()
def test_a_chunk_takes_memory_linear_in_its_length(name: str, values: dict[str, Any], documents: bool) -> None:
    model, sizes = make(n_layers=1), []
    zoo.set_cache(model, name, **values)
    for length in (1000, 4000):
        ids = torch.arange(length)[None] // 300 if documents else None
        with Largest() as largest:
            model(torch.randint(13, (1, length)), state=model.init_state(1), segment_ids=ids)
        sizes.append(largest.size)
    assert sizes[1] <= 4.1 * sizes[0]


@torch.no_grad()
def test_h2o_reads_a_chunk_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr("zoo.layers.heavy_hitters.LOGITS", 1 << 16)
    model = make(n_layers=1)
    zoo.set_cache(model, "h2o", recent=8, heavy=8)
    with Largest() as largest:
        model(torch.randint(13, (1, 1000)), state=model.init_state(1))
    assert largest.size <= 1 << 17  # and not the 4,000,000 logits of four heads


def test_only_the_transformers_of_a_hybrid_change() -> None:
    model = zoo.create_model("hybrid", vocab_size=11, d_model=16, pattern=["transformer", "mamba", "longformer"])
    zoo.set_cache(model, "h2o", recent=4, heavy=4)
    assert [type(layer[0]).__name__ for layer in model.init_state(1).layers] == [
        "HeavyHitterState",
        "MambaState",
        "LongformerState",
    ]
    made = zoo.generate(model, torch.randint(11, (2, 9)), max_new_tokens=5, temperature=0)
    assert made.shape == (2, 14)


def test_a_policy_is_not_for_training_and_its_state_is_its_own() -> None:
    model, tokens = make(), torch.randint(13, (1, 5))
    before = model.init_state(1)
    zoo.set_cache(model, "window", window=3)
    with pytest.raises(DataError, match="the state is a KVCache, of another model or cache"):
        model(tokens, state=before)
    with pytest.raises(ConfigError, match="cache policies have no gradients: read under"):
        model(tokens, state=model.init_state(1))


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("windw", {}, "no cache 'windw': did you mean 'window'"),
        ("window", {"window": 0}, "cache.window=0 is not valid: expected at least 1"),
        ("streaming", {"sinks": 4, "window": 3}, "cache.window=3 is not valid: .* smaller than its sinks"),
        ("streaming", {"sinks": -1}, "cache.sinks=-1 is not valid: expected at least 0"),
        ("streaming", {"sink": 4}, "cache 'streaming' has no setting 'sink': did you mean 'sinks'"),
        ("h2o", {"recent": 0}, "cache.recent=0 is not valid: expected a number from 1 to"),
        ("h2o", {"heavy": 10**30}, "expected a number from 0 to"),
        ("window", {"window": 10**30}, "expected at most"),
        ("streaming", {"sinks": 10**9, "window": 10**9}, "expected at most"),
        ("window", {"name": "x"}, "cache 'window' has no setting 'name'"),
        (None, {}, "no cache 'None'"),
        ("h2o", {"recent": 1.5}, "cache.recent=1.5 is not valid: expected a whole number"),
        ("h2o", {"heavy": -0.1}, "cache.heavy=-0.1 is not valid: expected a whole number"),
        ("h2o", {"heavy": "much"}, "cache.heavy='much' is not valid: expected an integer or a number"),
        ("full", {"window": 3}, "cache 'full' has no setting 'window'"),
    ],
)
def test_bad_settings_are_one_line(name: str, values: dict[str, Any], line: str) -> None:
    model = make()
    with pytest.raises(ConfigError, match=line) as caught:
        zoo.set_cache(model, name, **values)
    assert "\n" not in str(caught.value)
    assert model.mixers()[0][0].policy is None


@pytest.mark.parametrize(
    ("arch", "more", "line"),
    [
        ("mamba", {}, "this mamba has no cache to choose: only the attention of a transformer"),
        ("longformer", {}, "this longformer has no cache to choose"),
        ("hybrid", {"pattern": ["mamba"]}, "this hybrid has no cache to choose"),
        ("transformer", {"causal": False}, "this transformer has causal=false and so no cache"),
        ("transformer", {"window": 8}, "this transformer keeps its own window only"),
    ],
)
def test_models_without_such_a_cache_are_one_line(arch: str, more: dict[str, Any], line: str) -> None:
    model = zoo.create_model(arch, vocab_size=11, d_model=16, **more)
    with pytest.raises(ConfigError, match=line):
        zoo.set_cache(model, "h2o")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("window", {"window": 8}), ("window", {"window": 20})),
        (("window", {"window": 20}), ("window", {"window": 8})),
        (("window", {"window": 8}), ("streaming", {"sinks": 4, "window": 8})),
        (("streaming", {"sinks": 4, "window": 8}), ("window", {"window": 8})),
        (("h2o", {"recent": 4, "heavy": 4}), ("h2o", {"recent": 10, "heavy": 10})),
    ],
)
def test_a_state_of_other_settings_is_refused(before, after) -> None:
    model = make()
    zoo.set_cache(model, before[0], **before[1])
    tokens = torch.randint(model.config.vocab_size, (2, 30))
    with torch.no_grad():
        state = model(tokens, state=model.init_state(2)).state
        zoo.set_cache(model, after[0], **after[1])
        with pytest.raises(DataError, match="of another model or cache"):
            model(tokens, state=state)
