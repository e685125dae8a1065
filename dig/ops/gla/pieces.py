"""What the kernels of gated linear attention share: the method, and its pieces in Triton's language.

Shapes: B batch, T tokens, H heads, K key width, V value width, N chunks, C tokens of a chunk. KP and VP are K and V
padded to powers of two; padded columns and the tokens after the last are read as 0, with decay 1.

With ``c`` the running sum of the log decays inside a chunk, S the state before the chunk and G the chunk's total::

    o_i   = (q_i e^{c_i}) S + sum_{j<=i} (q_i . k_j e^{c_i - c_j}) v_j
    S_new = e^G S + sum_j (k_j e^{G - c_j})^T v_j

Three launches: the second sum of S_new for all chunks at once, a scan over the chunks, all outputs at once. At these
widths the products are small and the instructions around them many. So the first launch stores c (fp32) for the others:
to load it takes far fewer instructions than to compute it again. Where heads are many and chunks few, the forward pass
is one launch instead, whose programs walk the chunks of a head (`dig.ops.gla.kernels_walk`).

Arguments named q_b, q_t, q_h, ... are strides of batch, token and head. Head strides are constants of the compilation,
so that the compiler can tell how far heads of 36 or 72 are aligned.

**Order.** Tokens stay where they are in memory; ``order`` says how the recurrence walks them (`scan_tokens`). Chunks,
sums, states and do . v are indexed by scan position, all else by the token's place in memory.

**Exponents.** ``e^{c_i - c_j}`` is at most 1, but its two factors are not. Pairs (i, j) are split by the smallest
aligned group of 16, 32, 64, ... tokens that holds both.

- More than 16 tokens: i lies in the group's second half and j in its first. With decays measured from the group's
  middle, no exponent is positive. One array of factors ``exp2(-|c - c_middle|)`` serves queries and keys, and one
  product a group size all its pairs.
- 16 tokens: exponents are at most 8 tokens' decay away from 0, on either side. A token's log decay is clamped to
  `MIN_LOG2_DECAY`, so the largest factor is e^80. fp32 and bf16 (same exponent range) hold that with room for operands
  up to several thousand; fp16 would not. Pairs outside the group or above the diagonal may overflow to infinity or NaN:
  ``tl.where`` removes them, never a product with 0.

Most chunks need none of that. Where a chunk's whole decay is at least 2^-64 in every channel (`is_mild`), one product
serves all its pairs, with decays measured from the chunk's middle token. Each program looks for itself.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# Tuples of tensors are built up one by one, which to mypy changes their type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.arithmetic import LOG2E, sigmoid

MIN_LOG2_DECAY = tl.constexpr(-10 * 1.4426950408889634)
"""The least log2 decay of a token: e^-10, see above."""

MILD_LOG2_DECAY = tl.constexpr(-64.0)
"""The least log2 decay of a chunk whose pairs one product serves: factors of 2^64 leave the operands room both ways."""

UNSPECIALIZED = ["T", "N", "grid_rows", "grid_columns", "order"]
"""Integers that Triton shall not specialize on (divisible by 16): one binary serves every length, grid and order."""


@triton.jit
def scan_tokens(first, T, grid_rows, grid_columns, order, C: tl.constexpr):
    """Where the tokens at scan positions first .. first+C-1 lie in memory, (C,), and which of them there are.

    order is 0 for the order in memory, plus 1 for reversed, plus 2 for column by column (`dig.scan.ScanOrder`): the
    scan walks the image while its tokens stay where they are. Grid sizes are read only in the latter case. It is an
    argument and not a constant, so that all orders share one binary.
    """
    position = first + tl.arange(0, C)
    present = position < T
    position = tl.where(order % 2 == 1, T - 1 - position, position)
    if order >= 2:
        # Positions outside, before the first token too, are masked wherever these are used.
        position = (position % grid_rows) * grid_columns + position // grid_rows
    return position.to(tl.int64), present


@triton.jit
def forgotten(tokens, PRECISION: tl.constexpr):
    """The same value, unknown to the compiler: it computes addresses again instead of holding them in registers."""
    if PRECISION == "interpreter":
        return tokens
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [tokens], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def laid_out_as(x, like, PRECISION: tl.constexpr):
    """x, fp32, spread over threads as ``like``, of its shape, is: an instruction of both, which costs none.

    For what comes from memory and meets a product's result in several places. Left alone, the compiler decides for each
    place whether it moves x or what is computed of it, and computes some of that twice.
    """
    if PRECISION == "interpreter":
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f,f", [x, like], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_rows(ptr, stride, tokens, present, WIDTH: tl.constexpr, P: tl.constexpr):
    """One head's rows at ``tokens`` (C,) as (C, P); 0 where there is no token, and in the padded columns."""
    cols = tl.arange(0, P)
    mask = present[:, None]
    if P != WIDTH:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(ptr + tokens[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, value, stride, tokens, present, WIDTH: tl.constexpr, P: tl.constexpr):
    """The counterpart of `load_rows`; casts to the pointer's type."""
    cols = tl.arange(0, P)
    mask = present[:, None]
    if P != WIDTH:
        mask = mask & (cols < WIDTH)[None, :]
    tl.store(ptr + tokens[:, None] * stride + cols[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def state_tile(K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr):
    """Offsets (KP, VP) of a state, and which of them exist."""
    rows = tl.arange(0, KP)[:, None]
    cols = tl.arange(0, VP)[None, :]
    return rows * V + cols, (rows < K) & (cols < V)


@triton.jit
def log2(x, PRECISION: tl.constexpr):
    """log2(x) for x in [1, 2] to 2^-22 absolute, in one instruction instead of twenty."""
    if PRECISION == "interpreter":
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_gate(
    decay,
    weight,
    bias,
    d_t,
    h,
    tokens,
    present,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the decay comes from, (C, KP) in fp32, for one head: log decays or logits as stored, 0 where there are none.

    With a rank R that is not 0, decay holds the low-rank factor of every token instead, which all heads share, and the
    logits are its product with this head's rows of weight (H K, R), plus bias (H K,). RP is R padded.
    """
    if R == 0:
        values = load_rows(decay, d_t, tokens, present, K, KP).to(tl.float32)
    else:
        low = load_rows(decay, d_t, tokens, present, R, RP)
        ranks = tl.arange(0, RP)
        cols = tl.arange(0, KP)
        mask = (ranks < R)[:, None] & (cols < K)[None, :]
        factor = tl.load(weight + (h * K + cols)[None, :] * R + ranks[:, None], mask=mask, other=0.0)
        offset = tl.load(bias + h * K + cols, mask=cols < K, other=0.0).to(tl.float32)
        values = product(low, factor, low.dtype, PRECISION) + offset[None, :]
    return values


@triton.jit
def log2_decay(x, inverse_normalizer, LOGITS: tl.constexpr, PRECISION: tl.constexpr):
    """Log2 decays, not yet clamped, of log decays or, with LOGITS, of gate logits; x in fp32."""
    x *= LOG2E
    if LOGITS:
        # log2(sigmoid) without overflow on either side.
        x = (tl.minimum(x, 0.0) - log2(1.0 + tl.exp2(-tl.abs(x)), PRECISION)) * inverse_normalizer
    return x


@triton.jit
def chunk_decays(x, present, inverse_normalizer, K: tl.constexpr, LOGITS: tl.constexpr, PRECISION: tl.constexpr):
    """Log2 decays (C, KP) of a chunk, clamped, of what `load_gate` gives; 0 where there is no token or channel."""
    d = tl.maximum(log2_decay(x, inverse_normalizer, LOGITS, PRECISION), MIN_LOG2_DECAY)
    if LOGITS:
        # A logit of 0 where nothing was loaded isn't a decay of 1.
        d = tl.where(present[:, None] & (tl.arange(0, x.shape[1]) < K)[None, :], d, 0.0)
    return d


@triton.jit
def load_sums(sums, chunk, rows, C: tl.constexpr, P: tl.constexpr):
    """Running sums (C, P) of a chunk's log2 decays at the rows (C,) given, which may repeat.

    Reading a row again for every token of its group is cheaper than moving it between threads.
    """
    return tl.load(sums + chunk * (C * P) + rows[:, None] * P + tl.arange(0, P)[None, :])


@triton.jit
def load_sum(sums, chunk, row, C: tl.constexpr, P: tl.constexpr):
    """The sums (P,) of one row: of the last, the whole chunk's."""
    return tl.load(sums + chunk * (C * P) + row * P + tl.arange(0, P))


@triton.jit
def is_mild(sums, chunk, C: tl.constexpr, P: tl.constexpr):
    """Whether one product serves all pairs of a chunk: see **Exponents** above."""
    return tl.min(load_sum(sums, chunk, C - 1, C, P), axis=0) >= MILD_LOG2_DECAY


@triton.jit
def middle(rows, level):
    """The last row of the first half of each row's group of ``16 << level``."""
    half = 3 + level
    return (((rows >> half) | 1) << half) - 1


@triton.jit
def pairs_of(i, j, mild, level):
    """Which pairs of rows j <= i belong to a level: of a mild chunk all.

    Else those in different halves of a group of ``16 << level``, and for level 0 also those in the same.
    """
    half = 3 + level
    different = (i >> half) ^ (j >> half)
    return tl.where(mild, i >= 0, (different == 1) | ((different == 0) & (level == 0)))


@triton.jit
def pair_factors(sums, chunk, mild, level, C: tl.constexpr, P: tl.constexpr):
    """Factors (C, P) of queries and keys at a level, from their decays up to the middle of their group or the chunk."""
    rows = tl.arange(0, C)
    c = load_sums(sums, chunk, rows, C, P)
    if mild:
        x = c - load_sum(sums, chunk, C // 2 - 1, C, P)[None, :]
    else:
        x = c - load_sums(sums, chunk, middle(rows, level), C, P)
    outside = -tl.abs(x)
    whole = mild | (level == 0)
    return tl.exp2(tl.where(whole, x, outside)), tl.exp2(tl.where(whole, -x, outside))


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` of operands rounded to DOT, summed in fp32."""
    a = a.to(DOT)
    b = b.to(DOT)
    if PRECISION == "interpreter":
        # Triton's interpreter keeps bf16 as bit patterns and multiplies those. In fp32 the products are exact.
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def running_sums(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums (C, P) of the rows of x (C, P), fp32, up to and with each.

    By products with 0 and 1 on the tensor cores: a scan across threads takes twice the instructions. x is split into a
    sum of bf16 tensors. Three keep all but its last bit or two. Two keep 17 bits, which do where operands are rounded
    to bf16 anyway (DOT).
    """
    rows = tl.arange(0, x.shape[0])
    which = tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0)
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    total = product(which, mid, tl.bfloat16, PRECISION)
    if tl.float32 == DOT:
        total += product(which, (rest - mid.to(tl.float32)).to(tl.bfloat16), tl.bfloat16, PRECISION)
    return total + product(which, high, tl.bfloat16, PRECISION)


@triton.jit
def chunk_scores(
    q, q_t, k, k_t, sums, chunk, tokens, present, scale,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (C, C) in fp32 of one chunk's pairs, 0 above the diagonal; q and k point to the head's first rows."""
    rows = tl.arange(0, C)
    i = rows[:, None]
    j = rows[None, :]
    scores = tl.zeros([C, C], tl.float32)
    mild = is_mild(sums, chunk, C, P)
    level = 0
    # What a level reads is read in it, so that no level holds registers for the next.
    while level < tl.where(mild, 1, LEVELS):
        q_factor, k_factor = pair_factors(sums, chunk, mild, level, C, P)
        b_q = load_rows(q, q_t, tokens, present, K, P).to(tl.float32) * scale
        b_k = load_rows(k, k_t, tokens, present, K, P).to(tl.float32)
        pairs = product(b_q * q_factor, tl.trans(b_k * k_factor), DOT, PRECISION)
        scores = tl.where(pairs_of(i, j, mild, level) & (i >= j), pairs, scores)
        level += 1
    return scores


@triton.jit
def chunk_output(
    q, q_t, k, k_t, v, v_t, sums, states, chunk, tokens, present, scale,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs (C, VP) in fp32 of one chunk; q, k and v point to the head's first rows."""
    DOT: tl.constexpr = v.dtype.element_ty
    # Loaded before the scores, which don't need them: by the time that they are needed, they are there.
    b_v = load_rows(v, v_t, tokens, present, V, VP)
    offsets, exists = state_tile(K, V, KP, VP)
    state = tl.load(states + chunk * (K * V) + offsets, mask=exists, other=0.0)
    scores = chunk_scores(
        q, q_t, k, k_t, sums, chunk, tokens, present, scale, K, KP, C, LEVELS, DOT, PRECISION
    )  # fmt: skip
    queries = load_rows(q, q_t, tokens, present, K, KP).to(tl.float32) * scale
    queries *= tl.exp2(load_sums(sums, chunk, tl.arange(0, C), C, KP))
    return product(scores, b_v, DOT, PRECISION) + product(queries, state, DOT, PRECISION)


@triton.jit
def norm_and_gate(o, weight, gate, eps, V: tl.constexpr, PRECISION: tl.constexpr):
    """``RMSNorm(o) * weight * swish(gate)`` in fp32, of o (C, VP), weight (VP,) in fp32 and gate (C, VP)."""
    gate = gate.to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, axis=1) / V + eps)[:, None]
    return o * (weight[None, :] * gate * sigmoid(gate, PRECISION))
