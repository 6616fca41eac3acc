"""Steps that the Triton kernels of recurrences over channels share: tiles, sums over channels, decays, recurrences.

Shape letters: T time, N state size (padded to a power of two), G = GROUP steps, W channels of one program. A tile
written (G, N, W) holds G steps of every state of W channels.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

CHUNK = tl.constexpr(32)
"""Steps between stored states, as in the `op.CHUNK` of both operators that use this, selective_scan and wkv4."""

GROUP = tl.constexpr(4)
"""Steps computed at once; `rows` and `tile` are written for four."""

GROUPS = tl.constexpr(8)
"""Groups in a chunk."""


@triton.jit
def rows(x):
    """Splits a (4, N, W) tile into its four (N, W) steps, without moving data between threads."""
    N: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    low, high = tl.split(tl.permute(tl.reshape(x, (2, 2, N, W)), (1, 2, 3, 0)))
    row0, row1 = tl.split(tl.permute(low, (1, 2, 0)))
    row2, row3 = tl.split(tl.permute(high, (1, 2, 0)))
    return row0, row1, row2, row3


@triton.jit
def tile(row0, row1, row2, row3):
    """The inverse of `rows`."""
    N: tl.constexpr = row0.shape[0]
    W: tl.constexpr = row0.shape[1]
    pairs = tl.join(tl.join(row0, row1), tl.join(row2, row3))  # (N, W, 2 low bit, 2 high bit)
    return tl.reshape(tl.permute(pairs, (3, 2, 0, 1)), (4, N, W))


@triton.jit
def fold(x, W: tl.constexpr, BIT: tl.constexpr):
    """Halves the rows of x (R, W): lanes without BIT add up the first half of the rows, lanes with it the second."""
    R: tl.constexpr = x.shape[0] // 2
    lane = tl.arange(0, W)
    first, second = tl.split(tl.permute(tl.reshape(x, (2, R, W)), (1, 2, 0)))
    upper = ((lane & BIT) != 0)[None, :]
    kept = tl.where(upper, second, first)
    sent = tl.where(upper, first, second)
    return kept + tl.gather(sent, tl.broadcast_to((lane ^ BIT)[None, :], (R, W)), 1)


@triton.jit
def sum_channels(x):
    """Sums a (G, N, W) tile over its channels; returns (G N / W, W) with the sum of row l G N / W + r at [r, l].

    Each halving moves half of the values that are left, about one shuffle per value in all. A plain sum over the last
    axis moves every value log2(W) times and leaves W copies of the result.
    """
    W: tl.constexpr = x.shape[2]
    x = tl.reshape(x, (x.shape[0] * x.shape[1], W))
    if W == 32:
        x = fold(x, W, 16)
    x = fold(x, W, 8)
    x = fold(x, W, 4)
    x = fold(x, W, 2)
    return fold(x, W, 1)


@triton.jit
def load(base, row_stride, t, end, columns, width):
    """Rows t .. t + G - 1, counted from `base`, of a row-major matrix, in float32; zero from row `end` on."""
    row = t + tl.arange(0, GROUP)[:, None]
    mask = (row < end) & (columns[None, :] < width)
    return tl.load(base + (row * row_stride + columns[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(base, row_stride, t, end, columns, width, values):
    """Writes the rows that `load` would read, in the matrix' own type."""
    row = t + tl.arange(0, GROUP)[:, None]
    mask = (row < end) & (columns[None, :] < width)
    tl.store(base + (row * row_stride + columns[None, :]), values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(vector, columns, width):
    """A (W,) parameter in float32, zero where it is absent."""
    values = tl.zeros_like(columns).to(tl.float32)
    if vector is not None:
        values = tl.load(vector + columns, mask=columns < width, other=0.0).to(tl.float32)
    return values


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, relative error 2e-7: x times a Chebyshev fit of log(1 + x) / x of degree 9."""
    p = -0.00317605701 * x + 0.0195425272
    p = p * x - 0.0563736127
    p = p * x + 0.105436238
    p = p * x - 0.152696671
    p = p * x + 0.196632743
    p = p * x - 0.249516163
    p = p * x + 0.333297105
    p = p * x - 0.499998926
    p = p * x + 0.999999995
    return p * x


@triton.jit
def sigmoid(x):
    """Without a case for large |x|: exp2 overflows to inf there, and 1 / inf is the right answer."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def step_sizes(dt, bias, left, SOFTPLUS: tl.constexpr):
    """Step sizes (G, W) and their derivatives by dt. Only `left` steps exist; delta 0 makes the others do nothing."""
    x = dt + bias[None, :]
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SOFTPLUS:
        e = tl.exp2(tl.abs(x) * -LOG2E)
        slope = tl.where(x > 0, 1.0, e) / (1.0 + e)
        x = tl.maximum(x, 0.0) + log1p(e)
    return tl.where(tl.arange(0, GROUP)[:, None] < left, x, 0.0), slope


@triton.jit
def resets(segment_ids, t0, T):
    """(G,) whether a new segment starts at the step."""
    t = t0 + tl.arange(0, GROUP)
    inside = (t > 0) & (t < T)
    here = tl.load(segment_ids + t, mask=inside, other=0)
    return here != tl.load(segment_ids + t - 1, mask=inside, other=0)


@triton.jit
def decays(delta, A, segment_ids, t0, T):
    """exp(delta A) as a (G, N, W) tile, zero where a segment starts; A (N, W) comes scaled by log2(e)."""
    decay = tl.exp2(delta[:, None, :] * A[None, :, :])
    if segment_ids is not None:
        decay = tl.where(resets(segment_ids, t0, T)[:, None, None], 0.0, decay)
    return decay


@triton.jit
def advance(h, decay, x):
    """The states after each of the G steps: h_t = decay_t h_{t-1} + x_t."""
    decay0, decay1, decay2, decay3 = rows(decay)
    x0, x1, x2, x3 = rows(x)
    h0 = decay0 * h + x0
    h1 = decay1 * h0 + x1
    h2 = decay2 * h1 + x2
    h3 = decay3 * h2 + x3
    return h0, h1, h2, h3


@triton.jit
def retreat(q, decay, v):
    """The same backwards: g_t = q_{t+1} + v_t is the gradient of h_t, q_t = decay_t g_t that which reaches h_{t-1}.

    Returns every g as one tile, then q of the four steps; v is what the outputs send to the states.
    """
    decay0, decay1, decay2, decay3 = rows(decay)
    v0, v1, v2, v3 = rows(v)
    g3 = q + v3
    q3 = decay3 * g3
    g2 = q3 + v2
    q2 = decay2 * g2
    g1 = q2 + v1
    q1 = decay1 * g1
    g0 = q1 + v0
    return tile(g0, g1, g2, g3), decay0 * g0, q1, q2, q3
