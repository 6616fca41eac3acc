"""Landmark attention as a model: memory, retrieval and its places, against a dense definition in float64.

Letters: B batch, T tokens, S slots, C blocks, k blocks read, H query heads, K head width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.architectures.landmark import Landmark
from zoo.kernels.errors import ConfigError, DataError
from zoo.layers import landmark_retrieval
from zoo.layers.landmark_tokens import LandmarkTokens
from zoo.layers.rotary import rotate

from .largest import Largest

BLOCK, VOCAB = 4, 11


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> zoo.Model:
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "d_model": 24, "n_layers": 2, "block_size": BLOCK, "n_kv_heads": 2} | settings
    model = zoo.create_model("landmark", **settings).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def tokens_of(batch: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def in_pieces(model: zoo.Model, tokens: Tensor, sizes: list[int], ids: Tensor | None = None) -> tuple[Tensor, Any]:
    state, logits, begin = model.init_state(tokens.shape[0]), [], 0
    for size in sizes:
        piece = slice(begin, begin + size)
        out = model(tokens[:, piece], state=state, segment_ids=None if ids is None else ids[:, piece])
        state, begin = out.state, begin + size
        logits.append(out.logits)
    return torch.cat(logits, dim=1), state


def turned(x: Tensor, place: int) -> Tensor:
    """x (..., K) rotated as in slot and place `place`, written again."""
    half = x.shape[-1] // 2
    angle = place * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)


AGING = 2.0**-16  # too little to matter, and enough to decide between equals


def by_definition(mixer: Landmark, x: Tensor, top_k: int, kind: str) -> tuple[Tensor, Tensor]:
    """What one layer makes of the slots of one document (S, D), query by query; and which blocks were read."""
    H, G, K, size = mixer.n_heads, mixer.n_kv_heads, mixer.head_dim, BLOCK + 1
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (-1, K)).split([H, G, G], dim=1)
    k, v = (y.repeat_interleave(H // G, dim=1) for y in (k, v))  # (S, H, K)
    drawn, read = torch.zeros_like(q), torch.full((len(x), H, top_k), -1)
    for i in range(len(x)):
        n, offset = divmod(i, size)  # blocks before, place in the own one
        few = n > top_k
        at = (top_k + 1 if few else n) * size + offset
        scores = torch.full((H, n), -torch.inf, dtype=x.dtype)
        slots = [max(0, m - (n - top_k) + 1) if few else m for m in range(n)]
        for m in range(n):
            key = turned(k[m * size + BLOCK], slots[m] * size + BLOCK)
            scores[:, m] = (turned(q[i], at) * key).sum(-1) * K**-0.5 - AGING * (n - m)
        if kind == "token":
            scores = scores.log_softmax(-1).amax(0, keepdim=True).expand(H, -1)
        for h in range(H):
            chosen = sorted(scores[h].topk(min(top_k, n)).indices.tolist()) if n else []
            read[i, h, : len(chosen)] = torch.tensor(chosen)
            query = turned(q[i, h], at)
            own = range(n * size, n * size + min(offset + 1, BLOCK))
            logits = [query @ turned(k[j, h], at - offset + j - n * size) * K**-0.5 for j in own]
            values = [v[j, h] for j in own]
            for rho, m in enumerate(chosen):
                slot = rho + (few and slots[m] > 0)
                keys = [turned(k[m * size + u, h], slot * size + u) for u in range(size)]
                inner = torch.stack([query @ key * K**-0.5 for key in keys[:-1]]).softmax(0)
                logits.append(query @ keys[-1] * K**-0.5)
                values.append(inner @ v[m * size : m * size + BLOCK, h])
            drawn[i, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return mixer.out_proj(drawn.flatten(1)), read


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize(("top_k", "numbers"), [(1, 1 << 22), (3, 1 << 22), (3, 5000), (50, 1 << 22)])
def test_retrieval_is_as_defined(top_k: int, numbers: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landmark_retrieval, "NUMBERS", numbers)  # of queries at a time
    model = make(top_k=top_k, retrieval=kind, n_layers=1)
    mixer: Any = model.mixers()[0][0]
    shared: dict[str, Any] = {"diagnostics": {}}
    with torch.no_grad():
        wrapper: Any = model.wrapper
        x = torch.randn(2, 33, 24, dtype=torch.float64)
        x, _ = wrapper.insert(x, torch.arange(33).expand(2, -1), None, shared, carried=False)
        x = torch.randn_like(x)  # landmarks that differ
        y, _ = mixer(x, None, None, shared)
        for row in range(2):
            expected, read = by_definition(mixer, x[row], top_k, kind)
            torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-9)
            read = read[shared["landmarks"].at[row]]
            found = shared["diagnostics"]["retrieved/0"][row]
            read = read[:, 0] if kind == "token" else read
            assert torch.equal(found, read[..., : found.shape[-1]])
            assert (read[..., found.shape[-1] :] == -1).all()


def test_frozen_models_read_few_blocks_too() -> None:
    """It is gradients of its own that a layer needs all blocks for, and not that others record theirs."""
    model, tokens = make(top_k=1), torch.randint(VOCAB, (1, 40))
    whole = model(tokens).logits
    assert whole.requires_grad
    few = model.requires_grad_(False)(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(few, model(tokens).logits, rtol=0, atol=0)
    assert not torch.allclose(few, whole)


def test_rotation_of_the_definition_is_that_of_the_model() -> None:
    mixer: Any = make().mixers()[0][0]
    x = torch.randn(1, 5, 1, 6, dtype=torch.float64)
    cos, sin = mixer.rotary.angles(torch.arange(5), None, torch.float64)
    expected = torch.stack([turned(x[0, i], i) for i in range(5)])[None]
    torch.testing.assert_close(rotate(x, cos[:, None], sin[:, None]), expected)


YARN = {"type": "yarn", "factor": 4.0, "original_length": 16}  # raises what it rotates, once
PIECES: list[dict[str, Any]] = [
    {},
    {"rope_scaling": YARN},
    {"top_k": 2},
    {"top_k": 3, "retrieval": "token"},
    {"top_k": 1, "rotary": False},
    {"top_k": 2, "local_layers": 1},
]


@pytest.mark.parametrize("settings", PIECES)
def test_pieces_do_not_matter(settings: dict[str, Any]) -> None:
    model, tokens = make(**settings), tokens_of(2, 50)
    ids = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(n)) for n in ([20, 1, 29], [7, 40, 3])])
    with torch.no_grad():
        for given in (None, ids):
            whole = model(tokens, segment_ids=given).logits
            for sizes in ([50], [21, 9, 20], [1] * 50):
                torch.testing.assert_close(in_pieces(model, tokens, sizes, given)[0], whole, rtol=1e-9, atol=1e-9)
        for row in range(2):
            for n in range(3):
                alone = model(tokens[row : row + 1, ids[row] == n]).logits[0]
                torch.testing.assert_close(whole[row, ids[row] == n], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", [{}, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("kind", ["head", "token"])
def test_reading_all_blocks_is_full_attention(kind: str, scaling: dict[str, Any]) -> None:
    model, tokens = make(torch.float32, rope_scaling=scaling), tokens_of(2, 50)
    with torch.no_grad():
        full = model(tokens).logits
        zoo.set_cache(model, "landmark", top_k=12, retrieval=kind)
        some = model(tokens).logits
        pieces, _ = in_pieces(model, tokens, [30, 20])
        zoo.set_cache(model, "landmark", top_k=11)
        fewer = model(tokens).logits
    assert (some - full).abs().max() < 1e-5 * full.abs().max()
    assert (pieces - full).abs().max() < 1e-5 * full.abs().max()
    assert torch.equal((fewer - full).abs().amax((0, 2)) > 1e-4, torch.arange(50) >= 48)


def test_training_reads_all_blocks_whatever_is_chosen() -> None:
    tokens = tokens_of(2, 30)
    full, few = (make(top_k=top_k)(tokens).logits for top_k in (None, 1))
    assert torch.equal(full, few)
    model = make(top_k=1)
    carried, _ = in_pieces(model, tokens, [13, 17])
    torch.testing.assert_close(carried, full)
    with torch.no_grad():
        assert (model(tokens).logits - full).abs().max() > 1e-3


def test_landmarks_are_seen_by_nobody_outside() -> None:
    model, tokens = make(), tokens_of(1, 12)
    assert model.embedding.num_embeddings == VOCAB
    assert model(tokens).logits.shape == (1, 12, VOCAB)
    before = model(tokens).logits
    wrapper: Any = model.wrapper
    with torch.no_grad():
        wrapper.embedding.weight.add_(1.0)
    moved = (model(tokens).logits - before).abs().amax((0, 2))
    assert torch.equal(moved > 1e-6, torch.arange(12) >= BLOCK), "a landmark weighs from the block after its own"


@pytest.mark.parametrize("causal", [True, False])
def test_local_layers_see_their_own_block(causal: bool) -> None:
    model, tokens = make(n_layers=1, local_layers=1, causal=causal), tokens_of(1, 14)
    for at in (1, 9, 13):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        moved = (model(changed).logits - model(tokens).logits).abs().amax((0, 2)) > 1e-6
        seen = torch.arange(14) // BLOCK == at // BLOCK
        assert torch.equal(moved, seen & (torch.arange(14) >= at) if causal else seen)
    if causal:
        held = in_pieces(model, tokens, [9, 5])[1].layers[0][0]
        assert [part.shape[1] for part in held] == [0, 0, 0, 2, 2], "no block is kept, but the one that is not whole"


def test_slots() -> None:
    tokens, both_ways = LandmarkTokens(3, 2, True), LandmarkTokens(3, 2, False)
    shared: dict[str, Any] = {}
    positions = torch.tensor([[1, 2, 3, 0, 1], [0, 0, 1, 2, 0]])
    x, _ = tokens.insert(torch.arange(30.0).view(2, 5, 3), positions, None, shared, carried=True)
    slots = shared["landmarks"]
    assert slots.places.tolist() == [[1, 2, 3, 4, 5, 0, 1, 2], [0, 0, 1, 2, 3, 0, -1, -1]]
    assert slots.marks.int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert torch.equal(x[slots.marks], tokens.embedding.weight.expand(4, -1))
    assert torch.equal(tokens.remove(x, shared), torch.arange(30.0).view(2, 5, 3))
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]])
    _, read = both_ways.insert(torch.zeros(2, 5, 3), positions, ids, shared, carried=False)
    slots = shared["landmarks"]
    assert slots.places.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, -1], [0, 1, 0, 1, 2, 3, 4, 0, 1]]
    assert slots.ends.tolist() == [[5, 5, 5, 5, 5, 8, 8, 8, 9], [2, 2, 7, 7, 7, 7, 7, 9, 9]]
    assert read is not None
    assert read.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 2, 2]]


def test_whole_blocks_are_copied_when_one_is_added_only() -> None:
    model = make()
    with torch.no_grad():
        state = model(tokens_of(2, 9), state=model.init_state(2)).state
        held = state.layers[0][0]
        for added in (0, 0, 1):
            state = model(tokens_of(2, 1), state=state).state
            now = state.layers[0][0]
            assert (now.k.data_ptr() == held.k.data_ptr()) == (added == 0)
        assert now.k.shape[1] == 3


def test_blocks_of_older_documents_are_given_back() -> None:
    model = make()
    ids = torch.tensor([[0] * 20 + [1] * 7, [0] * 18 + [1] * 9])
    with torch.no_grad():
        state = in_pieces(model, tokens_of(2, 27), [15, 12], ids)[1].layers[0][0]
    assert state.k.shape[1] == 2
    assert state.last_k.shape[1] == 3
    assert zoo.state_bytes(state) == sum(x.numel() * x.element_size() for x in state)


def test_memory_device() -> None:
    model, tokens = make(top_k=2), tokens_of(2, 30)
    with torch.no_grad():
        expected = in_pieces(model, tokens, [11, 19])[0]
        zoo.set_cache(model, "landmark", top_k=2, memory_device="cpu")
        assert torch.equal(in_pieces(model, tokens, [11, 19])[0], expected)
    state = model.to("meta").init_state(2).layers[0][0]
    assert [x.device.type for x in state] == ["meta", "cpu", "cpu", "meta", "meta"]


def test_diagnostics() -> None:
    model, tokens = make(), tokens_of(2, 30)
    ids = (torch.arange(30) >= 13).long().expand(2, -1)
    weights = model.diagnose(tokens, segment_ids=ids)["landmark_weights/1"]
    assert weights.shape == (2, 30, 4, 5)
    before = torch.where(torch.arange(30) >= 13, torch.arange(30) - 13, torch.arange(30)) // BLOCK
    seen = torch.arange(5) < before[:, None]
    assert torch.equal((weights > 0).all(2), seen.expand(2, -1, -1))
    assert (weights.sum(-1) < 1).all(), "the own block has the rest"
    zoo.set_cache(model, "landmark", top_k=2)
    read = model.diagnose(tokens, segment_ids=ids)["retrieved/0"]
    assert read.shape == (2, 30, 4, 2)
    assert ((read < before[:, None, None]) & (read >= -1)).all()
    assert ((read >= 0).sum(-1) == before.clamp(max=2)[:, None]).all()
    # The same as of one read in pieces: numbers are those in the document.
    state = model(tokens[:, :20], state=model.init_state(2), segment_ids=ids[:, :20]).state
    later = model.diagnose(tokens[:, 20:], segment_ids=ids[:, 20:], state=state)["retrieved/0"]
    assert torch.equal(later, read[:, 20:])


@torch.no_grad()
def test_weights_shown_are_shares_of_the_softmax() -> None:
    model = make(n_layers=1, rotary=False)
    mixer: Any = model.mixers()[0][0]
    wrapper: Any = model.wrapper
    size = BLOCK + 1
    shared: dict[str, Any] = {"diagnostics": {}}
    x, _ = wrapper.insert(torch.randn(1, 19, 24).double(), torch.arange(19)[None], None, shared, carried=False)
    mixer(x, None, None, shared)
    weights = shared["diagnostics"]["landmark_weights/0"][0]  # (T, H, C)
    q, k, _ = mixer.qkv_proj(x[0]).unflatten(-1, (-1, 6)).split([4, 2, 2], dim=1)
    for time, i in enumerate(shared["landmarks"].at[0].tolist()):
        block, marks = i // size, list(range(BLOCK, i, size))
        keys = k[marks + list(range(block * size, i + 1))].repeat_interleave(2, dim=1)
        expected = torch.einsum("hk,jhk->hj", q[i], keys).mul(6**-0.5).softmax(-1)[:, :block]
        torch.testing.assert_close(weights[time, :, :block], expected)
        assert not weights[time, :, block:].any()


def test_weights_shown_do_not_depend_on_pieces() -> None:
    model, tokens = make(), tokens_of(2, 40)
    ids = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(n)) for n in ([3, 18, 19], [9, 30, 1])])
    state = model(tokens[:, :17], state=model.init_state(2), segment_ids=ids[:, :17]).state
    for layer in range(2):
        whole = model.diagnose(tokens, segment_ids=ids)[f"landmark_weights/{layer}"]
        later = model.diagnose(tokens[:, 17:], segment_ids=ids[:, 17:], state=state)[f"landmark_weights/{layer}"]
        torch.testing.assert_close(later, whole[:, 17:])


def test_what_is_shown_takes_memory_by_blocks_and_not_by_tokens() -> None:
    model, n_tokens, n_blocks = make(torch.float32, block_size=50, n_layers=1), 3_000, 60
    with Largest() as largest:
        model.diagnose(tokens_of(1, n_tokens))
    assert largest.size <= 4 * n_tokens * (n_blocks + 1)


def test_in_a_hybrid() -> None:
    settings = {"landmark": {"block_size": BLOCK}}
    model = zoo.create_model("hybrid", vocab_size=VOCAB, d_model=16, pattern=["mamba", "landmark"], members=settings)
    tokens, ids = tokens_of(2, 30), (torch.arange(30) >= 13).long().expand(2, -1)
    ragged = torch.stack((ids[0], torch.arange(30) // 9))
    with torch.no_grad():
        for given in (ids, ragged):
            packed = model(tokens, segment_ids=given).logits
            for row in range(2):
                for n in given[row].unique():
                    alone = model(tokens[row : row + 1, given[row] == n]).logits[0]
                    torch.testing.assert_close(packed[row, given[row] == n], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            in_pieces(model, tokens, [10, 20], ids)[0], model(tokens, segment_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
        with pytest.raises(DataError, match="read each row by itself"):
            in_pieces(model, tokens, [30], ragged)
    zoo.set_cache(model, "landmark", top_k=3)
    mixer: Any = model.mixers()[1][0]
    assert mixer.policy.top_k == 3


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"block_size": 0}, "block_size=0 is not valid: expected at least 1"),
        ({"top_k": 0}, "top_k=0 is not valid: expected at least 1"),
        ({"top_k": 2, "causal": False}, "top_k=2 is not valid: expected null where causal=false"),
        ({"retrieval": "block"}, "retrieval='block' is not valid"),
        ({"memory_device": "disk"}, "memory_device='disk' is not valid"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "trained_length": 8},
            "expected a type that does not depend on the length",
        ),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        zoo.create_model("landmark", vocab_size=VOCAB, **settings)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_one_line() -> None:
    model = make()
    with pytest.raises(ConfigError, match="no cache to choose: only the attention of a transformer"):
        zoo.set_cache(model, "h2o", recent=3)
    with pytest.raises(ConfigError, match="no cache to choose: only that of landmark"):
        zoo.set_cache(zoo.create_model("transformer", vocab_size=VOCAB), "landmark", top_k=2)
    with pytest.raises(ConfigError, match="no setting 'topk': did you mean 'top_k'"):
        zoo.set_cache(model, "landmark", topk=2)
    with pytest.raises(DataError, match="of another model or block_size"):
        model(tokens_of(2, 3), state=make(block_size=5).init_state(2))
    with pytest.raises(ConfigError, match="only its own model inserts"):
        model.mixers()[0][0](torch.zeros(1, 3, 24, dtype=torch.float64))
