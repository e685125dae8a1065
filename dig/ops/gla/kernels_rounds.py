"""Triton kernels of gated linear attention's backward pass in fewer registers: three programs an SM instead of two.

What `dig.ops.gla.kernels_backward` computes, in its notation; the tile choices say which of the two runs.

**Gradients in rounds.** With m the running sum of a chunk's decays at its middle, one pair of operands serves all
products, as in `dig.ops.gla.kernels_walk`: ``Q = q e^{c - m}``, ``K = k e^{m - c}``, ``S' = e^m S`` and
``D' = e^{G - m} D``::

    dv = tril(Q K^T)^T do + K D'
    dQ = dA K + do S'^T           dq = e^{c - m} dQ
    dK = dA^T Q + v D'^T          dk = e^{m - c} dK
    dlog_decay_t = sum_v S' (D' + Q^T do) - sum_{i<t} (Q_i dQ_i - K_i dK_i)

Pairs i = j are left out of dA; their share of dq and dk is ``own``, do . v, times k and q. A chunk that isn't mild goes
in rounds of 16 tokens, each with the state before it and the gradient of the state after it, which it computes from the
chunk's other tokens. So no program needs code for groups of several sizes.

Where chunks are few, a program adds up the gradient of the state after its chunk from what the later chunks add, and no
launch scans those first.

**Outputs in parts.** What follows the norm takes half the values' columns at a time. The compiler, left alone, computes
the gate's sigmoid in two layouts, and moves fp32 tensors between them: `laid_out_as` names one.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.arithmetic import sigmoid
from dig.ops.early_launch import start_early
from dig.ops.gla.pieces import (
    MIN_LOG2_DECAY,
    UNSPECIALIZED,
    chunk_scores,
    forgotten,
    is_mild,
    laid_out_as,
    load_gate,
    load_rows,
    load_sum,
    load_sums,
    log2_decay,
    product,
    scan_tokens,
    state_tile,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_backward_parts_kernel(
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
    """`output_backward_kernel`, with the values' columns in two parts. Grid (H, N, B)."""
    start_early(EARLY)
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    first = n * C
    tokens, present = scan_tokens(first, T, grid_rows, grid_columns, order, C)
    index = (b * H + h) * N + n
    DOT: tl.constexpr = v.dtype.element_ty
    # The values' columns in parts: what a part needs is half the registers, which limit how many programs share an SM.
    PARTS: tl.constexpr = 2 if VP >= 32 else 1
    W: tl.constexpr = VP // PARTS
    state_rows, cols = tl.arange(0, KP)[:, None], tl.arange(0, W)
    rows = tl.arange(0, C)
    v += b * v_b + h * v_h
    gate += b * g_b + h * g_h
    dy += b * y_b + h * y_h
    # Loaded before the scores, which don't need them: by the time that they are needed, they are there.
    values = ()
    before = ()
    for part in tl.static_range(PARTS):
        exists = (state_rows < K) & (part * W + cols < V)[None, :]
        state = states + index * (K * V) + part * W + state_rows * V + cols[None, :]
        values += (load_rows(v + part * W, v_t, tokens, present, min(W, V - part * W), W),)
        before += (tl.load(state, mask=exists, other=0.0),)
    scores = chunk_scores(
        q + b * q_b + h * q_h, q_t, k + b * k_b + h * k_h, k_t, sums, index, tokens, present, scale,
        K, KP, C, LEVELS, DOT, PRECISION,
    ).to(DOT)  # fmt: skip
    queries = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
    queries = (queries * tl.exp2(load_sums(sums, index, rows, C, KP))).to(DOT)
    outputs = ()
    squares = tl.zeros([C], tl.float32)
    for part in tl.static_range(PARTS):
        o = product(scores, values[part], DOT, PRECISION) + product(queries, before[part], DOT, PRECISION)
        squares += tl.sum(o * o, axis=1)
        outputs += (o,)

    # What was read above and is needed below is read again, for the same reason.
    tl.debug_barrier()
    tokens = forgotten(tokens, PRECISION)
    inverse_rms = tl.rsqrt(squares / V + eps)
    along = tl.zeros([C], tl.float32)
    normed_parts = ()
    dnormed_parts = ()
    for part in tl.static_range(PARTS):
        b_w = tl.load(weight + part * W + cols, mask=part * W + cols < V, other=0.0).to(tl.float32)
        b_g = load_rows(gate + part * W, g_t, tokens, present, min(W, V - part * W), W)
        b_dy = load_rows(dy + part * W, y_t, tokens, present, min(W, V - part * W), W)
        normed = outputs[part] * inverse_rms[:, None]
        b_g = laid_out_as(b_g.to(tl.float32), normed, PRECISION)
        b_dy = laid_out_as(b_dy.to(tl.float32), normed, PRECISION)
        gate_sigmoid = sigmoid(b_g, PRECISION)
        swish = b_g * gate_sigmoid
        through_gate = b_dy * normed
        if REBUILD:
            first_y = y + (b * T * H + h) * V + part * W
            store_rows(first_y, normed * b_w[None, :] * swish, H * V, tokens, present, min(W, V - part * W), W)
        # The swish's derivative is sigmoid (1 + gate - swish), a factor at a time: each is one of a product's layout.
        b_dgate = through_gate * b_w[None, :] * gate_sigmoid
        b_dgate += b_dgate * b_g - b_dgate * swish
        first_gate = dgate + b * T * dgate_t + h * V + part * W
        store_rows(first_gate, b_dgate, dgate_t, tokens, present, min(W, V - part * W), W)
        # One row per chunk and head, summed afterwards in a fixed order: atomics would make runs differ.
        first_weight = dweight + ((b * N + n) * H + h) * V + part * W
        tl.store(first_weight + cols, tl.sum(through_gate * swish, axis=0), mask=part * W + cols < V)
        dnormed = b_dy * b_w[None, :] * swish
        along += tl.sum(dnormed * normed, axis=1)
        normed_parts += (normed,)
        dnormed_parts += (dnormed,)
    along /= V
    b_own = tl.zeros([C], tl.float32)
    do_parts = ()
    for part in tl.static_range(PARTS):
        b_do = inverse_rms[:, None] * (dnormed_parts[part] - normed_parts[part] * along[:, None])
        store_rows(do + (b * T * H + h) * V + part * W, b_do, H * V, tokens, present, min(W, V - part * W), W)
        # From do before it is rounded: the norm makes do orthogonal to o, and where o is little else than this token's
        # own v (the first tokens), the rounding would be all that is left of the product.
        b_v = load_rows(v + part * W, v_t, tokens, present, min(W, V - part * W), W)
        b_own += tl.sum(b_do * laid_out_as(b_v.to(tl.float32), b_do, PRECISION), axis=1)
        do_parts += (b_do.to(DOT),)
    tl.store(own + (b * T + first + rows) * H + h, b_own, mask=present)

    queries = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
    queries = tl.trans((queries * tl.exp2(load_sums(sums, index, rows, C, KP))).to(DOT))
    for part in tl.static_range(PARTS):
        exists = (state_rows < K) & (part * W + cols < V)[None, :]
        gradient = product(queries, do_parts[part], DOT, PRECISION)
        first_state = state_gradients + index * (K * V) + part * W
        gradient = gradient.to(state_gradients.dtype.element_ty)
        tl.store(first_state + state_rows * V + cols[None, :], gradient, mask=exists)


@triton.jit
def round_gradients(
    q, k, v, decay, decay_weight, decay_bias, do, sums, states, state_gradients, own, dq, dk, dv, ddecay, dbias,
    q_b, q_t, q_h: tl.constexpr, k_b, k_t, k_h: tl.constexpr, v_b, v_t, v_h: tl.constexpr, d_b, d_t, d_h: tl.constexpr,
    o_b, o_t, o_h: tl.constexpr, dq_t, dk_t, dv_t, ddecay_t, T, N, grid_rows, grid_columns, order, scale,
    inverse_normalizer, h, n, b, step,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, LOGITS: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `gradient_rounds_kernel` does for the S tokens from ``step`` on of a chunk."""
    H = tl.num_programs(0)
    # Else the compiler holds what all rounds have in common, in registers.
    h = forgotten(h.to(tl.int64), PRECISION).to(tl.int32)
    n = forgotten(n.to(tl.int64), PRECISION).to(tl.int32)
    b = forgotten(b, PRECISION)
    first = n * C
    chunk = (b * H + h) * N + n
    DOT: tl.constexpr = v.dtype.element_ty
    near = tl.arange(0, S)
    i = near[:, None]
    j = near[None, :]
    rows = step + near
    # What several parts need is computed again and not held: registers limit how many programs share an SM.
    tokens, present = scan_tokens(first + step, T, grid_rows, grid_columns, order, S)
    x = load_sums(sums, chunk, rows, C, KP) - load_sum(sums, chunk, step + S // 2 - 1, C, KP)[None, :]
    queries = load_rows(q + b * q_b + h * q_h, q_t, tokens, present, K, KP).to(tl.float32) * scale
    queries = (queries * tl.exp2(x)).to(DOT)
    keys = (load_rows(k + b * k_b + h * k_h, k_t, tokens, present, K, KP).to(tl.float32) * tl.exp2(-x)).to(DOT)

    tl.debug_barrier()
    tokens = forgotten(tokens, PRECISION)
    offsets, exists = state_tile(K, V, KP, VP)
    middle_sum = load_sum(sums, chunk, step + S // 2 - 1, C, KP)
    end_sum = load_sum(sums, chunk, step + S - 1, C, KP)
    state = tl.load(states + chunk * (K * V) + offsets, mask=exists, other=0.0).to(tl.float32)
    if SCAN:
        # From the last chunk back, in fp32, as the scan adds them up.
        dstate = tl.zeros([KP, VP], tl.float32)
        later = chunk - n + N - 1
        while later > chunk:
            added = tl.load(state_gradients + later * (K * V) + offsets, mask=exists, other=0.0).to(tl.float32)
            dstate = tl.exp2(load_sum(sums, later, C - 1, C, KP))[:, None] * dstate + added
            later -= 1
    else:
        dstate = tl.load(state_gradients + chunk * (K * V) + offsets, mask=exists, other=0.0).to(tl.float32)
    if S < C:
        # The state before these tokens, and the gradient of the one after them, from the chunk's others.
        start_sum = load_sum(sums, chunk, tl.maximum(step, 1) - 1, C, KP) * tl.where(step > 0, 1.0, 0.0)
        state *= tl.exp2(start_sum)[:, None]
        for other in tl.range(0, step, S, disable_licm=True, num_stages=1):
            others, exist = scan_tokens(first + other, T, grid_rows, grid_columns, order, S)
            x = start_sum[None, :] - load_sums(sums, chunk, other + near, C, KP)
            b_k = load_rows(k + b * k_b + h * k_h, k_t, others, exist, K, KP).to(tl.float32) * tl.exp2(x)
            b_v = load_rows(v + b * v_b + h * v_h, v_t, others, exist, V, VP)
            state += product(tl.trans(b_k), b_v, DOT, PRECISION)
        state *= tl.exp2(middle_sum - start_sum)[:, None]
        dstate *= tl.exp2(load_sum(sums, chunk, C - 1, C, KP) - end_sum)[:, None]
        for other in tl.range(step + S, C, S, disable_licm=True, num_stages=1):
            others, exist = scan_tokens(first + other, T, grid_rows, grid_columns, order, S)
            x = load_sums(sums, chunk, other + near, C, KP) - end_sum[None, :]
            b_q = load_rows(q + b * q_b + h * q_h, q_t, others, exist, K, KP).to(tl.float32) * scale * tl.exp2(x)
            b_do = load_rows(do + b * o_b + h * o_h, o_t, others, exist, V, VP)
            dstate += product(tl.trans(b_q), b_do, DOT, PRECISION)
        tl.debug_barrier()
    else:
        state *= tl.exp2(middle_sum)[:, None]
    b_v = load_rows(v + b * v_b + h * v_h, v_t, tokens, present, V, VP)
    b_do = load_rows(do + b * o_b + h * o_h, o_t, tokens, present, V, VP)
    state = state.to(DOT)
    dstate *= tl.exp2(end_sum - middle_sum)[:, None]
    before = dstate + product(tl.trans(queries), b_do, DOT, PRECISION)
    at_start = tl.sum(state.to(tl.float32) * before, axis=1)
    dstate = dstate.to(DOT)
    tl.debug_barrier()

    # Scores and their gradients each way round, a product more: so rows of the left operand stay where the product
    # before it has put them, in registers.
    scores = product(keys, tl.trans(queries), DOT, PRECISION)
    scores = tl.where(j >= i, scores, 0.0)
    b_dv = product(scores, b_do, DOT, PRECISION) + product(keys, dstate, DOT, PRECISION)
    store_rows(dv + b * T * dv_t + h * V, b_dv, dv_t, tokens, present, V, VP)
    tl.debug_barrier()

    ds = tl.where(i > j, product(b_do, tl.trans(b_v), DOT, PRECISION), 0.0)
    of_queries = product(b_do, tl.trans(state), DOT, PRECISION) + product(ds, keys, DOT, PRECISION)
    ds = tl.where(j > i, product(b_v, tl.trans(b_do), DOT, PRECISION), 0.0)
    of_keys = product(b_v, tl.trans(dstate), DOT, PRECISION) + product(ds, queries, DOT, PRECISION)

    tl.debug_barrier()
    again = forgotten(tokens, PRECISION)
    b_own = tl.load(own + (b * T + first + rows) * H + h, mask=present, other=0.0)[:, None]
    x = load_sums(sums, chunk, rows, C, KP) - load_sum(sums, chunk, step + S // 2 - 1, C, KP)[None, :]
    x = laid_out_as(x, of_queries, PRECISION)
    b_q = laid_out_as(queries.to(tl.float32), of_queries, PRECISION)
    b_k = laid_out_as(keys.to(tl.float32), of_queries, PRECISION)
    b_dc = b_q * of_queries - b_k * of_keys
    b_dq = (of_queries + b_own * b_k) * (tl.exp2(x) * scale)
    store_rows(dq + b * T * dq_t + h * K, b_dq, dq_t, again, present, K, KP)
    b_dk = (of_keys + b_own * b_q) * tl.exp2(-x)
    store_rows(dk + b * T * dk_t + h * K, b_dk, dk_t, again, present, K, KP)
    b_dd = at_start[None, :] - (tl.cumsum(b_dc, axis=0) - b_dc)
    logits = load_gate(
        decay + b * d_b + h * d_h, decay_weight, decay_bias, d_t, h, again, present, K, KP, R, RP, PRECISION
    )
    # Nothing flows through a decay that the clamp has replaced.
    clamped = log2_decay(logits, inverse_normalizer, LOGITS, PRECISION) < MIN_LOG2_DECAY
    if LOGITS:
        # d logsigmoid(x) / dx = sigmoid(-x)
        b_dd *= inverse_normalizer * sigmoid(-logits, PRECISION)
    b_dd = tl.where(clamped | ~present[:, None], 0.0, b_dd)
    store_rows(ddecay + b * T * ddecay_t + h * K, b_dd, ddecay_t, again, present, K, KP)
    if R > 0:
        # One row per chunk, summed afterwards in a fixed order, as the weight's gradient of the norm is.
        cols = tl.arange(0, KP)
        dbias += ((b * N + n) * H + h) * K
        total_dd = tl.sum(b_dd, axis=0)
        if S < C:
            total_dd += tl.load(dbias + cols, mask=(cols < K) & (step > 0), other=0.0)
        tl.store(dbias + cols, total_dd, mask=cols < K)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_rounds_kernel(
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
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`gradient_kernel`, with one pair of operands for all products of a round. Grid (H, N, B).

    With SCAN, ``state_gradients`` are what each chunk alone adds to the gradient of the state, as before `scan_kernel`.
    """
    start_early(EARLY)
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # The code twice, for nearly all chunks without a loop: one whose rounds have a chunk's products, which take
    # descriptors of shared memory, ptxas 12.8 gives a first round without some of those. And no else: with one, the
    # compiler needs more registers than there are.
    mild = is_mild(sums, (b * tl.num_programs(0) + h) * N + n, C, KP)
    for step in tl.range(tl.where(mild, C, 0), C, 16, disable_licm=True):
        round_gradients(
            q, k, v, decay, decay_weight, decay_bias, do, sums, states, state_gradients, own, dq, dk, dv, ddecay, dbias,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, o_b, o_t, o_h, dq_t, dk_t, dv_t, ddecay_t, T, N,
            grid_rows, grid_columns, order, scale, inverse_normalizer, h, n, b, step,
            K, V, KP, VP, C, 16, R, RP, LOGITS, SCAN, PRECISION,
        )  # fmt: skip
    if mild:
        round_gradients(
            q, k, v, decay, decay_weight, decay_bias, do, sums, states, state_gradients, own, dq, dk, dv, ddecay, dbias,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, o_b, o_t, o_h, dq_t, dk_t, dv_t, ddecay_t, T, N,
            grid_rows, grid_columns, order, scale, inverse_normalizer, h, n, b, 0,
            K, V, KP, VP, C, C, R, RP, LOGITS, SCAN, PRECISION,
        )  # fmt: skip
