"""Triton kernels of the selective scan; `triton_backend` launches them, `triton_tiles` holds their parts.

Shape letters: T time, D channels, N state size (padded to a power of two where it names a tile), G = GROUP steps,
W = BLOCK channels of one program. A tile written (G, N, W) holds G steps of every state of W channels.

How the work is laid out. A program walks through time for one batch row and W channels, with its states (N, W) in
registers, G steps at once: decays and inputs of the G steps are computed as (G, N, W) tiles, only the G dependent
multiply-adds follow one another. The exponentials are the bottleneck (N of them per step and channel, and the special
function unit does 16 a clock), so A is scaled by log2(e) once and exp2 is used. The loads of the next G steps are
issued before the arithmetic of this one.

Layout in registers follows from shapes. The compiler spreads the last axis of a tile over the lanes of a warp and
keeps the first in each thread, unless a load or store can be vectorised, whose layout then spreads to the arithmetic.
For the (N, W) tiles that would put states in lanes and every sum over N through shuffles. Their pointers are therefore
exempt from alignment specialisation (`UNALIGNED`): with no known alignment there is nothing to vectorise, and channels
stay in lanes. In memory such tiles lie with channels innermost, (..., N, D).
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels import triton_tiles as tiles
from zoo.kernels.triton_tiles import CHUNK, GROUP, GROUPS, LN2, LOG2E

UNALIGNED = [
    "A", "initial_state", "final_state", "checkpoints", "slice_states", "slice_decays",
    "scratch", "dA_sums", "dfinal_state", "dinitial_state",
]  # fmt: skip
LENGTHS = ["T", "first", "last", "slice_steps", "sums_steps"]
"""Arguments whose divisibility brings nothing: one compiled kernel serves every length."""


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def slice_kernel(
    x, dt, A, M, z, dt_bias, segment_ids, slice_states, slice_decays,
    T, D, x_batch, x_row, dt_batch, dt_row, M_batch, M_row, z_batch, z_row, first, last, slice_steps,
    N: tl.constexpr, N_PAD: tl.constexpr, W: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each time slice does to a state that enters it: h -> decay h + state, both stored (B, slices, N, D).

    With it the slices of one row can run side by side. Forwards x is u and M is B; with REVERSE the state is the
    gradient that enters from the future, x is dy and M is C. Slices cover the steps from first up to last.
    """
    s = tl.program_id(2) + REVERSE
    slices = tl.num_programs(2) + 1
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * W + tl.arange(0, W)
    n = tl.arange(0, N_PAD)
    inside = (n[:, None] < N) & (d[None, :] < D)
    A = tl.load(A + (n[:, None] * D + d[None, :]), mask=inside, other=0.0) * LOG2E
    bias = tiles.load_vector(dt_bias, d, D)
    x += b * x_batch
    dt += b * dt_batch
    M += b * M_batch
    if z is not None:
        z += b * z_batch
    if segment_ids is not None:
        segment_ids += b * T

    begin = first + s * slice_steps
    end = tl.minimum(begin + slice_steps, last)
    state = tl.zeros((N_PAD, W), tl.float32)
    total = tl.zeros((W,), tl.float32)
    cut = 0
    groups = tl.cdiv(end - begin, GROUP)
    for i in range(groups):
        t0 = begin + i * GROUP
        if REVERSE:
            t0 = begin + (groups - 1 - i) * GROUP
        left = T - t0
        t = t0.to(tl.int64)
        delta, _ = tiles.step_sizes(tiles.load(dt + t * dt_row, dt_row, 0, left, d, D), bias, left, SOFTPLUS)
        value = tiles.load(x + t * x_row, x_row, 0, left, d, D)
        if not REVERSE:
            value *= delta
        elif z is not None:
            gate = tiles.load(z + t * z_row, z_row, 0, left, d, D)
            value *= gate * tiles.sigmoid(gate)
        matrix = tiles.load(M + t * M_row, M_row, 0, left, n, N)
        inputs = value[:, None, :] * matrix[:, :, None]
        decay = tiles.decays(delta, A, segment_ids, t0, T)
        if REVERSE:
            _, state, _, _, _ = tiles.retreat(state, decay, inputs)
        else:
            _, _, _, state = tiles.advance(state, decay, inputs)
        total += tl.sum(delta, 0)
        if segment_ids is not None:
            cut += tl.sum(tiles.resets(segment_ids, t0, T).to(tl.int32), 0)
    place = (b * slices + s) * N * D + (n[:, None] * D + d[None, :])
    tl.store(slice_states + place, state, mask=inside)
    tl.store(slice_decays + place, tl.where(cut > 0, 0.0, tl.exp2(A * total[None, :])), mask=inside)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    u, dt, A, B, C, skip, z, dt_bias, initial_state, segment_ids, slice_states, slice_decays,
    y, final_state, checkpoints,
    T, D, u_batch, u_row, dt_batch, dt_row, B_batch, B_row, C_batch, C_row, z_batch, z_row, slice_steps,
    N: tl.constexpr, N_PAD: tl.constexpr, W: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Outputs, final state and (where `checkpoints` is not None) the state at the start of every chunk."""
    s = tl.program_id(2)
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * W + tl.arange(0, W)
    n = tl.arange(0, N_PAD)
    inside = (n[:, None] < N) & (d[None, :] < D)
    place = n[:, None] * D + d[None, :]
    A = tl.load(A + place, mask=inside, other=0.0) * LOG2E
    skip_weight = tiles.load_vector(skip, d, D)
    bias = tiles.load_vector(dt_bias, d, D)
    u += b * u_batch
    dt += b * dt_batch
    B += b * B_batch
    C += b * C_batch
    y += b * T * D
    if z is not None:
        z += b * z_batch
    if segment_ids is not None:
        segment_ids += b * T

    # Always loaded, of zeros if need be: a loaded tile fixes the layout of all that is computed from it, a constant
    # leaves it open, and the compiler then computes some (G, N, W) tiles twice, in two layouts.
    h = tl.load(initial_state + b * N * D + place, mask=inside, other=0.0)
    if slice_states is not None:
        for earlier in range(s):
            before = (b * tl.num_programs(2) + earlier) * N * D + place
            decay = tl.load(slice_decays + before, mask=inside, other=0.0)
            h = decay * h + tl.load(slice_states + before, mask=inside, other=0.0)

    begin = s * slice_steps
    end = tl.minimum(begin + slice_steps, T)
    t = begin.to(tl.int64)
    u += t * u_row
    dt += t * dt_row
    B += t * B_row
    C += t * C_row
    y += t * D
    next_u = tiles.load(u, u_row, 0, T - begin, d, D)
    next_dt = tiles.load(dt, dt_row, 0, T - begin, d, D)
    next_B = tiles.load(B, B_row, 0, T - begin, n, N)
    next_C = tiles.load(C, C_row, 0, T - begin, n, N)
    next_z = next_u
    if z is not None:
        z += t * z_row
        next_z = tiles.load(z, z_row, 0, T - begin, d, D)
    for i in range(tl.cdiv(end - begin, GROUP)):
        t0 = begin + i * GROUP
        left = T - t0
        if checkpoints is not None:  # noqa: SIM102  only alone is it decided when compiling (Triton 3.3)
            if t0 % CHUNK == 0:
                chunk = b * tl.cdiv(T, CHUNK) + t0 // CHUNK
                tl.store(checkpoints + chunk * N * D + place, h, mask=inside)
        delta, _ = tiles.step_sizes(next_dt, bias, left, SOFTPLUS)
        value = next_u
        gate = next_z
        matrix_B = next_B
        matrix_C = next_C
        next_u = tiles.load(u, u_row, GROUP, left, d, D)
        next_dt = tiles.load(dt, dt_row, GROUP, left, d, D)
        next_B = tiles.load(B, B_row, GROUP, left, n, N)
        next_C = tiles.load(C, C_row, GROUP, left, n, N)
        next_z = next_u
        if z is not None:
            next_z = tiles.load(z, z_row, GROUP, left, d, D)
            z += GROUP * z_row
        u += GROUP * u_row
        dt += GROUP * dt_row
        B += GROUP * B_row
        C += GROUP * C_row

        decay = tiles.decays(delta, A, segment_ids, t0, T)
        h0, h1, h2, h = tiles.advance(h, decay, (delta * value)[:, None, :] * matrix_B[:, :, None])
        out = tl.sum(tiles.tile(h0, h1, h2, h) * matrix_C[:, :, None], 1) + skip_weight[None, :] * value
        if z is not None:
            out *= gate * tiles.sigmoid(gate)
        tiles.store(y, D, 0, left, d, D, out)
        y += GROUP * D
    if end == T:
        tl.store(final_state + b * N * D + place, h, mask=inside)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    dy, u, dt, A, B, C, skip, z, dt_bias, checkpoints, segment_ids, dfinal_state, slice_states, slice_decays,
    scratch, du, ddt, dz, dB_sums, dC_sums, dA_sums, dskip_sums, dbias_sums, dinitial_state,
    T, D, u_batch, u_row, dt_batch, dt_row, B_batch, B_row, C_batch, C_row, z_batch, z_row,
    first, last, sums_steps, slice_steps,
    N: tl.constexpr, N_PAD: tl.constexpr, W: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradients of the steps from first up to last, chunk by chunk backwards through time.

    Each chunk is walked through twice: forwards from its checkpoint, keeping the state before every group in this
    program's scratch, then backwards, where the states within a group are recomputed in registers.
    """
    s = tl.program_id(2)
    slices = tl.num_programs(2)
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, W)
    d = block * W + lane
    n = tl.arange(0, N_PAD)
    inside = (n[:, None] < N) & (d[None, :] < D)
    place = n[:, None] * D + d[None, :]
    A = tl.load(A + place, mask=inside, other=0.0) * LOG2E
    skip_weight = tiles.load_vector(skip, d, D)
    bias = tiles.load_vector(dt_bias, d, D)
    dy += b * T * D
    u += b * u_batch
    dt += b * dt_batch
    B += b * B_batch
    C += b * C_batch
    du += b * T * D
    ddt += b * T * D
    if z is not None:
        z += b * z_batch
        dz += b * T * D
    if segment_ids is not None:
        segment_ids += b * T
    checkpoints += b * tl.cdiv(T, CHUNK) * N * D
    program = (b * slices + s) * tl.num_programs(0) + block
    own_place = n[:, None] * W + lane[None, :]
    scratch += program * (GROUPS * N_PAD * W) + own_place
    PER_LANE: tl.constexpr = GROUP * N_PAD // W
    sums = (block * tl.num_programs(1) + b) * sums_steps * N_PAD
    sums += lane[None, :] * PER_LANE + tl.arange(0, PER_LANE)[:, None]

    q = tl.load(dfinal_state + b * N * D + place, mask=inside, other=0.0)
    if slice_states is not None:
        for i in range(slices - 1 - s):
            after = (b * slices + slices - 1 - i) * N * D + place
            decay = tl.load(slice_decays + after, mask=inside, other=0.0)
            q = decay * q + tl.load(slice_states + after, mask=inside, other=0.0)

    dA = tl.zeros((N_PAD, W), tl.float32)
    dskip = tl.zeros((GROUP, W), tl.float32)
    dbias = tl.zeros((GROUP, W), tl.float32)
    begin = first + s * slice_steps
    end = tl.minimum(begin + slice_steps, last)
    chunks = tl.cdiv(end - begin, CHUNK)

    offset = (begin + chunks * CHUNK).to(tl.int64)
    dy += offset * D
    u += offset * u_row
    dt += offset * dt_row
    B += offset * B_row
    C += offset * C_row
    du += offset * D
    ddt += offset * D
    left = T - (begin + chunks * CHUNK)
    next_dy = tiles.load(dy, D, -GROUP, left, d, D)
    next_u = tiles.load(u, u_row, -GROUP, left, d, D)
    next_dt = tiles.load(dt, dt_row, -GROUP, left, d, D)
    next_C = tiles.load(C, C_row, -GROUP, left, n, N)
    next_z = next_u
    if z is not None:
        z += offset * z_row
        dz += offset * D
        next_z = tiles.load(z, z_row, -GROUP, left, d, D)

    for i in range(chunks):
        start = begin + (chunks - 1 - i) * CHUNK
        left = T - start
        dy -= CHUNK * D
        u -= CHUNK * u_row
        dt -= CHUNK * dt_row
        B -= CHUNK * B_row
        C -= CHUNK * C_row
        du -= CHUNK * D
        ddt -= CHUNK * D
        if z is not None:
            z -= CHUNK * z_row
            dz -= CHUNK * D

        h = tl.load(checkpoints + (start // CHUNK).to(tl.int64) * N * D + place, mask=inside, other=0.0)
        ahead_u = tiles.load(u, u_row, 0, left, d, D)
        ahead_dt = tiles.load(dt, dt_row, 0, left, d, D)
        ahead_B = tiles.load(B, B_row, 0, left, n, N)
        for j in range(GROUPS):
            tl.store(scratch + j * (N_PAD * W), h)
            t = j * GROUP
            delta, _ = tiles.step_sizes(ahead_dt, bias, left - t, SOFTPLUS)
            weight = delta * ahead_u
            matrix_B = ahead_B
            ahead_u = tiles.load(u, u_row, t + GROUP, left, d, D)
            ahead_dt = tiles.load(dt, dt_row, t + GROUP, left, d, D)
            ahead_B = tiles.load(B, B_row, t + GROUP, left, n, N)
            decay = tiles.decays(delta, A, segment_ids, start + t, T)
            _, _, _, h = tiles.advance(h, decay, weight[:, None, :] * matrix_B[:, :, None])
        tl.debug_barrier()

        for j in range(GROUPS):
            before = GROUPS - 1 - j
            t = before * GROUP
            h = tl.load(scratch + before * (N_PAD * W))
            value = next_u
            gradient = next_dy
            gate = next_z
            matrix_C = next_C
            delta, slope = tiles.step_sizes(next_dt, bias, left - t, SOFTPLUS)
            weight = delta * value
            decay = tiles.decays(delta, A, segment_ids, start + t, T)
            matrix_B = tiles.load(B, B_row, t, left, n, N)
            h0, h1, h2, h3 = tiles.advance(h, decay, weight[:, None, :] * matrix_B[:, :, None])
            t_next = tl.maximum(t - GROUP, -start)
            next_dy = tiles.load(dy, D, t_next, left, d, D)
            next_u = tiles.load(u, u_row, t_next, left, d, D)
            next_dt = tiles.load(dt, dt_row, t_next, left, d, D)
            next_C = tiles.load(C, C_row, t_next, left, n, N)
            next_z = next_u
            if z is not None:
                next_z = tiles.load(z, z_row, t_next, left, d, D)

            states = tiles.tile(h0, h1, h2, h3)
            if z is not None:
                out = tl.sum(states * matrix_C[:, :, None], 1) + skip_weight[None, :] * value
                opening = tiles.sigmoid(gate)
                tiles.store(dz, D, t, left, d, D, gradient * out * opening * (1.0 + gate * (1.0 - opening)))
                gradient *= gate * opening
            here = sums + (start - first + t) * N_PAD
            tl.store(dC_sums + here, tiles.sum_channels(states * gradient[:, None, :]))

            g, q, q1, q2, q3 = tiles.retreat(q, decay, gradient[:, None, :] * matrix_C[:, :, None])
            tl.store(dB_sums + here, tiles.sum_channels(g * weight[:, None, :]))
            # B comes from the cache a second time: held since the states, it would take a register for each of N, G.
            matrix_B = tiles.load(B, B_row, t, left, n, N)
            dweight = tl.sum(g * matrix_B[:, :, None], 1)
            flow = tiles.tile(q, q1, q2, q3) * tiles.tile(h, h0, h1, h2)  # dL / d log(decay)
            dA += tl.sum(flow * delta[:, None, :], 0)
            ddelta = tl.sum(flow * A[None, :, :], 1) * LN2 + dweight * value
            ddelta = tl.where(tl.arange(0, GROUP)[:, None] < left - t, ddelta * slope, 0.0)
            dskip += gradient * value
            dbias += ddelta
            tiles.store(du, D, t, left, d, D, dweight * delta + skip_weight[None, :] * gradient)
            tiles.store(ddt, D, t, left, d, D, ddelta)
        tl.debug_barrier()

    row = b * slices + s
    tl.store(dA_sums + program * (N_PAD * W) + own_place, dA)
    tl.store(dskip_sums + row * D + d, tl.sum(dskip, 0), mask=d < D)
    tl.store(dbias_sums + row * D + d, tl.sum(dbias, 0), mask=d < D)
    if s == 0:
        tl.store(dinitial_state + b * N * D + place, q, mask=inside)
