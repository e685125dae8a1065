"""Triton kernels of gated linear attention's forward pass whose programs walk along a head's chunks.

**In one launch**, for many heads of few tokens each: a program walks the tokens of one head in order and holds the
state in registers, in fp32. What `dig.ops.gla.kernels` computes in three launches, each reading what the one before it
wrote, is here computed once: k, v and the decays are read once, and neither sums nor, without gradients, states are
written. Notation and order as in `dig.ops.gla.pieces`.

**By segments**, where a head has many chunks: a segment is several chunks, and a program walks along one. What each
segment adds comes first (`segment_state_kernel`), then a scan over segments, then the same walk, from the state before
each. Beside three launches a chunk each, a fraction of the states is written, scanned and read, and no sums.

**Exponents.** A chunk's decays are measured from half of its total, h = G / 2, so that one pair of operands serves all
three products::

    o_i   = (q_i e^{c_i - h}) (e^h S) + sum_{j<=i} (q_i e^{c_i - h} . k_j e^{h - c_j}) v_j
    S_new = e^h (e^h S + sum_j (k_j e^{h - c_j})^T v_j)

In a mild chunk no factor is above 2^32. Of any other chunk a step takes 16 tokens, whose factors are at most e^80
(`MIN_LOG2_DECAY`), and the next step begins after those. So no program needs code for groups of several sizes.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.early_launch import start_early
from dig.ops.gla.pieces import (
    MILD_LOG2_DECAY,
    UNSPECIALIZED,
    chunk_decays,
    load_gate,
    load_rows,
    norm_and_gate,
    product,
    running_sums,
    scan_tokens,
    state_tile,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "grid_rows", "grid_columns", "order"])
def segment_state_kernel(
    k,
    v,
    decay,
    decay_weight,
    decay_bias,
    decays,
    starts,
    k_b,
    k_t,
    k_h: tl.constexpr,
    v_b,
    v_t,
    v_h: tl.constexpr,
    d_b,
    d_t,
    d_h: tl.constexpr,
    T,
    grid_rows,
    grid_columns,
    order,
    inverse_normalizer,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    SEGMENT: tl.constexpr,
    LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What each segment of SEGMENT chunks alone adds to the state, and the total of its log2 decays.

    Grid (H, M, B). Writes ``starts`` (B, H, M, K, V), which the scan turns into the states before the segments, and
    ``decays`` (B, H, M, KP), as the scan reads the sums of chunks of one token.
    """
    start_early(EARLY)
    h, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = (b * tl.num_programs(0) + h) * tl.num_programs(1) + m
    DOT: tl.constexpr = v.dtype.element_ty
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    decay += b * d_b + h * d_h
    state = tl.zeros([KP, VP], tl.float32)
    through = tl.zeros([KP], tl.float32)
    # As in the walk, each step computes anew what all have in common.
    for i in tl.range(0, SEGMENT, disable_licm=True):
        first = (m * SEGMENT + i) * C
        if first < T:
            tokens, present = scan_tokens(first, T, grid_rows, grid_columns, order, C)
            b_k = load_rows(k, k_t, tokens, present, K, KP)
            b_v = load_rows(v, v_t, tokens, present, V, VP)
            d = load_gate(decay, decay_weight, decay_bias, d_t, h, tokens, present, K, KP, R, RP, PRECISION)
            d = chunk_decays(d, present, inverse_normalizer, K, LOGITS, PRECISION)
            c = running_sums(d, DOT, PRECISION)
            total = tl.sum(d, axis=0)
            keys = b_k.to(tl.float32) * tl.exp2(total[None, :] - c)
            state = state * tl.exp2(total)[:, None] + product(tl.trans(keys), b_v, DOT, PRECISION)
            through += total
    offsets, exists = state_tile(K, V, KP, VP)
    tl.store(starts + index * (K * V) + offsets, state.to(starts.dtype.element_ty), mask=exists)
    tl.store(decays + index * KP + tl.arange(0, KP), through)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def walk_kernel(
    q,
    k,
    v,
    decay,
    decay_weight,
    decay_bias,
    gate,
    weight,
    states,
    starts,
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
    d_b,
    d_t,
    d_h: tl.constexpr,
    g_b,
    g_t,
    g_h: tl.constexpr,
    T,
    N,
    grid_rows,
    grid_columns,
    order,
    scale,
    inverse_normalizer,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROUNDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    LOGITS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``RMSNorm(o) * weight * swish(gate)`` of every token, out (B, T, H, V) contiguous. Grid (H, B).

    With KEEP also the states before each chunk (B, H, N, K, V), which are touched only then. ROUNDS is
    at least T / 16: as many as there can be steps.

    With SEGMENT a program walks so many chunks, from the state that ``starts`` (B, H, M, K, V) has; grid (H, M, B), and
    ROUNDS is a segment's. Without, starts are not touched.
    """
    start_early(EARLY)
    H = tl.num_programs(0)
    if SEGMENT:
        h, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    else:
        h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    DOT: tl.constexpr = v.dtype.element_ty
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    decay += b * d_b + h * d_h
    gate += b * g_b + h * g_h
    out += (b * T * H + h) * V
    offsets, exists = state_tile(K, V, KP, VP)
    states += (b * H + h) * N * (K * V)
    rows = tl.arange(0, C)
    if SEGMENT:
        starts += ((b * H + h) * tl.num_programs(1) + m) * (K * V)
        state = tl.load(starts + offsets, mask=exists, other=0.0).to(tl.float32)
        first = m * SEGMENT * C
        end = tl.minimum(first + SEGMENT * C, T)
    else:
        state = tl.zeros([KP, VP], tl.float32)
        first = 0
        end = T
    # Each step computes anew what all have in common: held across steps, it takes a hundred registers. That is done by
    # disable_licm, which only a counted loop has; the interpreter needs a constant count.
    for _ in tl.range(0, ROUNDS, disable_licm=True):
        if first < end:
            # Up to the chunk's end, which only a chunk that isn't mild takes several steps to reach.
            tokens, present = scan_tokens(first, T, grid_rows, grid_columns, order, C)
            present = present & (rows < C - first % C)
            b_q = load_rows(q, q_t, tokens, present, K, KP)
            b_k = load_rows(k, k_t, tokens, present, K, KP)
            b_v = load_rows(v, v_t, tokens, present, V, VP)
            b_g = load_rows(gate, g_t, tokens, present, V, VP)
            d = load_gate(decay, decay_weight, decay_bias, d_t, h, tokens, present, K, KP, R, RP, PRECISION)
            d = chunk_decays(d, present, inverse_normalizer, K, LOGITS, PRECISION)
            c = running_sums(d, DOT, PRECISION)
            total = tl.sum(d, axis=0)
            steps = tl.where(tl.min(total, axis=0) >= MILD_LOG2_DECAY, C - first % C, 16)
            taken = rows < steps
            total = tl.sum(tl.where(taken[:, None], d, 0.0), axis=0)
            half = total * 0.5
            # What isn't taken adds nothing to the state, and its outputs, which mean nothing, aren't stored.
            x = tl.where(taken[:, None], c - half[None, :], 0.0)
            queries = (b_q.to(tl.float32) * scale * tl.exp2(x)).to(DOT)
            keys = tl.where(taken[:, None], b_k.to(tl.float32) * tl.exp2(-x), 0.0).to(DOT)
            if KEEP:
                chunk = (first // C).to(tl.int64)
                before = state.to(states.dtype.element_ty)
                tl.store(states + chunk * (K * V) + offsets, before, mask=exists & (first % C == 0))
            state *= tl.exp2(half)[:, None]
            o = product(queries, state, DOT, PRECISION)
            scores = product(queries, tl.trans(keys), DOT, PRECISION)
            scores = tl.where(rows[:, None] >= rows[None, :], scores, 0.0)
            o += product(scores, b_v, DOT, PRECISION)
            state = (state + product(tl.trans(keys), b_v, DOT, PRECISION)) * tl.exp2(half)[:, None]
            b_w = tl.load(weight + tl.arange(0, VP), mask=tl.arange(0, VP) < V, other=0.0).to(tl.float32)
            o = norm_and_gate(o, b_w, b_g, eps, V, PRECISION)
            store_rows(out, o, H * V, tokens, present & taken, V, VP)
            first += steps
