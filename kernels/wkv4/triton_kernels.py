"""Triton kernels of wkv4; `triton_backend` launches them, `triton_steps` holds their parts.

Shape letters: T time, D channels, W channels of one program. A state is four tiles (1, W): numerator p, denominator q,
base and age of the exponent (README). Four steps of an input are one tile (4, W).

How the work is laid out. A program of one warp walks through time for one batch row and W = 32 channels, one channel
per lane, four steps at once: the loads of the next four are issued before the arithmetic of these. Every pointer is
exempt from alignment specialisation (`UNALIGNED`): with no known alignment there is nothing to vectorise, the compiler
keeps one channel per lane, and no value ever moves between threads.

Where a batch has too few channels to fill the device, time is cut into slices that run side by side, of which
`slice_kernel` and a `LOCAL` run of `backward_kernel` find out first what they do to a state or a gradient that enters.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels import triton_tiles as tiles
from zoo.kernels.triton_tiles import CHUNK, GROUP, GROUPS, LOG2E
from zoo.kernels.wkv4 import triton_steps as steps

UNALIGNED = [
    "w", "u", "k", "v", "initial_state", "y", "final_state", "checkpoints", "slice_states",
    "dy", "dfinal_state", "slice_flows", "scratch", "dk", "dv", "dw_sums", "du_sums", "dinitial_state",
]  # fmt: skip
LENGTHS = ["T", "slice_steps"]
"""Arguments whose divisibility brings nothing: one compiled kernel serves every length."""


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def slice_kernel(
    w, k, v, segment_ids, slice_states,
    T, D, k_batch, k_row, v_batch, v_row, slice_steps,
    W: tl.constexpr,
):  # fmt: skip
    """The state that each time slice makes out of no state, and in a fifth row whether a segment starts in it."""
    s = tl.program_id(2)
    b = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * W + tl.arange(0, W)
    d = columns[None, :]
    decay = tl.load(w + d, mask=d < D, other=0.0).to(tl.float32) * LOG2E
    begin = s * slice_steps
    k += b * k_batch + begin.to(tl.int64) * k_row
    v += b * v_batch + begin.to(tl.int64) * v_row
    if segment_ids is not None:
        segment_ids += b * T
    p = tl.zeros((1, W), tl.float32)
    q = tl.zeros((1, W), tl.float32)
    base = tl.full((1, W), steps.NEUTRAL, tl.float32)
    age = tl.zeros((1, W), tl.float32)
    cut = 0
    next_k = tiles.load(k, k_row, 0, T - begin, columns, D)
    next_v = tiles.load(v, v_row, 0, T - begin, columns, D)
    for t in range(0, slice_steps, GROUP):  # every slice but the last is full, and the last is not asked for
        keys = next_k
        values = next_v
        next_k = tiles.load(k, k_row, t + GROUP, T - begin, columns, D)
        next_v = tiles.load(v, v_row, t + GROUP, T - begin, columns, D)
        p, q, base, age = steps.advance_group(p, q, base, age, keys, values, decay, segment_ids, begin + t, T)
        if segment_ids is not None:
            cut += tl.sum(tiles.resets(segment_ids, begin + t, T).to(tl.int32), 0)
    place = slice_states + (b * tl.num_programs(2) + s) * 5 * D
    steps.store_state(place, D, d, p, q, base, age)
    tl.store(place + 4 * D + d, tl.zeros((1, W), tl.float32) + cut, mask=d < D)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    w, u, k, v, initial_state, segment_ids, slice_states, y, final_state, checkpoints,
    T, D, k_batch, k_row, v_batch, v_row, slice_steps,
    W: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and (where `checkpoints` is not None) the state at the start of every chunk."""
    s = tl.program_id(2)
    b = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * W + tl.arange(0, W)
    d = columns[None, :]
    mask = d < D
    log_decay = tl.load(w + d, mask=mask, other=0.0).to(tl.float32)
    decay = log_decay * LOG2E
    bonus = tl.load(u + d, mask=mask, other=0.0).to(tl.float32) * LOG2E
    initial_state += b * 3 * D
    p = tl.load(initial_state + d, mask=mask, other=0.0)
    q = tl.load(initial_state + D + d, mask=mask, other=0.0)
    base = tl.load(initial_state + 2 * D + d, mask=mask, other=0.0)
    age = tl.zeros((1, W), tl.float32)
    if slice_states is not None:
        for earlier in range(s):
            place = slice_states + (b * (tl.num_programs(2) - 1) + earlier) * 5 * D
            p2, q2, base2, age2 = steps.load_state(place, D, d)
            cut = tl.load(place + 4 * D + d, mask=mask, other=0.0) > 0
            older = age + slice_steps
            lead = (older - age2) * decay - (base2 - base) * LOG2E
            keep, add = steps.weights(lead)
            p = tl.where(cut, p2, keep * p + add * p2)
            q = tl.where(cut, q2, keep * q + add * q2)
            base = tl.where(cut | (lead < 0), base2, base)
            age = tl.where(cut | (lead < 0), age2, older)

    begin = s * slice_steps
    end = tl.minimum(begin + slice_steps, T)
    t = begin.to(tl.int64)
    k += b * k_batch + t * k_row
    v += b * v_batch + t * v_row
    y += (b * T + t) * D
    if segment_ids is not None:
        segment_ids += b * T
    next_k = tiles.load(k, k_row, 0, T - begin, columns, D)
    next_v = tiles.load(v, v_row, 0, T - begin, columns, D)
    for i in range(tl.cdiv(end - begin, GROUP)):
        t0 = begin + i * GROUP
        left = T - t0
        if checkpoints is not None:  # noqa: SIM102  only alone is it decided when compiling (Triton 3.3)
            if t0 % CHUNK == 0:
                steps.store_state(checkpoints + (b * tl.cdiv(T, CHUNK) + t0 // CHUNK) * 4 * D, D, d, p, q, base, age)
        k0, k1, k2, k3 = steps.rows(next_k)
        v0, v1, v2, v3 = steps.rows(next_v)
        next_k = tiles.load(k, k_row, GROUP, left, columns, D)
        next_v = tiles.load(v, v_row, GROUP, left, columns, D)
        k += GROUP * k_row
        v += GROUP * v_row
        if segment_ids is not None:
            r0, r1, r2, r3 = steps.restarts(segment_ids, t0, T, W)
            p, q, base, age = steps.restart(p, q, base, age, r0)
        y0, _, _ = steps.output(p, q, base, age, k0, v0, bonus, decay)
        p, q, base, age, _, _ = steps.advance(p, q, base, age, k0, v0, decay, left > 0)
        if segment_ids is not None:
            p, q, base, age = steps.restart(p, q, base, age, r1)
        y1, _, _ = steps.output(p, q, base, age, k1, v1, bonus, decay)
        p, q, base, age, _, _ = steps.advance(p, q, base, age, k1, v1, decay, left > 1)
        if segment_ids is not None:
            p, q, base, age = steps.restart(p, q, base, age, r2)
        y2, _, _ = steps.output(p, q, base, age, k2, v2, bonus, decay)
        p, q, base, age, _, _ = steps.advance(p, q, base, age, k2, v2, decay, left > 2)
        if segment_ids is not None:
            p, q, base, age = steps.restart(p, q, base, age, r3)
        y3, _, _ = steps.output(p, q, base, age, k3, v3, bonus, decay)
        p, q, base, age, _, _ = steps.advance(p, q, base, age, k3, v3, decay, left > 3)
        tiles.store(y, D, 0, left, columns, D, steps.tile(y0, y1, y2, y3))
        y += GROUP * D
    if end == T:
        final_state += b * 3 * D
        tl.store(final_state + d, p, mask=mask)
        tl.store(final_state + D + d, q, mask=mask)
        tl.store(final_state + 2 * D + d, base + age * log_decay, mask=mask)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    dy, dfinal_state, w, u, k, v, segment_ids, checkpoints, slice_flows, scratch,
    dk, dv, dw_sums, du_sums, dinitial_state,
    T, D, k_batch, k_row, v_batch, v_row, slice_steps,
    W: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Gradients, chunk by chunk backwards through time.

    Each chunk is walked through twice: forwards from its checkpoint, keeping the state before every four steps in this
    program's scratch, then backwards, where the states in between are recomputed in registers.

    With LOCAL the gradient that enters a slice from the future is taken for 0, nothing but `slice_flows` is written:
    the gradients that leave the slice, and the factor by which one that enters would be multiplied on its way out.
    """
    s = tl.program_id(2) + LOCAL  # nobody asks what leaves the first slice
    slices = tl.num_programs(2) + LOCAL
    b = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, W)
    columns = tl.program_id(0) * W + lane
    d = columns[None, :]
    mask = d < D
    decay = tl.load(w + d, mask=mask, other=0.0).to(tl.float32) * LOG2E
    bonus = tl.load(u + d, mask=mask, other=0.0).to(tl.float32) * LOG2E
    k += b * k_batch
    v += b * v_batch
    dy += b * T * D
    if segment_ids is not None:
        segment_ids += b * T
    if not LOCAL:
        dk += b * T * D
        dv += b * T * D
    checkpoints += b * tl.cdiv(T, CHUNK) * 4 * D
    scratch += ((b * slices + s) * tl.num_programs(0) + tl.program_id(0)) * (GROUPS * 4 * W)

    dp = tl.zeros((1, W), tl.float32)
    dq = tl.zeros((1, W), tl.float32)
    factor = dp + 1.0
    if not LOCAL:
        dp = tl.load(dfinal_state + b * 3 * D + d, mask=mask, other=0.0)
        dq = tl.load(dfinal_state + b * 3 * D + D + d, mask=mask, other=0.0)
        if slice_flows is not None:
            for i in range(slices - 1 - s):
                later = slice_flows + (b * slices + slices - 1 - i) * 3 * D + d
                through = tl.load(later + 2 * D, mask=mask, other=0.0)
                dp = through * dp + tl.load(later, mask=mask, other=0.0)
                dq = through * dq + tl.load(later + D, mask=mask, other=0.0)

    dw = tl.zeros((1, W), tl.float32)
    du = tl.zeros((1, W), tl.float32)
    begin = s * slice_steps
    end = tl.minimum(begin + slice_steps, T)
    chunks = tl.cdiv(end - begin, CHUNK)
    last = begin + chunks * CHUNK - GROUP
    next_k = tiles.load(k + last.to(tl.int64) * k_row, k_row, 0, T - last, columns, D)
    next_v = tiles.load(v + last.to(tl.int64) * v_row, v_row, 0, T - last, columns, D)
    next_dy = tiles.load(dy + last.to(tl.int64) * D, D, 0, T - last, columns, D)
    for i in range(chunks):
        chunk = begin // CHUNK + chunks - 1 - i
        start = chunk * CHUNK
        left = T - start
        k_here = k + start.to(tl.int64) * k_row
        v_here = v + start.to(tl.int64) * v_row
        dy_here = dy + start.to(tl.int64) * D
        p, q, base, age = steps.load_state(checkpoints + chunk * 4 * D, D, d)
        ahead_k = tiles.load(k_here, k_row, 0, left, columns, D)
        ahead_v = tiles.load(v_here, v_row, 0, left, columns, D)
        for j in range(GROUPS):
            steps.store_state(scratch + j * 4 * W, W, lane[None, :], p, q, base, age)
            t = j * GROUP
            keys = ahead_k
            values = ahead_v
            ahead_k = tiles.load(k_here, k_row, t + GROUP, left, columns, D)
            ahead_v = tiles.load(v_here, v_row, t + GROUP, left, columns, D)
            p, q, base, age = steps.advance_group(p, q, base, age, keys, values, decay, segment_ids, start + t, T)
        tl.debug_barrier()

        for j in range(GROUPS):
            t = (GROUPS - 1 - j) * GROUP
            p0, q0, base, age = steps.load_state(scratch + (GROUPS - 1 - j) * 4 * W, W, lane[None, :])
            k0, k1, k2, k3 = steps.rows(next_k)
            v0, v1, v2, v3 = steps.rows(next_v)
            g0, g1, g2, g3 = steps.rows(next_dy)
            t_next = tl.maximum(t - GROUP, -start)
            next_k = tiles.load(k_here, k_row, t_next, left, columns, D)
            next_v = tiles.load(v_here, v_row, t_next, left, columns, D)
            next_dy = tiles.load(dy_here, D, t_next, left, columns, D)
            inside = left - t

            if segment_ids is not None:
                r0, r1, r2, r3 = steps.restarts(segment_ids, start + t, T, W)
                p0, q0, base, age = steps.restart(p0, q0, base, age, r0)
            y0, past0, now0 = steps.output(p0, q0, base, age, k0, v0, bonus, decay)
            p1, q1, base, age, keep0, add0 = steps.advance(p0, q0, base, age, k0, v0, decay, inside > 0)
            if segment_ids is not None:
                p1, q1, base, age = steps.restart(p1, q1, base, age, r1)
            y1, past1, now1 = steps.output(p1, q1, base, age, k1, v1, bonus, decay)
            p2, q2, base, age, keep1, add1 = steps.advance(p1, q1, base, age, k1, v1, decay, inside > 1)
            if segment_ids is not None:
                p2, q2, base, age = steps.restart(p2, q2, base, age, r2)
            y2, past2, now2 = steps.output(p2, q2, base, age, k2, v2, bonus, decay)
            p3, q3, base, age, keep2, add2 = steps.advance(p2, q2, base, age, k2, v2, decay, inside > 2)
            if segment_ids is not None:
                p3, q3, base, age = steps.restart(p3, q3, base, age, r3)
            y3, past3, now3 = steps.output(p3, q3, base, age, k3, v3, bonus, decay)
            _, _, _, _, keep3, add3 = steps.advance(p3, q3, base, age, k3, v3, decay, inside > 3)

            # A step beyond the end has dy = 0 and passes the state on; only to dw it must not look like a decay.
            dw += tl.where(inside > 3, keep3 * (dp * p3 + dq * q3), 0.0)
            du += now3 * g3 * (v3 - y3)
            dp, dq, dv3, dk3 = steps.retreat(dp, dq, y3, past3, now3, keep3, add3, v3, g3)
            factor *= keep3
            if segment_ids is not None:
                dp, dq, factor = steps.stop(dp, dq, factor, r3)
            dw += tl.where(inside > 2, keep2 * (dp * p2 + dq * q2), 0.0)
            du += now2 * g2 * (v2 - y2)
            dp, dq, dv2, dk2 = steps.retreat(dp, dq, y2, past2, now2, keep2, add2, v2, g2)
            factor *= keep2
            if segment_ids is not None:
                dp, dq, factor = steps.stop(dp, dq, factor, r2)
            dw += tl.where(inside > 1, keep1 * (dp * p1 + dq * q1), 0.0)
            du += now1 * g1 * (v1 - y1)
            dp, dq, dv1, dk1 = steps.retreat(dp, dq, y1, past1, now1, keep1, add1, v1, g1)
            factor *= keep1
            if segment_ids is not None:
                dp, dq, factor = steps.stop(dp, dq, factor, r1)
            dw += tl.where(inside > 0, keep0 * (dp * p0 + dq * q0), 0.0)
            du += now0 * g0 * (v0 - y0)
            dp, dq, dv0, dk0 = steps.retreat(dp, dq, y0, past0, now0, keep0, add0, v0, g0)
            factor *= keep0
            if segment_ids is not None:
                dp, dq, factor = steps.stop(dp, dq, factor, r0)
            if not LOCAL:
                offset = start.to(tl.int64) * D
                tiles.store(dk + offset, D, t, left, columns, D, steps.tile(dk0, dk1, dk2, dk3))
                tiles.store(dv + offset, D, t, left, columns, D, steps.tile(dv0, dv1, dv2, dv3))
        tl.debug_barrier()

    row = b * slices + s
    if LOCAL:
        tl.store(slice_flows + row * 3 * D + d, dp, mask=mask)
        tl.store(slice_flows + row * 3 * D + D + d, dq, mask=mask)
        tl.store(slice_flows + row * 3 * D + 2 * D + d, factor, mask=mask)
    else:
        tl.store(dw_sums + row * D + d, dw, mask=mask)
        tl.store(du_sums + row * D + d, du, mask=mask)
        if s == 0:
            dinitial_state += b * 3 * D
            tl.store(dinitial_state + d, dp, mask=mask)
            tl.store(dinitial_state + D + d, dq, mask=mask)
            tl.store(dinitial_state + 2 * D + d, tl.zeros((1, W), tl.float32), mask=mask)
