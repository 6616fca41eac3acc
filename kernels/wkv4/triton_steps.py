"""Steps that the Triton kernels of wkv4 are made of: a state, what a token does to it, and the way back.

Shape letters: T time, D channels, W channels of one program. A state is four tiles (1, W): numerator p, denominator q,
base and age of the exponent (README). Four steps of an input are one tile (4, W).
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels import triton_tiles as tiles
from zoo.kernels.triton_tiles import GROUP, LOG2E

NEUTRAL = tl.constexpr(-1e38)
"""Exponent of a state that holds nothing, as in `reference.NEUTRAL`."""


@triton.jit
def rows(x):
    """The four steps (1, W) of a tile (4, W)."""
    return tiles.rows(tl.reshape(x, (GROUP, 1, x.shape[1])))


@triton.jit
def tile(row0, row1, row2, row3):
    """The inverse of `rows`."""
    return tl.reshape(tiles.tile(row0, row1, row2, row3), (GROUP, row0.shape[1]))


@triton.jit
def weights(lead):
    """Weights of past and token, the larger of them 1, where the past's scale leads the token's by `lead` (log2)."""
    smaller = tl.exp2(-tl.abs(lead))
    return tl.where(lead < 0, smaller, 1.0), tl.where(lead < 0, 1.0, smaller)


@triton.jit
def restarts(segment_ids, t0, T, W: tl.constexpr):
    """For each of four steps (1, W) whether a segment starts there."""
    return rows(tl.broadcast_to(tiles.resets(segment_ids, t0, T).to(tl.int32)[:, None], (GROUP, W)))


@triton.jit
def restart(p, q, base, age, starts):
    """The state before any token where a segment starts."""
    return (
        tl.where(starts > 0, 0.0, p),
        tl.where(starts > 0, 0.0, q),
        tl.where(starts > 0, NEUTRAL, base),
        tl.where(starts > 0, 0.0, age),
    )


@triton.jit
def advance(p, q, base, age, key, value, decay, inside):
    """The state after a token, and what the old state and the token were multiplied with; 1 and 0 if not `inside`."""
    older = age + 1.0
    lead = older * decay - (key - base) * LOG2E
    keep, add = weights(lead)
    keep = tl.where(inside, keep, 1.0)
    add = tl.where(inside, add, 0.0)
    base = tl.where(inside & (lead < 0), key, base)
    age = tl.where(inside, tl.where(lead < 0, 0.0, older), age)
    return keep * p + add * value, keep * q + add, base, age, keep, add


@triton.jit
def output(p, q, base, age, key, value, bonus, decay):
    """y, and the weights of past and token over the denominator."""
    past, now = weights(age * decay - (key - base) * LOG2E - bonus)
    share = 1.0 / (past * q + now)
    return (past * p + now * value) * share, past * share, now * share


@triton.jit
def advance_group(p, q, base, age, keys, values, decay, segment_ids, t0, T):
    """The state after four steps."""
    k0, k1, k2, k3 = rows(keys)
    v0, v1, v2, v3 = rows(values)
    if segment_ids is not None:
        r0, r1, r2, r3 = restarts(segment_ids, t0, T, keys.shape[1])
        p, q, base, age = restart(p, q, base, age, r0)
    p, q, base, age, _, _ = advance(p, q, base, age, k0, v0, decay, t0 < T)
    if segment_ids is not None:
        p, q, base, age = restart(p, q, base, age, r1)
    p, q, base, age, _, _ = advance(p, q, base, age, k1, v1, decay, t0 + 1 < T)
    if segment_ids is not None:
        p, q, base, age = restart(p, q, base, age, r2)
    p, q, base, age, _, _ = advance(p, q, base, age, k2, v2, decay, t0 + 2 < T)
    if segment_ids is not None:
        p, q, base, age = restart(p, q, base, age, r3)
    p, q, base, age, _, _ = advance(p, q, base, age, k3, v3, decay, t0 + 3 < T)
    return p, q, base, age


@triton.jit
def load_state(place, D, d):
    """Four rows of D numbers from `place` on."""
    mask = d < D
    return (
        tl.load(place + d, mask=mask, other=0.0),
        tl.load(place + D + d, mask=mask, other=0.0),
        tl.load(place + 2 * D + d, mask=mask, other=0.0),
        tl.load(place + 3 * D + d, mask=mask, other=0.0),
    )


@triton.jit
def store_state(place, D, d, p, q, base, age):
    """Writes what `load_state` reads."""
    mask = d < D
    tl.store(place + d, p, mask=mask)
    tl.store(place + D + d, q, mask=mask)
    tl.store(place + 2 * D + d, base, mask=mask)
    tl.store(place + 3 * D + d, age, mask=mask)


@triton.jit
def retreat(dp, dq, y, past, now, keep, add, value, gradient):
    """One step back: the gradients of the state before it, of the value and of the key."""
    from_now = now * gradient
    from_past = past * gradient
    dkey = from_now * (value - y) + add * (dp * value + dq)
    return keep * dp + from_past, keep * dq - from_past * y, from_now + add * dp, dkey


@triton.jit
def stop(dp, dq, factor, starts):
    """Nothing flows back across the start of a segment."""
    return tl.where(starts > 0, 0.0, dp), tl.where(starts > 0, 0.0, dq), tl.where(starts > 0, 0.0, factor)
