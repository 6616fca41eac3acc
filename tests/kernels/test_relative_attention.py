"""Relative attention against sums written out pair by pair, in float64, gradients included.

Letters: B batch, N segments, Q queries of a segment, H query heads, G key/value heads, K head width, M slots of memory,
R runs of slots, S distances.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import Segments, relative_attention, relative_attention_flops
from zoo.kernels.errors import BackendError, ZooError
from zoo.kernels.relative_attention import torch_backend

BACKENDS = ["reference", "torch", "numba"]
NAMES = ("q", "p", "k", "v", "memory_k", "memory_v", "r")


def inputs(
    sizes: tuple[int, ...] = (2, 3, 5, 4, 2, 3, 11), dtype: torch.dtype = torch.float64, distances: int = 16
) -> dict[str, Tensor]:
    B, N, Q, H, G, K, M = sizes
    shapes = [(B, N, Q, H, K)] * 2 + [(B, N, Q, G, K)] * 2 + [(B, M, G, K)] * 2 + [(distances, G, K)]
    made = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return dict(zip(NAMES, made, strict=True))


RAGGED = Segments(
    torch.tensor([[[0, 7], [3, 0], [1, 1]], [[5, 2], [0, 0], [9, 0]]]),
    torch.tensor([[[4, 3], [0, 6], [0, 0]], [[6, 5], [1, 1], [2, 0]]]),
    torch.tensor([[5, 2, 4], [1, 0, 5]]),
)
ALIKE = Segments(
    torch.tensor([[[2], [0], [1]]]), torch.tensor([[[0], [11], [3]]]), torch.tensor([[5, 5, 3]])
)  # fmt: skip


def by_hand(
    q: Tensor, p: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, r: Tensor, segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, query by query."""
    batch, n_segments, n_queries, n_heads, _ = q.shape
    starts, lengths, counts = (x.expand(batch, *x.shape[1:]) for x in segments)
    y, lse = torch.zeros_like(v).repeat_interleave(n_heads // k.shape[3], 3), torch.full(q.shape[:-1], -torch.inf)
    y, lse = y.detach().clone(), lse.double()
    rows: list[Tensor] = []
    for b in range(batch):
        for n in range(n_segments):
            slots = [
                s for a, c in zip(starts[b, n].tolist(), lengths[b, n].tolist(), strict=True) for s in range(a, a + c)
            ]
            for i in range(n_queries):
                for h in range(n_heads):
                    if i >= counts[b, n]:
                        rows.append(torch.zeros_like(q[0, 0, 0, 0]))
                        continue
                    g = h * k.shape[3] // n_heads
                    keys = torch.cat((memory_k[b, slots, g], k[b, n, : i + 1, g]))
                    values = torch.cat((memory_v[b, slots, g], v[b, n, : i + 1, g]))
                    distance = torch.arange(len(keys)).flip(0)
                    logits = scale * (keys @ q[b, n, i, h] + r[distance, g] @ p[b, n, i, h])
                    lse[b, n, i, h] = logits.logsumexp(0).detach()
                    rows.append(logits.softmax(0) @ values)
    return torch.stack(rows).view_as(q), lse


@pytest.mark.parametrize("segments", [RAGGED, ALIKE], ids=["ragged", "alike"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition(backend: str, segments: Segments) -> None:
    given = inputs()
    weight = torch.randn_like(given["q"])
    y, lse = relative_attention(**given, segments=segments, scale=0.7, backend=backend)
    expected, expected_lse = by_hand(**given, segments=segments, scale=0.7)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-11)
    assert not lse.requires_grad
    found, wanted = (torch.autograd.grad((z * weight).sum(), list(given.values())) for z in (y, expected))
    for name, gradient, truth in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def large(dtype: torch.dtype = torch.float32, width: int = 24) -> tuple[dict[str, Tensor], Segments]:
    """Longer than the tiles of any backend, with edges that fall inside of them."""
    given = inputs((2, 3, 150, 2, 2, width, 700), dtype, 700)
    starts = torch.tensor([[[0, 90], [11, 200], [600, 0]], [[3, 3], [77, 130], [0, 1]]])
    lengths = torch.tensor([[[37, 300], [128, 256], [1, 0]], [[0, 0], [50, 500], [260, 7]]])
    return given, Segments(starts, lengths, torch.tensor([[150, 64, 65], [1, 149, 16]]))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(("dtype", "width", "atol"), [(torch.float64, 24, 1e-11), (torch.float32, 16, 3e-5)])
def test_long_segments_against_the_reference(
    backend: str, dtype: torch.dtype, width: int, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "LOGITS", 1 << 18)  # one segment at a time
    given, segments = large(dtype, width)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    weight = torch.randn_like(given["q"])
    y, lse = relative_attention(**given, segments=segments, backend=backend)
    expected, expected_lse = relative_attention(**exact, segments=segments, backend="reference")
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=atol)
    found = torch.autograd.grad((y * weight).sum(), list(given.values()))
    wanted = torch.autograd.grad((expected * weight.double()).sum(), list(exact.values()))
    for name, gradient, truth in zip(NAMES, found, wanted, strict=True):
        error = (gradient.double() - truth).abs().max() / truth.abs().max()
        assert error < atol, f"{name}: {error}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_memory(backend: str) -> None:
    given = inputs((1, 2, 4, 2, 2, 3, 0), distances=4)
    none = torch.zeros(1, 2, 1, dtype=torch.int64)
    segments = Segments(none, none, torch.full((1, 2), 4))
    y, _ = relative_attention(**given, segments=segments, backend=backend)
    torch.testing.assert_close(y, by_hand(**given, segments=segments, scale=3**-0.5)[0])
    y.sum().backward()
    assert given["memory_k"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_close(backend: str) -> None:
    given, segments = large()
    short = {name: x.detach().bfloat16().requires_grad_() for name, x in given.items()}
    y, lse = relative_attention(**short, segments=segments, backend=backend)
    expected, _ = relative_attention(
        **{name: x.detach().float() for name, x in short.items()}, segments=segments, backend="reference"
    )
    assert (y.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in short.values())


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_as_torch_sees_it(backend: str) -> None:
    given = inputs(dtype=torch.float32)
    arguments = (*given.values(), *RAGGED, 0.5, backend)
    torch.library.opcheck(torch.ops.zoo.relative_attention_forward, arguments)
    with FlopCounterMode(display=False) as counter:
        y, _ = relative_attention(**given, segments=RAGGED, backend=backend)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == relative_attention_flops(RAGGED, 2, 4, 3)
    assert counter.get_total_flops() - forward == relative_attention_flops(RAGGED, 2, 4, 3, backward=True)


def test_flops_are_those_of_the_pairs() -> None:
    # Segments of 5, 2 and 4 queries before 7, 6 and 0 slots; of 1, 0 and 5 queries before 11, 2 and 2.
    pairs = 5 * 7 + 15 + 2 * 6 + 3 + 10 + (11 + 1) + (5 * 2 + 15)
    assert relative_attention_flops(RAGGED, 2, 1, 1) == 6 * pairs
    assert relative_attention_flops(ALIKE, 3, 2, 4) == 3 * 2 * 4 * 6 * (15 + 5 * 11 + 15 + 3 * 3 + 6)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 3, 5, 4)}, "q has shape"),
    ({"p": torch.zeros(2, 3, 5, 4, 2)}, "p has shape"),
    ({"memory_v": torch.zeros(2, 10, 2, 3)}, "memory_v has shape"),
    ({"r": torch.zeros(3, 2)}, "r is not of shape"),
    ({"r": torch.zeros(11, 2, 3)}, "r has 11 distances and a query sees as far as 11: pass 12 of them"),
    ({"segments": (1, 2, 3)}, "segments is a tuple: pass a zoo.kernels.Segments"),
    ({"segments": RAGGED._replace(counts=RAGGED.counts + 1)}, "counts run from 1 to 6, expected 0 to 5"),
    ({"segments": RAGGED._replace(lengths=-RAGGED.lengths)}, "lengths has the entry -6"),
    ({"segments": RAGGED._replace(starts=RAGGED.starts + 3)}, "a run reaches beyond the 11 slots"),
    ({"segments": RAGGED._replace(starts=RAGGED.starts.float())}, "starts has dtype"),
    ({"segments": RAGGED._replace(lengths=RAGGED.lengths[:, :, :1])}, "lengths has shape"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_arguments(wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**inputs(dtype=torch.float32), "segments": RAGGED}
    with pytest.raises(ZooError, match=message) as raised:
        relative_attention(**given | wrong)
    assert "\n" not in str(raised.value)


def test_heads_must_divide() -> None:
    with pytest.raises(ZooError, match="4 query heads do not divide into 3"):
        relative_attention(**inputs((2, 3, 5, 4, 3, 3, 11)), segments=RAGGED)


def test_an_unknown_backend() -> None:
    with pytest.raises(BackendError, match="no backend is called 'cuda'"):
        relative_attention(**inputs(), segments=RAGGED, backend="cuda")
