"""Triton kernels of the recurrence of Mamba-2 in its matrix form; `triton_backend` launches them.

Shape letters: T time, K chunks of Q = CHUNK steps, H heads, P channels per head (P_PAD the power of two above),
G groups, N state size, W states at once. What there is one of per step and head is (B, H, K Q): `delta`, the
decays `head` from the chunk's start and `tail` to its end, and `high` + `low`, the sums of log2 of the decays from the
chunk's start in two parts, because their differences count.

A program of most kernels is one chunk of one head. Products of 16-bit inputs run on tensor cores with sums in float32;
those of float32 inputs in full float32 (`PRECISION`).
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import os

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
"""Steps of a chunk, as in `op.CHUNK`."""

WIDENED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter multiplies the bit patterns of bf16 numbers: there they are made float32 again."""

LENGTHS = ["T", "K"]
"""Arguments whose divisibility brings nothing: one compiled kernel serves every length."""


@triton.jit
def dot(a, b, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The product of two tiles, rounded to TYPE, summed in float32."""
    a = a.to(TYPE)
    b = b.to(TYPE)
    if WIDENED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def load(base, row_stride, rows, n_rows, columns, n_columns):
    """A tile in its own type, zero beyond the matrix."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(base + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(base, row_stride, rows, n_rows, columns, n_columns, values):
    """Writes the tile that `load` would read, in the matrix' own type."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    address = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(address, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def decays(high, low, segments, t, T):
    """(Q, Q) product of the decays after step s up to t, as [t, s]; zero for s > t and across a reset."""
    logs = tl.load(high + t)
    small = tl.load(low + t)
    between = (logs[:, None] - logs[None, :]) + (small[:, None] - small[None, :])
    seen = t[:, None] >= t[None, :]
    if segments is not None:
        number = tl.load(segments + t, mask=t < T, other=-1)
        seen &= number[:, None] == number[None, :]
    return tl.exp2(tl.where(seen, between, float("-inf")))


@triton.jit(do_not_specialize=LENGTHS)
def state_kernel(
    x, factor, delta, M, local, T, K, H, G, x_batch, x_row, x_head, M_batch, M_row, M_group,
    P: tl.constexpr, P_PAD: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to a state, (B, K, H, P, N): the sum of factor_t delta_t x_t M_t^T; no delta is 1."""
    k = tl.program_id(0)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    t = k * CHUNK + tl.arange(0, CHUNK)
    p = tl.arange(0, P_PAD)
    n = tl.program_id(2) * W + tl.arange(0, W)
    per_step = (b * H + h) * (K * CHUNK)
    weight = tl.load(factor + per_step + t)
    if delta is not None:
        weight *= tl.load(delta + per_step + t)
    values = load(x + b * x_batch + h * x_head, x_row, t, T, p, P).to(tl.float32) * weight[:, None]
    matrix = load(M + b * M_batch + h * G // H * M_group, M_row, t, T, n, N)
    sums = dot(tl.trans(values), matrix, TYPE, PRECISION)
    store(local + ((b * K + k) * H + h) * (P * N), N, p, P, n, N, sums)


@triton.jit(do_not_specialize=LENGTHS)
def pass_kernel(states, whole, first, last, K, H, SIZE: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Replaces what each chunk adds to the state, (B, K, H, SIZE), by the state that enters it; `first` may be absent.

    With REVERSE time runs backwards, for the gradients of the states. whole (B, H, K) is the decay of each chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // H
    h = row % H
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if first is not None:
        state = tl.load(first + row * SIZE + i, mask=inside, other=0.0)
    for j in range(K):
        k = j
        if REVERSE:
            k = K - 1 - j
        here = states + ((b * K + k) * H + h) * SIZE + i
        added = tl.load(here, mask=inside, other=0.0)
        decay = tl.load(whole + row * K + k)
        tl.store(here, state, mask=inside)
        # Not a product where a segment starts: even an infinite state stays in its own document.
        state = tl.where(decay == 0.0, added, decay * state + added)
    tl.store(last + row * SIZE + i, state, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def output_kernel(
    x, B, C, skip, delta, head, high, low, segments, states, y,
    T, K, H, G, x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group,
    P: tl.constexpr, P_PAD: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs: y = (scores * decays) drive + head (C S) + skip x, for one chunk of one head."""
    k = tl.program_id(0)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    t = k * CHUNK + tl.arange(0, CHUNK)
    p = tl.arange(0, P_PAD)
    group = h * G // H
    per_step = (b * H + h) * (K * CHUNK)
    if segments is not None:
        segments += b * T
    B += b * B_batch + group * B_group
    C += b * C_batch + group * C_group
    states += ((b * K + k) * H + h) * (P * N)

    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    carried = tl.zeros((CHUNK, P_PAD), tl.float32)
    for start in range(0, N, W):
        n = start + tl.arange(0, W)
        matrix_C = load(C, C_row, t, T, n, N)
        scores += dot(matrix_C, tl.trans(load(B, B_row, t, T, n, N)), TYPE, PRECISION)
        carried += dot(matrix_C, tl.trans(load(states, N, p, P, n, N)), TYPE, PRECISION)
    values = load(x + b * x_batch + h * x_head, x_row, t, T, p, P)
    weights = scores * decays(high + per_step, low + per_step, segments, t, T)
    weights *= tl.load(delta + per_step + t)[None, :]  # here and not on x, which is exact in its own type
    out = carried * tl.load(head + per_step + t)[:, None] + dot(weights, values, TYPE, PRECISION)
    if skip is not None:
        out += values.to(tl.float32) * tl.load(skip + h).to(tl.float32)
    store(y + (b * T * H + h) * P, H * P, t, T, p, P, out)


@triton.jit(do_not_specialize=LENGTHS)
def gradient_kernel(
    dy, x, B, C, skip, delta, head, tail, whole, high, low, segments, states, dstates,
    dx, ddelta, dlogs, dB, dC, dskip,
    T, K, H, G, x_batch, x_row, x_head, B_batch, B_row, B_group, C_batch, C_row, C_group,
    P: tl.constexpr, P_PAD: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every gradient of one chunk of one head; those of B and C (B, T, H, N) are its share of the group's.

    states (B, K, H, P, N) entered the chunk, dstates is the gradient of the state that left it. ddelta is the gradient
    that reaches a step size through the drive delta x, dlogs that of the exponent delta A.
    """
    k = tl.program_id(0)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    t = k * CHUNK + tl.arange(0, CHUNK)
    p = tl.arange(0, P_PAD)
    group = h * G // H
    per_step = (b * H + h) * (K * CHUNK)
    if segments is not None:
        segments += b * T
    B += b * B_batch + group * B_group
    C += b * C_batch + group * C_group
    here = ((b * K + k) * H + h) * (P * N)
    token = b * T * H + h

    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, N, W):
        n = start + tl.arange(0, W)
        scores += dot(load(C, C_row, t, T, n, N), tl.trans(load(B, B_row, t, T, n, N)), TYPE, PRECISION)
    between = decays(high + per_step, low + per_step, segments, t, T)
    values = load(x + b * x_batch + h * x_head, x_row, t, T, p, P)
    gradient = load(dy + token * P, H * P, t, T, p, P)
    step = tl.load(delta + per_step + t)

    # Within the chunk: y = weights drive, weights = scores * decays, drive = delta x.
    dweights = dot(gradient, tl.trans(values), TYPE, PRECISION) * step[None, :]
    weights = scores * between
    ddrive = dot(tl.trans(weights), gradient, TYPE, PRECISION)
    dscores = dweights * between
    # A decay at r is in every weight [t, s] with s < r <= t.
    before = t[:, None] > t[None, :]
    inner = tl.where(before, dweights * weights, 0.0)
    flow = tl.sum(tl.where(before, tl.cumsum(inner, 0, reverse=True), 0.0), 1)

    # Through the states: each step took from the one that entered, and gave to the one that left.
    taken = tl.load(head + per_step + t)
    given = tl.load(tail + per_step + t)
    carried = tl.zeros((CHUNK,), tl.float32)
    kept = tl.zeros((CHUNK,), tl.float32)
    passing = tl.zeros((P_PAD,), tl.float32)
    for start in range(0, N, W):
        n = start + tl.arange(0, W)
        matrix_B = load(B, B_row, t, T, n, N)
        matrix_C = load(C, C_row, t, T, n, N)
        state = load(states + here, N, p, P, n, N)
        dstate = load(dstates + here, N, p, P, n, N)
        passing += tl.sum(state * dstate, 1)
        share = dot(gradient, state, TYPE, PRECISION) * taken[:, None]
        carried += tl.sum(share * matrix_C.to(tl.float32), 1)
        store(dC + token * N, H * N, t, T, n, N, share + dot(dscores, matrix_B, TYPE, PRECISION))
        share = dot(values, dstate, TYPE, PRECISION) * (given * step)[:, None]
        kept += tl.sum(share * matrix_B.to(tl.float32), 1)
        store(dB + token * N, H * N, t, T, n, N, share + dot(tl.trans(dscores), matrix_C, TYPE, PRECISION))
        ddrive += dot(matrix_B, tl.trans(dstate), TYPE, PRECISION) * given[:, None]
    flow += tl.sum(tl.where(before, kept[None, :], 0.0), 1) + tl.sum(tl.where(before, 0.0, carried[None, :]), 1)
    flow += tl.sum(passing, 0) * tl.load(whole + (b * H + h) * K + k)

    gradient = gradient.to(tl.float32)
    values = values.to(tl.float32)
    tl.store(dlogs + per_step + t, flow)
    tl.store(ddelta + per_step + t, tl.sum(ddrive * values, 1))
    tl.store(dskip + (b * H + h) * K + k, tl.sum(tl.sum(gradient * values, 1), 0))
    ddrive *= step[:, None]
    if skip is not None:
        ddrive += gradient * tl.load(skip + h).to(tl.float32)
    store(dx + token * P, H * P, t, T, p, P, ddrive)
