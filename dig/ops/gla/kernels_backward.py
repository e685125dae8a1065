"""Triton kernels of gated linear attention's backward pass; notation and exponents as in `dig.ops.gla.kernels`.

With D the gradient of the state after a chunk and ``A_ij = q_i . k_j e^{c_i - c_j}`` the scores::

    dA_ij = do_i . v_j                                   (j <= i)
    dq_i  = e^{c_i} S do_i + sum_{j<=i} dA_ij k_j e^{c_i - c_j}
    dk_j  = e^{G - c_j} D v_j + sum_{i>=j} dA_ij q_i e^{c_i - c_j}
    dv_j  = D^T (k_j e^{G - c_j}) + sum_{i>=j} A_ij do_i
    dlog_decay_t = sum_{i>=t} (q_i dq_i - k_i dk_i) + sum_v S_new D

The last line: c_i enters only as a factor of q_i and, inverted, of k_i, and G only as a factor of everything that S_new
adds up. ``sum_v S_new D`` is ``e^G sum_v S D`` plus the first part of dk times k, summed over the chunk: all local.
The pairs i = j cancel in it; they are left out of the products and added to dq and dk in fp32 afterwards.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.gla.kernels import (
    BLOCK,
    LOG2E,
    MIN_LOG2_DECAY,
    across_halves,
    chunk_output,
    from_middle,
    load_log2_decay,
    load_rows,
    same_block,
    state_tile,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "N"])
def output_backward_kernel(
    q,
    k,
    v,
    decay,
    gate,
    weight,
    dy,
    states,
    state_gradients,
    do,
    dgate,
    dweight,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    d_b,
    d_t,
    d_h,
    g_b,
    g_t,
    g_h,
    y_b,
    y_t,
    y_h,
    dgate_t,
    T,
    N,
    scale,
    inverse_normalizer,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of ``y = RMSNorm(o) * weight * swish(gate)``, with o recomputed. Grid (H, N, B).

    Writes do (B, T, H, V) contiguous, dgate with token stride dgate_t, the chunk's part of the weight's gradient
    dweight (B, N, H, V), and ``state_gradients[b, h, n] = (q e^c)^T do``.
    """
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    first = n * C
    DOT: tl.constexpr = v.dtype.element_ty
    d = load_log2_decay(decay + b * d_b + h * d_h, d_t, first, T, inverse_normalizer, K, C, KP, True)
    c = tl.cumsum(d, axis=0)
    b_q = load_rows(q + b * q_b + h * q_h, q_t, first, T, K, C, KP).to(tl.float32) * scale
    b_k = load_rows(k + b * k_b + h * k_h, k_t, first, T, K, C, KP).to(tl.float32)
    b_v = load_rows(v + b * v_b + h * v_h, v_t, first, T, V, C, VP)
    offsets, exists = state_tile(K, V, KP, VP)
    offsets += ((b * H + h) * N + n) * (K * V)
    state = tl.load(states + offsets, mask=exists, other=0.0)
    o = chunk_output(b_q, b_k, b_v, c, state, C, KP, LEVELS, DOT, PRECISION)

    cols = tl.arange(0, VP)
    b_w = tl.load(weight + cols, mask=cols < V, other=0.0).to(tl.float32)
    b_g = load_rows(gate + b * g_b + h * g_h, g_t, first, T, V, C, VP).to(tl.float32)
    b_dy = load_rows(dy + b * y_b + h * y_h, y_t, first, T, V, C, VP).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(o * o, axis=1) / V + eps)[:, None]
    normed = o * inverse_rms
    sigmoid = tl.sigmoid(b_g)
    swish = b_g * sigmoid
    through_gate = b_dy * normed
    b_dgate = through_gate * b_w[None, :] * (sigmoid + swish * (1.0 - sigmoid))
    store_rows(dgate + b * T * dgate_t + h * V, b_dgate, dgate_t, first, T, V, C, VP)
    # One row per chunk and head, summed afterwards in a fixed order: atomics would make runs differ.
    tl.store(dweight + ((b * N + n) * H + h) * V + cols, tl.sum(through_gate * swish, axis=0), mask=cols < V)
    dnormed = b_dy * b_w[None, :] * swish
    b_do = inverse_rms * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / V)[:, None])
    store_rows(do + (b * T * H + h) * V, b_do, H * V, first, T, V, C, VP)

    queries = tl.trans((b_q * tl.exp2(c)).to(DOT))
    gradient = product(queries, b_do.to(DOT), DOT, PRECISION)
    tl.store(state_gradients + offsets, gradient.to(state_gradients.dtype.element_ty), mask=exists)


@triton.jit
def pair_gradients(
    dq,
    dk,
    queries,
    keys,
    q_factor,
    k_factor,
    dscores,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the gradients of one group size's scores ``queries @ keys^T`` to dq and dk (C, KP); dscores is masked."""
    dscores = dscores.to(DOT)
    dq += product(dscores, keys, DOT, PRECISION) * q_factor
    dk += product(tl.trans(dscores), queries, DOT, PRECISION) * k_factor
    return dq, dk


@triton.jit(do_not_specialize=["T", "N"])
def gradient_kernel(
    q,
    k,
    v,
    decay,
    do,
    states,
    state_gradients,
    dq,
    dk,
    dv,
    ddecay,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    d_b,
    d_t,
    d_h,
    o_b,
    o_t,
    o_h,
    dq_t,
    dk_t,
    dv_t,
    ddecay_t,
    T,
    N,
    scale,
    inverse_normalizer,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q, k, v and of the log decays or, with LOGITS, the gate logits. Grid (H, N, B).

    states (B, H, N, K, V) are those before each chunk, state_gradients those after it. Each gradient is written with
    the token stride given, heads packed.
    """
    h, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0)
    first = n * C
    DOT: tl.constexpr = v.dtype.element_ty
    decay += b * d_b + h * d_h
    d = load_log2_decay(decay, d_t, first, T, inverse_normalizer, K, C, KP, LOGITS)
    c = tl.cumsum(d, axis=0)
    total = tl.sum(d, axis=0)
    offsets, exists = state_tile(K, V, KP, VP)
    offsets += ((b * H + h) * N + n) * (K * V)
    state = tl.load(states + offsets, mask=exists, other=0.0)
    dstate = tl.load(state_gradients + offsets, mask=exists, other=0.0)
    b_v = load_rows(v + b * v_b + h * v_h, v_t, first, T, V, C, VP)
    b_do = load_rows(do + b * o_b + h * o_h, o_t, first, T, V, C, VP)
    b_k = load_rows(k + b * k_b + h * k_h, k_t, first, T, K, C, KP).to(tl.float32)

    # Through the states.
    until_end = tl.exp2(tl.minimum(total[None, :] - c, 0.0))
    b_dv = product((b_k * until_end).to(DOT), dstate, DOT, PRECISION)
    b_dk = product(b_v, tl.trans(dstate), DOT, PRECISION) * until_end
    b_dq = product(b_do, tl.trans(state), DOT, PRECISION) * tl.exp2(c)
    through_total = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1) * tl.exp2(total)
    through_total += tl.sum(b_k * b_dk, axis=0)

    # Through the scores, group size by group size.
    b_q = load_rows(q + b * q_b + h * q_h, q_t, first, T, K, C, KP).to(tl.float32) * scale
    dscores = product(b_do, tl.trans(b_v), DOT, PRECISION)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    x = from_middle(c, BLOCK, C, KP)
    q_factor = tl.exp2(x)
    k_factor = tl.exp2(-x)
    queries = (b_q * q_factor).to(DOT)
    keys = (b_k * k_factor).to(DOT)
    scores = product(queries, tl.trans(keys), DOT, PRECISION)
    scores = tl.where((i >= j) & same_block(C), scores, 0.0)
    masked = tl.where((i > j) & same_block(C), dscores, 0.0)
    b_dq, b_dk = pair_gradients(b_dq, b_dk, queries, keys, q_factor, k_factor, masked, DOT, PRECISION)
    for level in tl.static_range(LEVELS):
        factor = tl.exp2(-tl.abs(from_middle(c, 32 << level, C, KP)))
        queries = (b_q * factor).to(DOT)
        keys = (b_k * factor).to(DOT)
        pairs = across_halves(32 << level, C)
        scores = tl.where(
            pairs, product(queries, tl.trans(keys), DOT, PRECISION), scores
        )
        masked = tl.where(pairs, dscores, 0.0)
        b_dq, b_dk = pair_gradients(b_dq, b_dk, queries, keys, factor, factor, masked, DOT, PRECISION)
    b_dv = product(tl.trans(scores.to(DOT)), b_do, b_dv, DOT, PRECISION)
    store_rows(dv + b * T * dv_t + h * V, b_dv, dv_t, first, T, V, C, VP)

    b_dd = tl.cumsum(b_q * b_dq - b_k * b_dk, axis=0, reverse=True) + through_total[None, :]
    own = tl.sum(b_do.to(tl.float32) * b_v.to(tl.float32), axis=1)[:, None]
    store_rows(dq + b * T * dq_t + h * K, (b_dq + own * b_k) * scale, dq_t, first, T, K, C, KP)
    store_rows(dk + b * T * dk_t + h * K, b_dk + own * b_q, dk_t, first, T, K, C, KP)
    # Nothing flows through a decay that the clamp has replaced.
    b_dd = tl.where(d > MIN_LOG2_DECAY, b_dd, 0.0)
    if LOGITS:
        logits = load_rows(decay, d_t, first, T, K, C, KP).to(tl.float32)
        # d logsigmoid(x) / dx = sigmoid(-x)
        b_dd *= inverse_normalizer / (1.0 + tl.exp2(logits * LOG2E))
    store_rows(ddecay + b * T * ddecay_t + h * K, b_dd, ddecay_t, first, T, K, C, KP)
