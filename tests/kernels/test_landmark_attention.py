"""Each backend of landmark attention against its definition, query by query, in float64.

Shape letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import backends, landmark_attention, landmark_attention_flops, parallel
from zoo.kernels.errors import ZooError

ON_CPU = ["torch", "numba"]
BACKENDS = ["reference", *ON_CPU]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def packed(lengths: Sequence[int], both_ways: bool = False) -> dict[str, Any]:
    """Slots of documents that stand one behind the other."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    index = torch.repeat_interleave(sizes)
    slots = torch.arange(sum(lengths))[None]
    return {"slots": slots, "begins": (ends - sizes)[index][None], "ends": ends[index][None] if both_ways else None}


def cached(lengths: Sequence[int], read: int) -> dict[str, Any]:
    """The last queries of such documents, the others were read before."""
    return {name: None if x is None else x[:, read:] for name, x in packed(lengths).items()}


def joined(*rows: dict[str, Any]) -> dict[str, Any]:
    """Rows of the batch that differ."""
    return {name: None if rows[0][name] is None else torch.cat([row[name] for row in rows]) for name in rows[0]}


def blind(sight: dict[str, Any]) -> dict[str, Any]:
    slots = sight["slots"].clone()
    slots[:, ::3] = -1
    return {**sight, "slots": slots}


# Block, and where queries stand.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one document": (4, packed([131])),
    "a tile for each block": (64, packed([200])),
    "never a whole block": (200, packed([90])),
    "blocks of one": (1, packed([41])),
    "documents": (6, packed([1, 64, 30, 7, 5])),
    "rows": (5, joined(packed([40, 30]), packed([13, 57]))),
    "cached": (7, cached([20, 50], 45)),
    "a step": (3, cached([58], 57)),
    "a step of rows": (3, joined(cached([58], 57), cached([40, 18], 57), blind(cached([58], 57)))),
    "blind queries": (4, blind(packed([70]))),
    "both ways": (5, packed([100], both_ways=True)),
    "documents both ways": (6, packed([2, 65, 30, 3, 4], both_ways=True)),
}


def inputs(name: str, dtype: torch.dtype = torch.float64, H: int = 4, G: int = 2, K: int = 6) -> dict[str, Any]:
    block, sight = CASES[name]
    rows, T = sight["slots"].shape
    B, S = max(rows, 2), int(sight["slots"].max()) + 1
    q, k, v = (torch.randn(B, n, h, K, dtype=torch.float64).to(dtype) for n, h in ((T, H), (S, G), (S, G)))
    if rows > 1:
        q, k, v = q[:rows], k[:rows], v[:rows]
    return {"q": q, "k": k, "v": v, **sight, "block": block}


def by_definition(q, k, v, slots, begins, ends, block, scale=None) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The weights that the definition gives, block by block, on whole matrices."""
    B, T, H, K = q.shape
    S, scale = k.shape[1], K**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(H // k.shape[2], dim=2) for x in (k, v))
    logits = scale * torch.einsum("bthk,bshk->bhts", q, k)
    blocks = torch.full((B, T, S), -1)  # the block of each key in the query's document, -1 where it sees it not
    marks = torch.zeros(B, T, S, dtype=torch.bool)
    own = torch.full((B, T), -1)
    for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(T)).tolist():
        row = b % slots.shape[0]
        slot, begin = int(slots[row, t]), int(begins[row, t])
        if slot >= 0:
            stop = slot + 1 if ends is None else int(ends[row, t])
            blocks[b, t, begin:stop] = torch.arange(stop - begin) // (block + 1)
            marks[b, t, begin + block : stop : block + 1] = True
            marks[b, t, stop - 1] |= ends is not None
            own[b, t] = (slot - begin) // (block + 1)
    near = blocks == own[..., None]
    first = (blocks >= 0) & (near ^ marks)  # G0: tokens of the own block, landmarks of the others
    outer = logits.masked_fill(~first[:, None], -torch.inf)
    lse = outer.detach().logsumexp(-1)
    p0 = outer.softmax(-1).nan_to_num(0.0)
    weights = p0 * ~marks[:, None]
    for c in range(int(blocks.max()) + 1):
        tokens = ((blocks == c) & ~marks & ~near)[:, None]
        if tokens.any():
            inner = logits.masked_fill(~tokens, -torch.inf).softmax(-1)
            inner = torch.where(tokens, inner, 0.0)
            weights = weights + inner * (p0 * ((blocks == c) & marks & ~near)[:, None]).sum(-1, keepdim=True)
    return torch.einsum("bhts,bshk->bthk", weights, v), lse


def results(function: Any, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("q", "k", "v")}
    y, lse = function(**{**arguments, **leaves}, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((y * weight.to(y.dtype)).sum(), list(leaves.values()))
    return {"y": y, "lse": lse, **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def check(backend: str, arguments: dict[str, Any], tolerance: float) -> None:
    """Compares output and gradients by relative root mean square error with the definition in float64."""
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}
    expected = results(by_definition, wide)
    actual = results(landmark, arguments, backend=backend)
    assert torch.equal(actual["lse"].isneginf(), expected["lse"].isneginf())
    for name, truth in expected.items():
        result = actual[name].double()
        assert result.shape == truth.shape, name
        error = ((result - truth).nan_to_num(posinf=0, neginf=0).norm() / truth[truth.isfinite()].norm()).item()
        assert not result.isnan().any(), name
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def landmark(*arguments: Any, backend: str = "reference", **options: Any) -> tuple[Tensor, Tensor]:
    return landmark_attention(*arguments, **options, backend=backend, return_lse=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_as_the_definition(backend: str, name: str) -> None:
    check(backend, inputs(name), TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["one document", "a tile for each block", "a step", "documents both ways"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_dtypes(backend: str, name: str, dtype: torch.dtype) -> None:
    check(backend, inputs(name, dtype, K=32), TOLERANCES[dtype])


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    block=st.integers(1, 30),
    read=st.integers(0, 30),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 4)]),
    width=st.sampled_from([1, 5, 16, 20]),
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_any_documents(
    backend: str, lengths: list[int], block: int, read: int, heads: tuple[int, int], width: int
) -> None:
    T = sum(lengths)
    sight = cached(lengths, min(read, T - 1))
    q = torch.randn(1, sight["slots"].shape[1], heads[0], width, dtype=torch.float64)
    k, v = torch.randn(2, 1, T, heads[1], width, dtype=torch.float64)
    arguments = {"q": q, "k": k, "v": v, **sight, "block": block}
    actual, expected = (results(landmark, arguments, backend=name) for name in (backend, "reference"))
    for name, truth in expected.items():
        torch.testing.assert_close(actual[name], truth, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_block_is_causal_attention(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 30, 2, 8, dtype=torch.float64)
    slots = torch.arange(30)[None]
    y = landmark_attention(q, k, v, slots, slots * 0, block=30, backend=backend)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_landmarks_and_keys_of_others_are_never_used(backend: str) -> None:
    arguments = inputs("documents both ways")
    grads = results(landmark, arguments, backend=backend)
    _, sight = CASES["documents both ways"]
    closes = torch.arange(104) == sight["ends"][0] - 1
    closes |= (torch.arange(104) - sight["begins"][0]) % 7 == 6
    assert not grads["dv"][:, closes].any()
    assert (grads["dv"][:, ~closes].abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_logits(backend: str, size: float) -> None:
    check(backend, {**inputs("one document"), "scale": size}, 1e-9)


@pytest.mark.parametrize("backend", ON_CPU)
def test_longer_than_any_chunk(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        from zoo.kernels.landmark_attention import torch_backend

        monkeypatch.setattr(torch_backend, "LOGITS", 3000)
    check(backend, inputs("one document"), 1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_and_expanded_gradients(backend: str) -> None:
    block, sight = CASES["one document"]
    T = sight["slots"].shape[1]
    qkv = torch.randn(2, T, 24, 5, dtype=torch.float64, requires_grad=True)
    q, k, v = (qkv[:, :, i::3].transpose(0, 1).contiguous().transpose(0, 1) for i in range(3))
    gradients = [
        torch.autograd.grad(landmark_attention(q, k, v, **sight, block=block, backend=name).sum(), qkv)[0]
        for name in (backend, "reference")
    ]
    torch.testing.assert_close(*gradients)


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SMALL", 0)
    arguments = inputs("documents", torch.float32)
    runs = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            runs.append(results(landmark, arguments, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*(run.values() for run in runs), strict=True))


@pytest.mark.parametrize("name", ["documents both ways", "a step of rows"])
def test_gradcheck(name: str) -> None:
    block, sight = 2, CASES[name][1]
    keep: dict[str, Any] = {n: None if x is None else x[:, -9:] for n, x in sight.items()}
    T, S = keep["slots"].shape[1], int(keep["slots"].max()) + 1
    q, k, v = (torch.randn(len(keep["slots"]), n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    if keep["ends"] is not None:  # documents of 3 and 4 and the end of one, cut in blocks of 2
        block = 6
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(
            lambda q, k, v, backend=backend: landmark_attention(q, k, v, **keep, block=block, backend=backend),
            (q, k, v),
            fast_mode=True,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["documents", "documents both ways"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    x = inputs(name, dtype)
    forward = (*(x[n] for n in ("q", "k", "v", "slots", "begins", "ends", "block")), 0.5)
    leaves = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in forward)
    torch.library.opcheck(torch.ops.zoo.landmark_attention_forward.default, (*leaves, backend))
    forward = tuple(a.detach() if isinstance(a, Tensor) else a for a in forward)
    y, lse = torch.ops.zoo.landmark_attention_forward(*forward, backend)
    backward = (*forward, y, lse, torch.randn_like(y), backend)
    torch.library.opcheck(torch.ops.zoo.landmark_attention_backward.default, backward)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    arguments = inputs("documents")
    compiled = torch.compile(landmark, fullgraph=True, backend="aot_eager")
    actual, expected = (results(f, arguments, backend="numba") for f in (compiled, landmark))
    torch.testing.assert_close(actual, expected)


def test_meta_tensors_have_the_same_shapes() -> None:
    arguments = inputs("rows", torch.bfloat16)
    meta = landmark(**{n: x.to("meta") if isinstance(x, Tensor) else x for n, x in arguments.items()}, backend="numba")
    real = landmark(**arguments, backend="numba")
    assert [(x.shape, x.dtype, x.stride()) for x in meta] == [(x.shape, x.dtype, x.stride()) for x in real]


@pytest.mark.parametrize("name", CASES)
def test_flops(name: str) -> None:
    """As many pairs as have a weight, or, for landmarks, a gradient of their key."""
    arguments = inputs(name, H=2, G=1)
    tokens = marks = 0
    block, sight = CASES[name]
    slots = sight["slots"]
    for row, t in torch.nonzero(slots >= 0).tolist():
        slot, begin = int(slots[row, t]), int(sight["begins"][row, t])
        last = slot if sight["ends"] is None else int(sight["ends"][row, t]) - 1
        for j in range(begin, last + 1):
            closes = (j - begin) % (block + 1) == block or (sight["ends"] is not None and j == last)
            other = (j - begin) // (block + 1) != (slot - begin) // (block + 1)
            tokens, marks = tokens + (not closes), marks + (closes and other)
    rows = arguments["q"].shape[0] // slots.shape[0] * 2  # and heads
    with FlopCounterMode(display=False) as counter:
        y = landmark_attention(arguments["q"].requires_grad_(), *list(arguments.values())[1:6], block=block)
    assert counter.get_total_flops() == rows * 6 * (4 * tokens + 2 * marks)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == rows * 6 * (10 * tokens + 6 * marks)
    wide: Any = (None if x is None else x.expand(arguments["q"].shape[:2]) for x in sight.values())
    slots, begins, ends = wide
    assert landmark_attention_flops(slots, begins, ends, block, 2, 6) == rows * 6 * (4 * tokens + 2 * marks)


HOSTILE = """
import torch
from zoo.kernels import landmark_attention, parallel
parallel.SMALL = 0
torch.set_num_threads(2)
torch.manual_seed(0)
leaves = [torch.randn(2, 150, h, 17).requires_grad_() for h in (4, 2, 2)]
at = torch.arange(150)[None]
for begins, ends in ((at // 70 * 70, None), (at // 75 * 75, at // 75 * 75 + 75)):
    def run(backend):
        y = landmark_attention(*leaves, at, begins, ends, block=9, backend=backend)
        return y, *torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(run("numba"), run("reference"), rtol=1e-4, atol=1e-5)
print("fine")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills new memory on Linux alone")
def test_scratch_memory() -> None:
    """Scratch inside the kernels is filled with 0xFE (-1.7e38) by the allocator: none of it may be read."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE],
        env={**os.environ, "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("backend", ON_CPU)
def test_nothing_of_the_size_of_all_scores_is_held(backend: str) -> None:
    module, T = backends.load("landmark_attention", backend), 8192
    q, k, v = torch.randn(3, 1, T, 1, 4)
    arguments = (q, k, v, *packed([T]).values(), 63, 0.5)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal biggest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    biggest = max(biggest, x.untyped_storage().nbytes())
            return result

    with Watch():
        y, lse = module.forward(*arguments)
        module.backward(*arguments, y, lse, q)
    assert biggest < 4 * T * T // 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "q has shape .*expected .B T H K."),
        ({"v": torch.zeros(2, 70, 4, 3)}, "v has shape .*expected"),
        ({"k": torch.zeros(2, 70, 3, 6), "v": torch.zeros(2, 70, 3, 6)}, "4 query heads do not divide into 3"),
        ({"slots": torch.zeros(1, 70)}, "slots has dtype torch.float32, expected an integer"),
        ({"slots": torch.full((1, 70), 70)}, "slots run from 70 to 70, expected -1 to 69 for 70 keys: clamp slots"),
        ({"slots": torch.full((1, 70), -2)}, "slots run from -2"),
        ({"begins": torch.full((1, 70), 9)}, "begins behind a query of it"),
        ({"ends": torch.full((1, 70), 71)}, "ends before a query of it or behind the keys"),
        ({"ends": torch.full((1, 70), 70)}, "the last block of a document is a landmark without a token"),
        ({"block": 0}, "block is 0, expected a whole number from 1"),
    ],
)
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_bad_arguments(backend: str, change: dict[str, Any], message: str) -> None:
    q, k, v = torch.randn(2, 70, 4, 6), torch.randn(2, 70, 2, 6), torch.randn(2, 70, 2, 6)
    arguments = {"q": q, "k": k, "v": v, **packed([70]), "block": 22}
    with pytest.raises(ZooError, match=message) as caught:
        landmark_attention(**{**arguments, **change}, backend=backend)
    assert "\n" not in str(caught.value)
