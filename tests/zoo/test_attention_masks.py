"""Sparse attention layers against dense attention in float64, masked by the definitions written out pair by pair.

Letters: B batch, T time, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.layers.attention import Attention, AttentionConfig
from zoo.layers.random_blocks import draw_distinct

# fp32 against float64, relative to the largest element; what is left of angles of positions up to 150 is 1e-5.
TOLERANCE = 5e-5
HEADS = 4

Sees = Callable[[Any, int, int, int, int, int], bool]
"""(config, layer, head, i, j, n): whether query i sees key j in a document of n tokens."""


def window_sees(c: Any, layer: int, head: int, i: int, j: int, n: int) -> bool:
    if c.causal:
        return j <= i and i - j < c.window
    return abs(i - j) < c.window


def longformer_sees(c: Any, layer: int, head: int, i: int, j: int, n: int) -> bool:
    window = c.windows[layer] if c.windows else round(c.window * c.window_growth**layer)
    dilation = c.dilations[layer] if c.dilations else c.dilation
    if c.dilated_heads is not None and head < HEADS - c.dilated_heads:
        dilation = 1
    near = abs(i - j) <= window * dilation and (i - j) % dilation == 0
    if not c.causal:
        return near
    return j <= i and (near or j < (c.n_global or 0))


def bigbird_sees(c: Any, layer: int, head: int, i: int, j: int, n: int) -> bool:
    n_blocks = math.ceil(n / c.block_size)
    row, column = i // c.block_size, j // c.block_size
    every, random = range(n_blocks), c.n_random_blocks
    if c.causal:
        first = [b for b in every if b < c.n_global_blocks]
        window = [b for b in every if row - c.n_window_blocks < b <= row]
        others = [b for b in range(row + 1) if b not in first and b not in window]
    else:
        first = [b for b in every if b < c.n_global_blocks or b >= n_blocks - c.n_global_blocks]
        window = [b for b in every if abs(b - row) <= c.n_window_blocks // 2]
        if row in first:
            return True
        others = [b for b in every if b not in first and b not in window]
    if column in first or column in window:
        return j <= i or not c.causal
    drawn = draw_distinct(torch.tensor([[row]]), torch.tensor([[len(others)]]), HEADS, random, c.random_seed, layer)
    return column in [others[number] for number in drawn[0, head, 0].tolist() if number >= 0]


def seen_pairs(sees: Sees, c: Any, layer: int, lengths: list[int]) -> Tensor:
    """What each query of a row of documents sees, (H, T, T) bool."""
    mask = torch.zeros(HEADS, sum(lengths), sum(lengths), dtype=torch.bool)
    begin = 0
    for n in lengths:
        known: dict[tuple[int, ...], bool] = {}  # of BigBird only the blocks matter, and which of two tokens is first
        for h in range(HEADS):
            for i in range(n):
                for j in range(n):
                    key = (h, i, j)
                    if sees is bigbird_sees:
                        key = (h, i // c.block_size, j // c.block_size, j <= i)
                    if key not in known:
                        known[key] = sees(c, layer, h, i, j, n)
                    mask[h, begin + i, begin + j] = known[key]
        begin += n
    return mask


def turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions by complex numbers; x (T, H, K), positions (T,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * base ** (-torch.arange(half, dtype=torch.float64) / half)  # (T, K/2)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (T, H, K), k and v (T, G, K), mask (H, T, T) to (T, H, K)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("ihk,jhk->hij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hij,jhk->ihk", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def dense(layer: Attention, c: AttentionConfig, x: Tensor, mask: Tensor, documents: Tensor, marks: Tensor) -> Tensor:
    """One row: x (T, D), mask (H, T, T), documents and marks (T,)."""

    def through(linear: nn.Linear, y: Tensor) -> Tensor:
        return F.linear(y, linear.weight.double(), None if linear.bias is None else linear.bias.double())

    groups = c.n_kv_heads or HEADS
    q, k, v = through(layer.qkv_proj, x).unflatten(-1, (-1, layer.head_dim)).split([HEADS, groups, groups], dim=1)
    same = documents[:, None] == documents
    if c.rotary:
        positions = (same & (torch.arange(len(x)) < torch.arange(len(x))[:, None])).sum(1)
        q, k = (turned(t, positions, c.rope_base) for t in (q, k))
    global_keys = marks & ~marks.new_tensor(c.causal)
    y = attention(q, k, v, mask | (same & global_keys))
    queries = getattr(layer, "global_queries", None)
    if queries is not None:
        parts = (through(part, x).unflatten(-1, (HEADS, -1)) for part in (queries.query, queries.key, queries.value))
        y = torch.where(marks[:, None, None], attention(*parts, same.expand(HEADS, -1, -1)), y)
    return through(layer.out_proj, y.flatten(1))


def ids_of(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def in_pieces(layer: Attention, x: Tensor, cuts: list[int], ids: Tensor) -> Tensor:
    """Through the state, as the shell does it."""
    state, pieces = layer.init_state(len(x)), []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if begin:
            state = layer.reset_state(state, ids[:, begin] != ids[:, begin - 1])
        y, state = layer(x[:, begin:end], state, ids[:, begin:end])
        pieces.append(y)
    return torch.cat(pieces, dim=1)


def check(
    name: str,
    sees: Sees,
    rows: list[list[int]],
    cuts: list[int],
    marks: Tensor | None = None,
    at: int = 0,
    **options: Any,
) -> None:
    """Compares output and gradient of the input: the whole, in pieces and token by token.

    Args:
        name: Architecture.
        sees: Its definition.
        rows: Lengths of the documents of each row; one document per row is given without ids.
        cuts: Where the pieces begin.
        marks: (B, T), see `Longformer`.
        at: Number of the layer.
        **options: Settings.
    """
    model = zoo.create_model(name, vocab_size=2, **{"d_model": 8 * HEADS, "n_heads": HEADS, "bias": True, **options})
    layer, c = model.mixers()[at][0], model.config
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 32**-0.5)
    time = sum(rows[0])
    x = torch.randn(len(rows), time, 8 * HEADS, generator=generator).requires_grad_()
    weight = torch.randn(x.shape, generator=generator)
    ids = torch.stack([ids_of(row) for row in rows])
    first = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    n_global = getattr(c, "n_global", 0)
    known = first < (1 if n_global is None else n_global) if marks is None else marks

    exact = x.detach().double().requires_grad_()
    lines = [dense(layer, c, exact[b], seen_pairs(sees, c, at, row), ids[b], known[b]) for b, row in enumerate(rows)]
    expected = torch.stack(lines)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)

    packed = any(len(row) > 1 for row in rows)
    more = ({"global_tokens": marks},) if marks is not None else ()
    outputs = {"whole": layer(x, None, ids if packed else None, *more)[0]}
    if c.causal:
        outputs["in pieces"] = in_pieces(layer, x, cuts, ids)
        outputs["token by token"] = in_pieces(layer, x, list(range(1, time)), ids)
    scale, gradient_scale = expected.abs().max(), expected_gradient.abs().max()
    for way, y in outputs.items():
        (gradient,) = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)
        assert (y - expected).abs().max() <= TOLERANCE * scale, way
        assert (gradient - expected_gradient).abs().max() <= TOLERANCE * gradient_scale, way


@st.composite
def packings(draw, longest: int = 45) -> tuple[list[list[int]], list[int]]:
    """Two rows of documents, and where pieces begin."""
    time = draw(st.integers(1, longest))
    cut = st.lists(st.integers(1, max(1, time - 1)), max_size=3, unique=True).map(sorted)
    cuts = [draw(cut) if time > 1 else [] for _ in range(3)]
    spans = [[b - a for a, b in zip([0, *c], [*c, time], strict=True)] for c in cuts[:2]]
    return (spans if draw(st.booleans()) else [[time], [time]]), cuts[2]


drawn = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
shared = {
    "n_kv_heads": st.sampled_from([1, 2, 4]),
    "rotary": st.booleans(),
    "backend": st.sampled_from(["auto", "torch"]),
    "causal": st.booleans(),
}


@drawn
@given(packing=packings(), options=st.fixed_dictionaries({**shared, "window": st.integers(1, 50)}))
def test_windows(packing, options) -> None:
    rows, cuts = packing
    check("transformer", window_sees, rows, cuts, **options)


@st.composite
def longformers(draw) -> dict[str, Any]:
    options = draw(st.fixed_dictionaries(shared))
    window, growth = draw(st.integers(1, 24)), draw(st.sampled_from([1.0, 1.5, 0.7]))
    if draw(st.booleans()):
        options |= {"window": window, "window_growth": growth}
        narrowest = min(window, max(1, round(window * growth)))
    else:
        windows = [draw(st.integers(1, 24)), window]
        options["windows"], narrowest = windows, min(windows)
    if draw(st.booleans()):
        options["dilation"] = draw(st.integers(1, 90))
    else:
        options["dilations"] = [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    per_group = HEADS // options["n_kv_heads"]
    options["dilated_heads"] = draw(st.none() | st.integers(0, HEADS // per_group).map(lambda n: n * per_group))
    options["n_global"] = draw(st.none() | st.integers(0, min(narrowest, 6)))
    return options


@drawn
@given(packing=packings(), options=longformers(), at=st.integers(0, 1), marked=st.none() | st.integers(0, 99))
def test_longformer(packing, options, at, marked) -> None:
    rows, cuts = packing
    marks = None
    if marked is not None and not options["causal"]:
        generator = torch.Generator().manual_seed(marked)
        marks = torch.rand(2, sum(rows[0]), generator=generator) < torch.tensor([[0.1], [0.3]]) * (marked > 9)
    check("longformer", longformer_sees, rows, cuts, marks, at, **options)


@drawn
@given(
    packing=packings(),
    options=st.fixed_dictionaries(
        {
            **shared,
            "block_size": st.integers(1, 9),
            "n_window_blocks": st.integers(1, 2).map(lambda n: 2 * n - 1),
            "n_global_blocks": st.integers(0, 2),
            "n_random_blocks": st.integers(0, 4),
            "random_seed": st.integers(0, 3),
        }
    ),
    more=st.booleans(),
    at=st.integers(0, 1),
)
def test_bigbird(packing, options, more, at) -> None:
    rows, cuts = packing
    options["n_window_blocks"] += more and options["causal"]
    check("bigbird", bigbird_sees, rows, cuts, at=at, **options)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("name", "sees", "options"),
    [
        ("longformer", longformer_sees, {"window": 5, "n_global": 5, "dilation": 3, "dilated_heads": 2}),
        ("longformer", longformer_sees, {"window": 64, "n_global": 2}),
        ("longformer", longformer_sees, {"window": 1, "n_global": 1, "dilation": 7}),
        ("bigbird", bigbird_sees, {"block_size": 7, "n_random_blocks": 2}),
        ("bigbird", bigbird_sees, {"block_size": 64}),
        ("transformer", window_sees, {"window": 65}),
    ],
)
def test_longer_than_a_tile(name, sees, options, causal) -> None:
    check(name, sees, [[140], [140]], [64, 65, 129], causal=causal, **options)
    check(name, sees, [[3, 70, 67], [129, 1, 10]], [64, 65, 129], causal=causal, **options)
