"""Triton kernels of RWKV-7's recurrence; `triton_backend` launches them.

Shape letters: T time, H heads, K key channels of a head (padded to a power of two where it names a tile), V value
channels of a head, W = value channels of one program.

How the work is laid out. The rows of a state, one per value channel, do not act on each other: a program walks through
time for one head of one batch row and W rows, with their state (W, K) in registers. Keys lie innermost in memory and in
the lanes of a warp, so that a vector over keys takes few registers and loads at full width; sums over keys go through
shuffles. A step depends on the one before, so what hides the latency of memory is that the loads of the next step are
issued before the arithmetic of this one, and that other programs run beside it.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ["T", "first", "last", "sums_steps"]
"""Arguments whose divisibility brings nothing: one compiled kernel serves every length."""


@triton.jit
def load(base, columns, width, exists):
    """One row in float32; zero outside, or everywhere if the step does not exist."""
    return tl.load(base + columns, mask=(columns < width) & exists, other=0.0).to(tl.float32)


@triton.jit
def store(base, columns, width, values):
    """Writes a row in the memory's own type."""
    tl.store(base + columns, values.to(base.dtype.element_ty), mask=columns < width)


@triton.jit
def begins(segment_ids, t):
    """Whether a new segment begins at step t; segment_ids may be None."""
    new = False
    if segment_ids is not None:
        new = (t > 0) & (tl.load(segment_ids + t) != tl.load(segment_ids + tl.maximum(t - 1, 0)))
    return new


@triton.jit
def advance(state, read, decay, k, v, b):
    """The state after a step, from what the step read from it."""
    return state * decay[None, :] + (read[:, None] * b[None, :] + v[:, None] * k[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    r, w, k, v, a, b, initial_state, segment_ids, y, final_state, checkpoints,
    T, H, V, slab_rows,
    r_batch, r_row, r_head, w_batch, w_row, w_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, a_batch, a_row, a_head, b_batch, b_row, b_head,
    K: tl.constexpr, K_PAD: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and (where `checkpoints` is not None) the state at the start of every chunk."""
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * W + tl.arange(0, W)
    j = tl.arange(0, K_PAD)
    inside = (i[:, None] < V) & (j[None, :] < K)
    place = i[:, None] * K + j[None, :]
    r += n * r_batch + h * r_head
    w += n * w_batch + h * w_head
    k += n * k_batch + h * k_head
    v += n * v_batch + h * v_head
    a += n * a_batch + h * a_head
    b += n * b_batch + h * b_head
    y += (n * T * H + h) * V
    if segment_ids is not None:
        segment_ids += n * T

    state = tl.load(initial_state + (n * H + h) * V * K + place, mask=inside, other=0.0)
    next_r = load(r, j, K, True)
    next_w = load(w, j, K, True)
    next_k = load(k, j, K, True)
    next_v = load(v, i, V, True)
    next_a = load(a, j, K, True)
    next_b = load(b, j, K, True)
    for t in range(T):
        if checkpoints is not None:  # noqa: SIM102  only alone is it decided when compiling (Triton 3.3)
            if t % CHUNK == 0:
                slab = ((n * tl.cdiv(T, CHUNK) + t // CHUNK) * H + h) * slab_rows * K
                tl.store(checkpoints + slab + place, state, mask=inside)
        receptance = next_r
        decay = tl.exp(next_w)
        key = next_k
        value = next_v
        removal = next_a
        change = next_b
        r += r_row
        w += w_row
        k += k_row
        v += v_row
        a += a_row
        b += b_row
        more = t + 1 < T
        next_r = load(r, j, K, more)
        next_w = load(w, j, K, more)
        next_k = load(k, j, K, more)
        next_v = load(v, i, V, more)
        next_a = load(a, j, K, more)
        next_b = load(b, j, K, more)

        state = tl.where(begins(segment_ids, t), 0.0, state)
        read = tl.sum(state * removal[None, :], 1)
        state = advance(state, read, decay, key, value, change)
        store(y, i, V, tl.sum(state * receptance[None, :], 1))
        y += H * V
    tl.store(final_state + (n * H + h) * V * K + place, state, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def backward_kernel(
    dy, r, w, k, v, a, b, checkpoints, segment_ids, dfinal_state,
    scratch, reads, dr_sums, dw_sums, dk_sums, da_sums, db_sums, dv, dinitial_state,
    T, H, V, slab_rows,
    r_batch, r_row, r_head, w_batch, w_row, w_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, a_batch, a_row, a_head, b_batch, b_row, b_head,
    first, last, sums_steps,
    K: tl.constexpr, K_PAD: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of the steps from first (a multiple of CHUNK) up to last, chunk by chunk backwards through time.

    Each chunk is walked through twice: forwards from its checkpoint, keeping the state before every step in this
    program's scratch, then backwards. Sums over value channels are those of this program's alone.
    """
    block = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, W)
    i = block * W + lane
    j = tl.arange(0, K_PAD)
    inside = (i[:, None] < V) & (j[None, :] < K)
    place = i[:, None] * K + j[None, :]
    own_place = lane[:, None] * K_PAD + j[None, :]
    program = (n * H + h) * tl.num_programs(0) + block
    scratch += program * (CHUNK * W * K_PAD) + own_place
    reads += program * (CHUNK * W) + lane
    r += n * r_batch + h * r_head
    w += n * w_batch + h * w_head
    k += n * k_batch + h * k_head
    v += n * v_batch + h * v_head
    a += n * a_batch + h * a_head
    b += n * b_batch + h * b_head
    dy += (n * T * H + h) * V
    dv += (n * T * H + h) * V
    sums = ((block * tl.num_programs(2) + n) * sums_steps * H + h) * K
    if segment_ids is not None:
        segment_ids += n * T

    flow = tl.load(dfinal_state + (n * H + h) * V * K + place, mask=inside, other=0.0)
    chunks = tl.cdiv(last - first, CHUNK)
    for c in range(chunks):
        start = first + (chunks - 1 - c) * CHUNK
        steps = tl.minimum(CHUNK, last - start)
        slab = ((n * tl.cdiv(T, CHUNK) + start // CHUNK) * H + h) * slab_rows * K
        state = tl.load(checkpoints + slab + place, mask=inside, other=0.0)
        t = start + n * 0  # in 64 bits, as every offset that grows with time
        next_w = load(w + t * w_row, j, K, True)
        next_k = load(k + t * k_row, j, K, True)
        next_v = load(v + t * v_row, i, V, True)
        next_a = load(a + t * a_row, j, K, True)
        next_b = load(b + t * b_row, j, K, True)
        next_dy = load(dy + t * H * V, i, V, True)
        for s in range(steps):
            t = start + s + n * 0
            decay = tl.exp(next_w)
            key = next_k
            value = next_v
            removal = next_a
            change = next_b
            gradient = next_dy
            more = s + 1 < steps
            next_w = load(w + (t + 1) * w_row, j, K, more)
            next_k = load(k + (t + 1) * k_row, j, K, more)
            next_v = load(v + (t + 1) * v_row, i, V, more)
            next_a = load(a + (t + 1) * a_row, j, K, more)
            next_b = load(b + (t + 1) * b_row, j, K, more)
            next_dy = load(dy + (t + 1) * H * V, i, V, more)

            state = tl.where(begins(segment_ids, t), 0.0, state)
            read = tl.sum(state * removal[None, :], 1)
            tl.store(scratch + s * (W * K_PAD), state)
            tl.store(reads + s * W, read)
            state = advance(state, read, decay, key, value, change)
            store(dr_sums + sums + (t - first) * H * K, j, K, tl.sum(state * gradient[:, None], 0))
        tl.debug_barrier()

        t = start + steps - 1 + n * 0
        next_r = load(r + t * r_row, j, K, True)
        next_w = load(w + t * w_row, j, K, True)
        next_k = load(k + t * k_row, j, K, True)
        next_v = load(v + t * v_row, i, V, True)
        next_a = load(a + t * a_row, j, K, True)
        next_b = load(b + t * b_row, j, K, True)
        next_dy = load(dy + t * H * V, i, V, True)
        for back in range(steps):
            s = steps - 1 - back
            t = start + s + n * 0
            state = tl.load(scratch + s * (W * K_PAD))
            read = tl.load(reads + s * W)
            receptance = next_r
            decay = tl.exp(next_w)
            key = next_k
            value = next_v
            removal = next_a
            change = next_b
            gradient = next_dy
            more = s > 0
            next_r = load(r + (t - 1) * r_row, j, K, more)
            next_w = load(w + (t - 1) * w_row, j, K, more)
            next_k = load(k + (t - 1) * k_row, j, K, more)
            next_v = load(v + (t - 1) * v_row, i, V, more)
            next_a = load(a + (t - 1) * a_row, j, K, more)
            next_b = load(b + (t - 1) * b_row, j, K, more)
            next_dy = load(dy + (t - 1) * H * V, i, V, more)

            flow += gradient[:, None] * receptance[None, :]
            store(dv + t * H * V, i, V, tl.sum(flow * key[None, :], 1))
            dread = tl.sum(flow * change[None, :], 1)
            here = sums + (t - first) * H * K
            store(dk_sums + here, j, K, tl.sum(flow * value[:, None], 0))
            store(db_sums + here, j, K, tl.sum(flow * read[:, None], 0))
            store(da_sums + here, j, K, tl.sum(state * dread[:, None], 0))
            flow *= decay[None, :]
            store(dw_sums + here, j, K, tl.sum(flow * state, 0))
            flow += dread[:, None] * removal[None, :]
            flow = tl.where(begins(segment_ids, t), 0.0, flow)
        tl.debug_barrier()
    tl.store(dinitial_state + (n * H + h) * V * K + place, flow, mask=inside)
