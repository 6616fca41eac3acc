"""What only the numba backend of sparse attention has: tiles, classes of a dilation, parts that are added up, memory.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width, N tiles, M far ranges.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.kernels import Pattern, parallel, sparse_attention
from zoo.kernels.errors import ZooError
from zoo.kernels.sparse_attention import numba_backend, numba_plan
from zoo.kernels.sparse_attention.numba_tiles import KEYS, QUERIES


def window(T: int, left: int, right: int = 0, S: int | None = None) -> Pattern:
    S = T if S is None else S
    at = torch.arange(S - T, S)[None]
    return Pattern((at - left).clamp(0, S), (at + right + 1).clamp(0, S))


def blocks(T: int, tile: int) -> Pattern:
    """A window, and for each tile the first block, the last one and one that differs from head to head."""
    N = -(-T // tile)
    drawn = torch.randint(0, N, (1, 2, N, 1), generator=torch.Generator().manual_seed(0)) * tile
    ends = torch.tensor([0, (N - 1) * tile]).expand(1, 2, N, 2)
    return window(T, tile, tile)._replace(far=torch.cat([ends, drawn], -1), tile=tile, far_length=tile)


def run(B: int, T: int, S: int, H: int, G: int, K: int, pattern: Pattern, dtype: torch.dtype, backend: str = "numba"):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K)
    *leaves, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in leaves]
    y = sparse_attention(*leaves, pattern, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_like_reference(*case) -> None:  # type: ignore[no-untyped-def]
    results, expected = run(*case, torch.float64), run(*case, torch.float64, "reference")
    for name, result, truth in zip(("y", "dq", "dk", "dv"), results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]), st.data())
def test_tiles_hold_each_query_of_each_head_once(T: int, heads: tuple[int, int], data: st.DataObject) -> None:
    H, G = heads
    tile = data.draw(st.sampled_from([0, 1, 13, 64, 100, 500]))
    steps = tuple(1 if tile else data.draw(st.integers(1, 9)) for _ in range(H))
    tiles, groups = numba_plan.tiles(T, H, G, steps, tile)
    seen = np.zeros((H, T), int)
    for head, first, step, count in tiles:
        queries = np.arange(first, first + step * count, step)
        assert 0 < count <= QUERIES
        assert step == steps[head]
        assert not tile or len(set(queries // tile)) == 1
        seen[head, queries] += 1
    assert (seen == 1).all()
    for g in range(G):
        assert set(tiles[groups[g] : groups[g + 1], 0] * G // H) == {g}


@pytest.mark.parametrize(
    ("T", "S", "H", "G", "pattern"),
    [
        pytest.param(700, 700, 4, 2, window(700, 300)._replace(dilation=(1, 2, 4, 7)), id="several tiles of a class"),
        pytest.param(300, 300, 2, 1, window(300, 150, 90)._replace(dilation=(3, 3)), id="both sides"),
        pytest.param(90, 333, 2, 2, window(90, 200, S=333)._replace(dilation=(4, 5)), id="behind a prefix"),
        pytest.param(90, 70, 2, 2, window(90, 60, 60, S=70)._replace(dilation=(4, 1)), id="more queries than keys"),
        pytest.param(5, 50, 2, 2, window(5, 50, S=50)._replace(dilation=(9, 60)), id="more classes than queries"),
        pytest.param(1, 1000, 2, 2, window(1, 900, S=1000)._replace(dilation=(3, 1)), id="one query"),
        pytest.param(200, 200, 2, 2, Pattern(*torch.randint(0, 201, (2, 1, 200)), (2, 3)), id="uneven"),
    ],
)
def test_classes_of_a_dilation(T: int, S: int, H: int, G: int, pattern: Pattern) -> None:
    assert_like_reference(2, T, S, H, G, 16, pattern)


def test_work_does_not_grow_with_the_dilation() -> None:
    """A window d times as wide with every d-th key is as many tiles of keys."""
    q = torch.zeros(1, 4096, 1, 16)
    work = []
    for d in (1, 4):
        pattern = window(4096, 256 * d)._replace(dilation=(d,))
        work.append(numba_backend._prepare(q, q, pattern).reach[:, 0].sum())
    assert work[1] < 1.2 * work[0]


@pytest.mark.parametrize("tile", [1, 20, 64, 100, 2 * QUERIES + 2])
def test_far_ranges_of_any_tile(tile: int) -> None:
    """Ranges in place (whole multiples of 4) and copied together; tiles shorter and longer than the loops' own."""
    T = 3 * KEYS + 5
    N = -(-T // tile)
    generator = torch.Generator().manual_seed(tile)
    for length in (3, 32, KEYS, KEYS + 5):
        far = torch.randint(-1, T, (2, 1, N, 4), generator=generator)
        pattern = window(T, 20, 5)._replace(far=far, tile=tile, far_length=length)
        assert_like_reference(2, T, T, 2, 1, 16, pattern)
        assert_like_reference(2, T, T, 2, 1, 16, pattern._replace(dilation=(2, 1)))


PARTED = {
    "all before": (1, 1100, 1100, 1, 1, 16, window(1100, 1100)),
    "window": (1, 1100, 1100, 2, 1, 16, window(1100, 100)),
    "dilated": (1, 1100, 1100, 2, 2, 16, window(1100, 100)._replace(dilation=(1, 5))),
    "blocks": (1, 1100, 1100, 2, 2, 16, blocks(1100, 64)),
}


@pytest.mark.parametrize("name", PARTED)
def test_parts_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks per key/value head give the gradients of one, and of the reference."""
    assert_like_reference(*PARTED[name])
    reductions = []
    reduce = numba_backend.numba_adjoint.reduce
    monkeypatch.setattr(numba_backend.numba_adjoint, "reduce", lambda *a: (reductions.append(1), reduce(*a)))
    results = []
    for parts in (16, 1):
        monkeypatch.setattr(numba_backend, "PARTS", parts)
        results.append(run(*PARTED[name], torch.float32))
    assert len(reductions) == 2
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARTED)
def test_threads_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SMALL", 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(*PARTED[name], torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("T", [1, 70])
def test_keys_that_nobody_sees_are_not_read(T: int) -> None:
    """Room for later keys in a cache holds anything, NaN included."""
    S, begin, end = 300, 33, 33 + 130
    at = torch.arange(end - T, end)[None]
    pattern = Pattern((at - 60).clamp(min=begin), at + 1)
    q = torch.randn(1, T, 2, 16, requires_grad=True)
    cache = [torch.full((1, S, 2, 16), torch.nan) for _ in range(2)]
    for x in cache:
        x[:, begin:end] = torch.randn(1, end - begin, 2, 16)
    k, v = (x.requires_grad_() for x in cache)
    y = sparse_attention(q, k, v, pattern, backend="numba")
    gradients = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(bool(x.isfinite().all()) for x in (y, *gradients))
    for gradient in gradients[1:]:
        assert not gradient[:, :begin].any()
        assert not gradient[:, end:].any()


MEMORY = """
import resource, sys, torch
from zoo.kernels import Pattern, sparse_attention

def run(T):
    at = torch.arange(T)[None]
    q, k, v = (torch.randn(1, T, 2, 64, requires_grad=True) for _ in range(3))
    dy = torch.randn(1, T, 2, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    y = sparse_attention(q, k, v, Pattern((at - 255).clamp(min=0), at + 1), backend="numba")
    torch.autograd.grad(y, (q, k, v), dy)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / q.nbytes

run(1024)
print(run(65536))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_of_a_long_sequence() -> None:
    """Peak of both passes at T = 65,536, in tensors of the size of q; the scores alone would be 512 of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    # y, dq, dk, dv, the parts of dk and dv, and a few percent where the windows of parts overlap
    assert float(done.stdout) < 7


def test_more_keys_than_the_masks_count() -> None:
    k = torch.zeros(1, 1, 1, 1).expand(1, (1 << 24) + 1, 1, 1)
    q: Tensor = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ZooError, match="16777217 keys, the masks of numba count to 16777216: pass backend='torch'"):
        sparse_attention(q, k, k, Pattern(torch.zeros(1, 1).long(), torch.ones(1, 1).long()), backend="numba")
