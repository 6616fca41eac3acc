"""Compressive Transformer and Transformer-XL against their definition, segment after segment, in float64.

The definition is that of the papers (arXiv 1911.05507, 1901.02860): a memory and a compressed memory that a loop over
segments fills, one row and one document at a time.

Letters: B batch, T time, D d_model, H heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.architectures import compressive
from zoo.architectures.compressive import Compressive, CompressiveConfig
from zoo.architectures.transformer_xl import TransformerXL, TransformerXLConfig
from zoo.flops import count_flops
from zoo.kernels import sparse_attention
from zoo.kernels.errors import ConfigError

D, H = 12, 3
KINDS = ("max", "mean", "conv", "dilated", "most_used")
# segment, memory, compressed memory, rate: short first evictions, padding, memories shorter than a segment and none.
SIZES = [(4, 4, 3, 2), (5, 8, 7, 2), (6, 4, 2, 4), (7, 16, 9, 3), (3, 0, 4, 3), (4, 4, 40, 1)]


def make(sizes: tuple[int, int, int, int], kind: str, loss: str | None = None, **settings: Any) -> Compressive:
    segment, memory, compressed, rate = sizes
    config = CompressiveConfig(
        vocab_size=5, d_model=D, n_heads=H, segment=segment, memory=memory, compressed_memory=compressed, rate=rate,
        compression=kind, loss=loss, **settings,
    )  # fmt: skip
    return scrambled(Compressive(config, 0))


def make_xl(segment: int, memory: int) -> TransformerXL:
    config = TransformerXLConfig(vocab_size=5, d_model=D, n_heads=H, segment=segment, memory=memory)
    return scrambled(TransformerXL(config, 0))


def scrambled(layer: Any) -> Any:
    """In float64, with weights that make every part matter."""
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter, std=1.2 * parameter.shape[-1] ** -0.5)
    return layer


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D // H)).transpose(-2, -3)  # (..., H, T, K)


def sinusoid(distance: int) -> Tensor:
    rates = torch.tensor([10_000 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    return torch.cat((torch.sin(distance * rates), torch.cos(distance * rates)))


def compressed(layer: Compressive, kind: str, old: Tensor, shares: Tensor) -> Tensor:
    """f_c of (len, D), by torch's own pooling and convolutions; `shares` is the attention that each of them got."""
    rate = layer.rate
    if kind == "most_used":
        return old[shares.topk(-(-len(old) // rate)).indices.sort().values]
    x = F.pad(old, (0, 0, -len(old) % rate, 0)).T[None]  # (1, D, len)
    if kind == "max":
        return F.max_pool1d(x, rate)[0].T
    if kind == "mean":
        return F.avg_pool1d(x, rate)[0].T
    if kind == "dilated":
        for dilation, mix in zip((1, 2, 4), layer.compression.mix, strict=True):
            kernel = mix.weight.unflatten(1, (3, D)).transpose(1, 2)  # (D, D, 3)
            x = x + F.gelu(F.conv1d(x, kernel, dilation=dilation, padding=dilation))
    join = layer.compression.join if kind == "conv" else layer.compression.stride.join
    return F.conv1d(x, join.weight.unflatten(1, (rate, D)).transpose(1, 2), stride=rate)[0].T


def content(layer: Compressive, h: Tensor, memory: Tensor) -> Tensor:
    """att(h, memory) of the loss."""
    q, k, v = (
        heads(F.linear(x, w.detach())) for x, w in zip((h, memory, memory), layer.qkv_proj.weight.chunk(3), strict=True)
    )
    return (q @ k.mT / math.sqrt(D // H)).softmax(-1) @ v  # fmt: skip


def document(layer: Any, h: Tensor, kind: str | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """One document, (T, D): the update, the losses of its evictions, and the shares of attention, (H, 3)."""
    w_q, w_k, w_v = layer.qkv_proj.weight.chunk(3)
    memory, old_memory = h[:0].detach(), h[:0].detach()
    outputs, losses, masses = [], [], torch.zeros(H, 3, dtype=torch.float64)
    r = heads(F.linear(torch.stack([sinusoid(distance) for distance in range(100)]), layer.position_proj.weight))
    for begin in range(0, len(h), layer.segment):
        own = h[begin : begin + layer.segment]
        past = torch.cat((old_memory, memory))
        keys, values = (
            torch.cat((F.linear(past, w), F.linear(own, w))) for w in (w_k, w_v)
        )  # (slots, D); the past has no gradient of its own
        q, k, v = heads(F.linear(own, w_q)), heads(keys), heads(values)
        to_key = (q + layer.content_bias[:, None]) @ k.mT
        distances = len(past) + torch.arange(len(own))[:, None] - torch.arange(len(past) + len(own))
        by_slot = r[:, distances.clamp(min=0)]  # (H, own, slots, K)
        to_position = ((q + layer.position_bias[:, None])[:, :, None] * by_slot).sum(-1)
        logits = ((to_key + to_position) / math.sqrt(D // H)).masked_fill(distances < 0, -torch.inf)
        shares = logits.softmax(-1)
        outputs.append(F.linear((shares @ v).transpose(0, 1).flatten(1), layer.out_proj.weight))
        parts = shares.detach().sum(1).split([len(old_memory), len(memory), len(own)], dim=-1)
        masses += torch.stack([part.sum(-1) for part in parts], -1)
        if len(own) < layer.segment:
            break
        held = torch.cat((memory, own.detach()))
        evicted = max(0, len(held) - layer.memory)
        old, memory = held[:evicted], held[evicted:]
        if kind is None or not len(old):
            continue
        of_old = shares.detach().mean((0, 1))[len(old_memory) : len(old_memory) + len(old)]
        new = compressed(layer, kind, old, of_old)
        if layer.decoder is not None:
            rebuilt = F.linear(new, layer.decoder.weight).view(-1, D)[-len(old) :]
            losses.append((rebuilt - old).norm())
        else:
            losses.append((content(layer, own.detach(), old) - content(layer, own.detach(), new)).norm())
        old_memory = torch.cat((old_memory, new.detach()))[-layer.n_compressed :]
    return torch.cat(outputs), losses, masses / len(h)  # (T, D), (H, 3)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sizes", "loss"), [*((sizes, "reconstruction") for sizes in SIZES), (SIZES[1], "autoencoding")]
)
def test_the_definition(sizes: tuple[int, int, int, int], kind: str, loss: str) -> None:
    layer = make(sizes, kind, loss)
    for length in (1, 29, 4 * sizes[0]):  # the last one ends with a segment
        x = torch.randn(2, length, D, dtype=torch.float64, requires_grad=True)
        shared: dict[str, Any] = {"losses": {}, "diagnostics": {}}
        y, _ = layer(x, None, None, shared)
        by_hand = [document(layer, row, kind) for row in x]
        expected = torch.stack([row[0] for row in by_hand])
        close(y, expected)
        weight = torch.randn_like(y)
        wanted = gradients((expected * weight).sum(), x, *layer.parameters())
        for found, truth in zip(gradients((y * weight).sum(), x, *layer.parameters()), wanted, strict=True):
            close(found, truth)
        losses = [loss for row in by_hand for loss in row[1]]
        close(shared["losses"][loss], torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64))
        if losses and shared["losses"][loss].requires_grad:
            wanted = gradients(torch.stack(losses).mean(), x, *layer.parameters())
            for found, truth in zip(gradients(shared["losses"][loss], x, *layer.parameters()), wanted, strict=True):
                close(found, truth)
        close(shared["diagnostics"]["memory_mass/0"], torch.stack([row[2] for row in by_hand]))


@pytest.mark.parametrize(("segment", "memory"), [(4, 4), (5, 8), (7, 3), (3, 0), (1, 6)])
def test_transformer_xl(segment: int, memory: int) -> None:
    layer = make_xl(segment, memory)
    x = torch.randn(2, 29, D, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    expected = torch.stack([document(layer, row)[0] for row in x])
    close(y, expected)
    weight = torch.randn_like(y)
    wanted = gradients((expected * weight).sum(), x, *layer.parameters())
    for found, truth in zip(gradients((y * weight).sum(), x, *layer.parameters()), wanted, strict=True):
        close(found, truth)


def in_pieces(layer: Any, x: Tensor, cuts: list[int], ids: Tensor | None = None) -> tuple[Tensor, Any]:
    state = layer.init_state(len(x), dtype=x.dtype)
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if ids is not None and begin:
            state = layer.reset_state(state, ids[:, begin] != ids[:, begin - 1])
        y, state = layer(x[:, begin:end], state, None if ids is None else ids[:, begin:end], {})
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


LAYERS: list[tuple[str, Any]] = [
    ("xl", lambda: make_xl(5, 8)),
    ("xl without a memory", lambda: make_xl(3, 0)),
    *((kind, lambda kind=kind: make((5, 8, 7, 2), kind)) for kind in KINDS),
    ("short memory", lambda: make((6, 4, 2, 4), "conv")),
    ("no memory", lambda: make((3, 0, 4, 3), "dilated")),
    ("biases", lambda: make((4, 4, 3, 2), "conv", bias=True)),
]
CUTS = [[], [1, 2, 10], [7, 8, 17], list(range(1, 23))]
IDS = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in ([1, 17, 5], [14, 8, 1])])


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("build", [build for _, build in LAYERS], ids=[name for name, _ in LAYERS])
def test_any_cuts_give_the_whole_and_its_gradients(build: Any, ids: Tensor | None) -> None:
    layer = build()
    x = torch.randn(2, 23, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    whole, _ = layer(x, None, ids, {})
    wanted = gradients((whole * weight).sum(), x, *layer.parameters())
    follow, after = torch.randn(2, 9, D, dtype=torch.float64), []
    for cuts in CUTS:
        y, state = in_pieces(layer, x, cuts, ids)
        close(y, whole)
        # Gradients through a carried state reach the segment that goes on, and no memory, as in the whole.
        for found, truth in zip(gradients((y * weight).sum(), x, *layer.parameters()), wanted, strict=True):
            close(found, truth)
        after.append(layer(follow, state, None, {})[0])
        assert sum(part[0].numel() for part in state) == layer.state_size(23)
    for y in after[1:]:
        close(y, after[0])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_separate_ones(kind: str) -> None:
    layer = make((5, 8, 7, 2), kind)
    x = torch.randn(2, 23, D, dtype=torch.float64)
    packed, _ = layer(x, None, IDS, {})
    for row in range(2):
        for number in range(3):
            at = IDS[row] == number
            close(packed[row, at], document(layer, x[row, at], kind)[0])


@pytest.mark.parametrize("loss", ["reconstruction", "autoencoding"])
@pytest.mark.parametrize("kind", ["conv", "dilated"])
def test_who_learns_from_what(kind: str, loss: str) -> None:
    model = zoo.create_model(
        "compressive", vocab_size=7, d_model=D, n_heads=H, segment=4, memory=4, compressed_memory=4, rate=2,
        compression=kind, loss=loss,
    )  # fmt: skip
    tokens = torch.randint(7, (2, 23))
    out = model(tokens)
    assert out.losses.keys() == {loss}

    def taught(value: Tensor) -> set[str]:
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
        return {n for (n, _), g in zip(model.named_parameters(), grads, strict=True) if g is not None and g.any()}

    everything = {name for name, _ in model.named_parameters()}
    compression = {name for name in everything if ".compression." in name or ".decoder." in name}
    assert len(compression) == 2 * ((1 if kind == "conv" else 4) + (loss == "autoencoding"))
    assert taught(out.losses[loss]) == compression
    assert taught(out.logits.logsumexp(-1).sum()) == everything - compression


def test_the_loss_is_computed_by_the_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*args: Any, backend: str | None = None) -> Tensor:
        asked.append(backend)
        return sparse_attention(*args, backend=backend)

    monkeypatch.setattr(compressive, "sparse_attention", spy)
    model = zoo.create_model(
        "compressive", vocab_size=7, d_model=8, n_layers=1, segment=4, memory=4, compression="conv", backend="reference"
    )
    assert model(torch.randint(7, (1, 12))).losses["reconstruction"] > 0
    assert asked == ["reference", "reference"]


@pytest.mark.parametrize("kind", ["max", "mean", "most_used"])
def test_what_learns_nothing_has_no_loss_unless_asked(kind: str) -> None:
    layer = make((4, 4, 3, 2), kind)
    shared: dict[str, Any] = {"losses": {}}
    layer(torch.randn(1, 20, D, dtype=torch.float64), None, None, shared)
    assert shared["losses"] == {}


def test_losses_of_pieces_are_those_of_the_whole() -> None:
    layer = make((4, 4, 3, 2), "conv")
    x, state, found = torch.randn(2, 24, D, dtype=torch.float64), layer.init_state(2, dtype=torch.float64), []
    for piece in x.split([5, 1, 10, 8], dim=1):
        shared: dict[str, Any] = {"losses": {}}
        _, state = layer(piece, state, None, shared)
        found.append(shared["losses"]["reconstruction"])
    shared = {"losses": {}}
    layer(x, None, None, shared)
    counts = [0, 0, 3, 2]  # of each row: segments end at 4, 8, 12, ..., and evict from the second on
    total = sum(count * loss for count, loss in zip(counts, found, strict=True)) / sum(counts)
    close(total, shared["losses"]["reconstruction"])


@pytest.mark.parametrize("kind", KINDS)
def test_declared_flops_are_counted(kind: str) -> None:
    model = zoo.create_model(
        "compressive", vocab_size=7, d_model=D, n_heads=H, segment=5, memory=7, compressed_memory=6, rate=3,
        compression=kind,
    )  # fmt: skip
    for length in (1, 5, 20, 41):
        tokens = torch.randint(7, (2, length))
        assert count_flops(lambda tokens=tokens: model(tokens)) == 2 * model.flops(length)


def test_rate_one_and_a_memory_that_holds_all_is_a_longer_memory() -> None:
    layer, longer = make((4, 4, 16, 1), "mean"), make_xl(4, 20)
    longer.load_state_dict(layer.state_dict())
    x = torch.randn(1, 50, D, dtype=torch.float64)
    close(layer(x)[0], longer(x)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment": 0}, "segment=0 is not valid: expected at least 1"),
        ({"memory": -1}, "memory=-1 is not valid: expected at least 0"),
        ({"compressed_memory": 0}, "compressed_memory=0 is not valid: expected at least 1"),
        ({"rate": 0}, "rate=0 is not valid"),
        ({"compression": "covn"}, "compression='covn' is not valid: did you mean 'conv'"),
        ({"loss": "autoencode"}, "loss='autoencode' is not valid: did you mean 'autoencoding'"),
        ({"d_model": 10, "n_heads": 4}, "d_model=10 is not valid: expected a multiple of n_heads=4"),
        ({"memory": 2**62}, "memory=.* is not valid: expected at most"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("compressive", **{"vocab_size": 5, "d_model": 12} | settings)
