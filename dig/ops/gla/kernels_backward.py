"""Triton kernels of gated linear attention's backward pass; notation and exponents as in `dig.ops.gla.pieces`.

With D the gradient of the state after a chunk and ``A_ij = q_i . k_j e^{c_i - c_j}`` the scores::

    dA_ij = do_i . v_j                                   (j <= i)
    dq_i  = e^{c_i} S do_i + sum_{j<=i} dA_ij k_j e^{c_i - c_j}
    dk_j  = e^{G - c_j} D v_j + sum_{i>=j} dA_ij q_i e^{c_i - c_j}
    dv_j  = D^T (k_j e^{G - c_j}) + sum_{i>=j} A_ij do_i
    dlog_decay_t = sum_{i>=t} (q_i dq_i - k_i dk_i) + sum_v S_new D

As for the last line: c_i enters only as a factor of q_i and, inverted, of k_i; G only as a factor of all that S_new
adds up. The kernel computes it from the chunk's other end, which takes S alone and what is local::

    dlog_decay_t = e^G sum_v S D + sum_i q_i (e^{c_i} S do_i) - sum_{i<t} (q_i dq_i - k_i dk_i)

The pairs i = j cancel in it; they are left out of the products and added to dq and dk in fp32 afterwards.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.arithmetic import sigmoid
from dig.ops.early_launch import start_early
from dig.ops.gla.pieces import (
    MIN_LOG2_DECAY,
    UNSPECIALIZED,
    chunk_output,
    chunk_scores,
    forgotten,
    is_mild,
    load_gate,
    load_rows,
    load_sum,
    load_sums,
    log2_decay,
    pair_factors,
    pairs_of,
    product,
    scan_tokens,
    state_tile,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_backward_kernel(
    q,
    k,
    v,
    gate,
    weight,
    dy,
    sums,
    states,
    state_gradients,
    own,
    do,
    dgate,
    dweight,
    y,
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
    y_b,
    y_t,
    y_h: tl.constexpr,
    dgate_t,
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
    REBUILD: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Backward of ``y = RMSNorm(o) * weight * swish(gate)``, with o recomputed. Grid (H, N, B).

    Writes do (B, T, H, V) contiguous, dgate with token stride dgate_t, the chunk's part of the weight's gradient
    dweight (B, N, H, V), ``own[b, t, h] = do_t . v_t`` and ``state_gradients[b, h, n] = (q e^c)^T do``; with REBUILD
    also y (B, T, H, V) again, contiguous.
    """
    start_early(EARLY)
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    first = n * C
    tokens, present = scan_tokens(first, T, grid_rows, grid_columns, order, C)
    index = (b * H + h) * N + n
    DOT: tl.constexpr = v.dtype.element_ty
    o = chunk_output(
        q + b * q_b + h * q_h, q_t, k + b * k_b + h * k_h, k_t, v + b * v_b + h * v_h, v_t, sums, states, index, tokens,
        present, scale, K, V, KP, VP, C, LEVELS, PRECISION,
    )  # fmt: skip

    # What was read above and is needed below is read again: registers limit how many programs share an SM.
    tl.debug_barrier()
    tokens = forgotten(tokens, PRECISION)
    rows = tl.arange(0, C)
    cols = tl.arange(0, VP)
    b_w = tl.load(weight + cols, mask=cols < V, other=0.0).to(tl.float32)
    b_g = load_rows(gate + b * g_b + h * g_h, g_t, tokens, present, V, VP).to(tl.float32)
    b_dy = load_rows(dy + b * y_b + h * y_h, y_t, tokens, present, V, VP).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(o * o, axis=1) / V + eps)[:, None]
    normed = o * inverse_rms
    gate_sigmoid = sigmoid(b_g, PRECISION)
    swish = b_g * gate_sigmoid
    through_gate = b_dy * normed
    if REBUILD:
        store_rows(y + (b * T * H + h) * V, normed * b_w[None, :] * swish, H * V, tokens, present, V, VP)
    b_dgate = through_gate * b_w[None, :] * (gate_sigmoid + swish * (1.0 - gate_sigmoid))
    store_rows(dgate + b * T * dgate_t + h * V, b_dgate, dgate_t, tokens, present, V, VP)
    # One row per chunk and head, summed afterwards in a fixed order: atomics would make runs differ.
    tl.store(dweight + ((b * N + n) * H + h) * V + cols, tl.sum(through_gate * swish, axis=0), mask=cols < V)
    dnormed = b_dy * b_w[None, :] * swish
    b_do = inverse_rms * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / V)[:, None])
    store_rows(do + (b * T * H + h) * V, b_do, H * V, tokens, present, V, VP)
    # From do before it is rounded: the norm makes do orthogonal to o, and where o is little else than this token's own
    # v (the first tokens), the rounding would be all that is left of the product.
    b_v = load_rows(v + b * v_b + h * v_h, v_t, tokens, present, V, VP)
    b_own = tl.sum(b_do * b_v.to(tl.float32), axis=1)
    tl.store(own + (b * T + first + rows) * H + h, b_own, mask=present)

    b_q = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
    queries = b_q * tl.exp2(load_sums(sums, index, rows, C, KP))
    gradient = product(tl.trans(queries), b_do, DOT, PRECISION)
    offsets, exists = state_tile(K, V, KP, VP)
    tl.store(state_gradients + index * (K * V) + offsets, gradient.to(state_gradients.dtype.element_ty), mask=exists)


@triton.jit
def pair_gradients(
    dq,
    dk,
    dc,
    queries,
    keys,
    q_factor,
    k_factor,
    dscores,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the gradients of one group size's scores ``queries @ keys^T``; dscores is masked, all others (C, KP).

    dc collects ``q dq - k dk``. A pair (i, j) adds to row i what it takes from row j, and most of that cancels in later
    sums over rows. So both come from the same rounded operands, not from q and dq themselves.
    """
    of_queries = product(dscores, keys, DOT, PRECISION)
    of_keys = product(tl.trans(dscores), queries, DOT, PRECISION)
    dc += queries.to(tl.float32) * of_queries - keys.to(tl.float32) * of_keys
    return dq + of_queries * q_factor, dk + of_keys * k_factor, dc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    q,
    k,
    v,
    decay,
    decay_weight,
    decay_bias,
    do,
    sums,
    states,
    state_gradients,
    own,
    dq,
    dk,
    dv,
    ddecay,
    dbias,
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
    dq_t,
    dk_t,
    dv_t,
    ddecay_t,
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
    LEVELS: tl.constexpr,
    LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Gradients of q, k, v and of the log decays or, with LOGITS, the gate logits. Grid (H, N, B).

    states (B, H, N, K, V) are those before each chunk, state_gradients those after it. Each gradient is written with
    the token stride given, heads packed. With a rank R (`load_gate`), also the chunk's part of the gradient of the
    logits' bias, dbias (B, N, H, K) in fp32.
    """
    start_early(EARLY)
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    first = n * C
    tokens, present = scan_tokens(first, T, grid_rows, grid_columns, order, C)
    index = (b * H + h) * N + n
    DOT: tl.constexpr = v.dtype.element_ty
    rows = tl.arange(0, C)
    i = rows[:, None]
    j = rows[None, :]
    offsets, exists = state_tile(K, V, KP, VP)
    states += index * (K * V)
    state_gradients += index * (K * V)

    # Four parts: v; q and k through the scores; k through the state after the chunk; q and the decays through the one
    # before it. What several need is read again and not held: registers limit how many programs share an SM.
    scores = chunk_scores(
        q + b * q_b + h * q_h, q_t, k + b * k_b + h * k_h, k_t, sums, index, tokens, present, scale,
        K, KP, C, LEVELS, DOT, PRECISION,
    )  # fmt: skip
    b_k = load_rows(k + b * k_b + h * k_h, k_t, tokens, present, K, KP).to(tl.float32)
    b_do = load_rows(do + b * o_b + h * o_h, o_t, tokens, present, V, VP)
    b_dv = product(tl.trans(scores), b_do, DOT, PRECISION)
    dstate = tl.load(state_gradients + offsets, mask=exists, other=0.0)
    until_end = tl.exp2(load_sum(sums, index, C - 1, C, KP)[None, :] - load_sums(sums, index, rows, C, KP))
    b_dv += product(b_k * until_end, dstate, DOT, PRECISION)
    store_rows(dv + b * T * dv_t + h * V, b_dv, dv_t, tokens, present, V, VP)

    tl.debug_barrier()
    tokens = forgotten(tokens, PRECISION)
    b_dq = tl.zeros([C, KP], tl.float32)
    b_dk = tl.zeros([C, KP], tl.float32)
    b_dc = tl.zeros([C, KP], tl.float32)
    mild = is_mild(sums, index, C, KP)
    level = 0
    # A loop that stays one: unrolled, its code outgrows the instruction cache and its addresses the registers. It reads
    # all that it needs in each round, of which there is nearly always one. With dscores computed before it, ptxas 12.8
    # gives two products of the loop the same operand's address (`bench.ops.registers` looks for that).
    while level < tl.where(mild, 1, LEVELS):
        b_q = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
        b_k = load_rows(k + b * k_b + h * k_h, k_t, tokens, present, K, KP).to(tl.float32)
        q_factor, k_factor = pair_factors(sums, index, mild, level, C, KP)
        queries = (b_q * q_factor).to(DOT)
        keys = (b_k * k_factor).to(DOT)
        b_v = load_rows(v + b * v_b + h * v_h, v_t, tokens, present, V, VP)
        b_do = load_rows(do + b * o_b + h * o_h, o_t, tokens, present, V, VP)
        dscores = product(b_do, tl.trans(b_v), DOT, PRECISION).to(DOT)
        ds = tl.where(pairs_of(i, j, mild, level) & (i > j), dscores, 0.0)
        b_dq, b_dk, b_dc = pair_gradients(b_dq, b_dk, b_dc, queries, keys, q_factor, k_factor, ds, DOT, PRECISION)
        level += 1

    # What comes through the state after the chunk: k's share.
    tl.debug_barrier()
    tokens = forgotten(tokens, PRECISION)
    b_own = tl.load(own + (b * T + first + rows) * H + h, mask=present, other=0.0)[:, None]
    b_q = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
    b_k = load_rows(k + b * k_b + h * k_h, k_t, tokens, present, K, KP).to(tl.float32)
    b_v = load_rows(v + b * v_b + h * v_h, v_t, tokens, present, V, VP)
    dstate = tl.load(state_gradients + offsets, mask=exists, other=0.0)
    until_end = tl.exp2(load_sum(sums, index, C - 1, C, KP)[None, :] - load_sums(sums, index, rows, C, KP))
    through_state = product(b_v, tl.trans(dstate), DOT, PRECISION) * until_end
    b_dc -= b_k * through_state
    b_dk += through_state + b_own * b_q
    store_rows(dk + b * T * dk_t + h * K, b_dk, dk_t, tokens, present, K, KP)

    # Through the state before it: q's; and the decays'.
    tl.debug_barrier()
    tokens = forgotten(tokens, PRECISION)
    b_do = load_rows(do + b * o_b + h * o_h, o_t, tokens, present, V, VP)
    state = tl.load(states + offsets, mask=exists, other=0.0)
    dstate = tl.load(state_gradients + offsets, mask=exists, other=0.0)
    through_state = product(b_do, tl.trans(state), DOT, PRECISION) * tl.exp2(load_sums(sums, index, rows, C, KP))
    b_dq = (b_dq + through_state + b_own * b_k) * scale
    store_rows(dq + b * T * dq_t + h * K, b_dq, dq_t, tokens, present, K, KP)
    through_state *= b_q
    b_dc += through_state
    total = load_sum(sums, index, C - 1, C, KP)
    at_start = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1) * tl.exp2(total)
    at_start += tl.sum(through_state, axis=0)
    b_dd = at_start[None, :] - (tl.cumsum(b_dc, axis=0) - b_dc)
    logits = load_gate(
        decay + b * d_b + h * d_h, decay_weight, decay_bias, d_t, h, tokens, present, K, KP, R, RP, PRECISION
    )
    # Nothing flows through a decay that the clamp has replaced.
    clamped = log2_decay(logits, inverse_normalizer, LOGITS, PRECISION) < MIN_LOG2_DECAY
    if LOGITS:
        # d logsigmoid(x) / dx = sigmoid(-x)
        b_dd *= inverse_normalizer * sigmoid(-logits, PRECISION)
    b_dd = tl.where(clamped, 0.0, b_dd)
    store_rows(ddecay + b * T * ddecay_t + h * K, b_dd, ddecay_t, tokens, present, K, KP)
    if R > 0:
        # One row per chunk, summed afterwards in a fixed order, as the weight's gradient of the norm is.
        cols = tl.arange(0, KP)
        total_dd = tl.sum(tl.where(present[:, None], b_dd, 0.0), axis=0)
        tl.store(dbias + ((b * N + n) * H + h) * K + cols, total_dd, mask=cols < K)


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(partials, sums, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``sums`` (D,) over the rows of partials (rows, D), always in the same order. Grid (ceil(D / COLS),)."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    exists = cols < D
    total = tl.zeros([ROWS, COLS], tl.float32)
    first = 0
    while first < rows:
        row = first + tl.arange(0, ROWS)
        pointers = partials + row.to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.load(pointers, mask=(row < rows)[:, None] & exists[None, :], other=0.0)
        first += ROWS
    tl.store(sums + cols, tl.sum(total, axis=0).to(sums.dtype.element_ty), mask=exists)
