"""Triton kernels of gated linear attention's forward pass; notation, exponents and order as in `dig.ops.gla.pieces`."""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# Tuples of tensors are built up one by one, which to mypy changes their type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.early_launch import start_early
from dig.ops.gla.pieces import (
    UNSPECIALIZED,
    chunk_decays,
    chunk_output,
    load_gate,
    load_rows,
    norm_and_gate,
    product,
    running_sums,
    scan_tokens,
    state_tile,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def local_state_kernel(
    q,
    k,
    v,
    decay,
    decay_weight,
    decay_bias,
    do,
    sums,
    states,
    own,
    q_b,
    q_t,
    q_h: tl.constexpr,
    k_b,
    k_t,
    k_h: tl.constexpr,
    v_b,
    v_t,
    v_h: tl.constexpr,
    d_b,
    d_t,
    d_h: tl.constexpr,
    o_b,
    o_t,
    o_h: tl.constexpr,
    T,
    N,
    grid_rows,
    grid_columns,
    order,
    scale,
    inverse_normalizer,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    LOGITS: tl.constexpr,
    STATES: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What each chunk alone adds to the state, and with GRADIENT what it alone adds to the state's gradient.

    Grid (H, N, B). Writes ``sums`` (B, H, N * C, KP), the running sums c of the log2 decays inside a chunk; with STATES
    ``states[0, b, h, n] = (k e^{G-c})^T v``, and with GRADIENT also ``states[1, b, h, n] = (q e^c)^T do`` and
    ``own[b, t, h] = do_t . v_t``. What goes with a flag is touched only then.
    """
    start_early(EARLY)
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    first = n * C
    tokens, present = scan_tokens(first, T, grid_rows, grid_columns, order, C)
    index = (b * H + h) * N + n
    DOT: tl.constexpr = v.dtype.element_ty
    d = load_gate(decay + b * d_b + h * d_h, decay_weight, decay_bias, d_t, h, tokens, present, K, KP, R, RP, PRECISION)
    d = chunk_decays(d, present, inverse_normalizer, K, LOGITS, PRECISION)
    rows = tl.arange(0, C)
    cols = tl.arange(0, KP)
    c = running_sums(d, DOT, PRECISION)
    # Rows after the last token too: those are read as the middle of a group.
    tl.store(sums + index * (C * KP) + rows[:, None] * KP + cols[None, :], c)
    if STATES:
        b_k = load_rows(k + b * k_b + h * k_h, k_t, tokens, present, K, KP).to(tl.float32)
        b_v = load_rows(v + b * v_b + h * v_h, v_t, tokens, present, V, VP)
        keys = b_k * tl.exp2(tl.sum(d, axis=0)[None, :] - c)
        state = product(tl.trans(keys), b_v, DOT, PRECISION)
        offsets, exists = state_tile(K, V, KP, VP)
        offsets += index * (K * V)
        tl.store(states + offsets, state.to(states.dtype.element_ty), mask=exists)
        if GRADIENT:
            b_q = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
            b_do = load_rows(do + b * o_b + h * o_h, o_t, tokens, present, V, VP)
            gradient = product(tl.trans(b_q * tl.exp2(c)), b_do, DOT, PRECISION)
            offsets += tl.num_programs(2).to(tl.int64) * H * N * (K * V)
            tl.store(states + offsets, gradient.to(states.dtype.element_ty), mask=exists)
            b_own = tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), axis=1)
            tl.store(own + (b * T + first + rows) * H + h, b_own, mask=present)


@triton.jit
def one_after_other(through, added, next_through, next_added):
    """The composition of two maps of a state, ``x -> through x + added`` each: what two runs of chunks do to it."""
    return through * next_through, next_through * added + next_added


@triton.jit
def load_steps(
    x, g, first, from_place, N, backward, exists, SIZE: tl.constexpr, SUMS: tl.constexpr, STEPS: tl.constexpr
):
    """What chunks add, tuples of (GROUPS, LANES), and their log decays (GROUPS, 1), of STEPS places from ``first`` on.

    x and g point to those of the first chunk. Places before from_place count as nothing.
    """
    added = ()
    decays = ()
    for i in tl.static_range(STEPS):
        place = first + i
        chunk = tl.where(backward == 0, place, N - 1 - place).to(tl.int64)
        mask = (place >= from_place) & (place < N)
        added += (tl.load(x + chunk * SIZE, mask=mask & exists, other=0.0),)
        decays += (tl.load(g + chunk * SUMS, mask=mask, other=0.0),)
    return added, decays


@triton.jit(do_not_specialize=["N", "direction"])
def scan_kernel(
    states,
    sums,
    N,
    direction,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Turn what chunks add into what has been added before each of them, in place: states (D, B, H, N, K, V).

    Grid (ceil(V / LANES) K, B * H, D): a program has LANES values of one key channel, which decay together. With G the
    last of a chunk's sums, direction 0 goes forward: ``x_n <- sum_{m<n} e^{G_{m+1} + ... + G_{n-1}} x_m``; direction 1
    is its mirror image, which is what the gradient of the state needs. The first of the D entries has the direction
    given, the next the other.

    A round loads GROUPS groups of STEPS chunks at once: every chunk of most images. What a whole group does to a state
    is one map; a scan over these maps gives the state that each group begins with. From there it walks along its
    chunks, in fp32.
    """
    start_early(EARLY)
    channel = tl.program_id(0) // tl.cdiv(V, LANES)
    lanes = (tl.program_id(0) % tl.cdiv(V, LANES) * LANES + tl.arange(0, LANES))[None, :]
    exists = lanes < V
    groups = tl.arange(0, GROUPS)[:, None]
    bh, entry = tl.program_id(1), tl.program_id(2)
    backward = (direction + entry) % 2
    SIZE: tl.constexpr = K * V
    SUMS: tl.constexpr = C * KP
    x = states + (entry * tl.num_programs(1) + bh).to(tl.int64) * N * SIZE + channel * V + lanes
    g = sums + bh.to(tl.int64) * N * SUMS + (C - 1) * KP + channel
    start = tl.zeros([1, LANES], tl.float32)
    step = 0
    while step < N:
        first = step + groups * STEPS
        # Loaded twice, the second time from a cache: no group sees another one's registers.
        before_added, before_decays = load_steps(x, g, first - STEPS, step, N, backward, exists, SIZE, SUMS, STEPS)
        added, decays = load_steps(x, g, first, step, N, backward, exists, SIZE, SUMS, STEPS)
        through = tl.full([GROUPS, 1], 1.0, tl.float32)
        total = tl.zeros([GROUPS, LANES], tl.float32)
        for i in tl.static_range(STEPS):
            decay = tl.exp2(before_decays[i])
            total = decay * total + before_added[i].to(tl.float32)
            through *= decay
        through = tl.broadcast_to(through, [GROUPS, LANES])
        through, total = tl.associative_scan((through, total), 0, one_after_other)
        carry = through * start + total
        for i in tl.static_range(STEPS):
            place = first + i
            chunk = tl.where(backward == 0, place, N - 1 - place).to(tl.int64)
            tl.store(x + chunk * SIZE, carry.to(states.dtype.element_ty), mask=(place < N) & exists)
            carry = tl.exp2(decays[i]) * carry + added[i].to(tl.float32)
        start = tl.sum(tl.where(groups == GROUPS - 1, carry, 0.0), axis=0)[None, :]
        step += GROUPS * STEPS


@triton.jit(do_not_specialize=["N", "direction"])
def short_scan_kernel(
    states,
    sums,
    N,
    direction,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`scan_kernel` where chunks are few and heads many: a program walks all chunks with a large part of the state.

    Grid (ceil(K V / (WIDTH UNITS)), B * H, D). A unit is WIDTH neighbouring values of one key channel, which decay
    together; V is a multiple of WIDTH. Units follow one another through the whole state, so that no lane idles where K
    or V is no power of two. STEPS chunks are loaded at once, then added up in fp32, one after the other.
    """
    start_early(EARLY)
    PER_CHANNEL: tl.constexpr = V // WIDTH
    units = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[:, None]
    exists = units < K * PER_CHANNEL
    # Units after the last read the last one's decay.
    channel = tl.minimum(units // PER_CHANNEL, K - 1)
    bh, entry = tl.program_id(1), tl.program_id(2)
    backward = (direction + entry) % 2
    SIZE: tl.constexpr = K * V
    SUMS: tl.constexpr = C * KP
    x = states + (entry * tl.num_programs(1) + bh).to(tl.int64) * N * SIZE
    x += units * WIDTH + tl.arange(0, WIDTH)[None, :]
    g = sums + bh.to(tl.int64) * N * SUMS + (C - 1) * KP + channel
    carry = tl.zeros([UNITS, WIDTH], tl.float32)
    first = 0
    while first < N:
        added, decays = load_steps(x, g, first, first, N, backward, exists, SIZE, SUMS, STEPS)
        for i in tl.static_range(STEPS):
            place = first + i
            chunk = tl.where(backward == 0, place, N - 1 - place).to(tl.int64)
            tl.store(x + chunk * SIZE, carry.to(states.dtype.element_ty), mask=(place < N) & exists)
            carry = tl.exp2(decays[i]) * carry + added[i].to(tl.float32)
        first += STEPS


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_kernel(
    q,
    k,
    v,
    gate,
    weight,
    sums,
    states,
    out,
    q_b,
    q_t,
    q_h: tl.constexpr,
    k_b,
    k_t,
    k_h: tl.constexpr,
    v_b,
    v_t,
    v_h: tl.constexpr,
    g_b,
    g_t,
    g_h: tl.constexpr,
    T,
    N,
    grid_rows,
    grid_columns,
    order,
    scale,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Outputs o of every chunk from the states before it. Grid (H, N, B); out (B, T, H, V) contiguous.

    With NORM_GATE the output is ``RMSNorm(o) * weight * swish(gate)``; gate and weight are read only then.
    """
    start_early(EARLY)
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    tokens, present = scan_tokens(n * C, T, grid_rows, grid_columns, order, C)
    index = (b * H + h) * N + n
    o = chunk_output(
        q + b * q_b + h * q_h, q_t, k + b * k_b + h * k_h, k_t, v + b * v_b + h * v_h, v_t, sums, states, index, tokens,
        present, scale, K, V, KP, VP, C, LEVELS, PRECISION,
    )  # fmt: skip
    if NORM_GATE:
        cols = tl.arange(0, VP)
        b_w = tl.load(weight + cols, mask=cols < V, other=0.0).to(tl.float32)
        b_g = load_rows(gate + b * g_b + h * g_h, g_t, tokens, present, V, VP)
        o = norm_and_gate(o, b_w, b_g, eps, V, PRECISION)
    store_rows(out + (b * T * H + h) * V, o, H * V, tokens, present, V, VP)
