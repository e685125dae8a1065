"""Triton kernels of the GEMMs on SwiGLU's two sides, with its passes as their epilogues.

Shapes: M tokens, D width, F inner width of SwiGLU. A program computes BM tokens by BN of the F columns.

Operands come through tensor descriptors, by which TMA reads tiles: rows past the end are read as 0 and not written.

**Shares.** A GEMM leaves the memory idle: its operands come from the L2 cache. Casts of weights, which only move bytes,
are fused into it, in shares of R by C elements. At every EVERY-th step along the sum, a program stores the share that
it loaded EVERY steps before, and loads its next one. The steps in between hide the latency, and spread the arithmetic
of the addresses. The shares of all matrices are numbered through. ROWS and COLUMNS list the matrices' sizes; STARTS the
first share of each, and then how many there are. The last matrices have gates: GATE_STARTS lists their first shares.

**Epilogues** take as long as a quarter of the sum where D is small. So two rounded numbers are widened in two
instructions, where the compiler would round one by one at a quarter of the rate, and a reciprocal that is right to one
unit in the last place stands for the division.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.arithmetic import sigmoid, widen
from dig.ops.early_launch import start_early


@triton.jit
def tile_corner(M, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First token and first column of this program.

    GROUP rows of tiles are walked column by column: programs that run together share tokens and weights in the L2
    cache.
    """
    program = tl.program_id(0)
    across: tl.constexpr = F // BN
    group = program // (GROUP * across)
    first = group * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inside = program % (GROUP * across)
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def choose(share, matrices, STARTS: tl.constexpr):
    """The matrix that a share is of. By arithmetic: branches would break the loop that they are in into pieces."""
    chosen = matrices[0]
    for i in tl.static_range(1, len(matrices)):
        chosen = tl.where(share >= STARTS[i], matrices[i], chosen)
    return chosen


@triton.jit
def place_share(
    share, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STARTS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """In the matrix that a share is of: its first element, the distance of rows, its first row, and rows from there."""
    first, distance, row, rows = 0, 0, 0, 0
    for i in tl.static_range(len(ROWS)):
        here = share >= STARTS[i]
        inside = share - STARTS[i]
        down = inside // (COLUMNS[i] // C)
        first = tl.where(here, down * (R * COLUMNS[i]) + (inside - down * (COLUMNS[i] // C)) * C, first)
        distance = tl.where(here, COLUMNS[i], distance)
        row = tl.where(here, down * R, row)
        rows = tl.where(here, ROWS[i], rows)
    return first, distance, row, tl.where(share < STARTS[len(ROWS)], rows - row, 0)


@triton.jit
def share_tile(first, distance, left, R: tl.constexpr, C: tl.constexpr):
    """Offsets (R, C) of a share's elements, and which exist."""
    row = tl.arange(0, R)[:, None]
    return first + row * distance + tl.arange(0, C)[None, :], row < left


@triton.jit
def load_share(
    share, masters, gates,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STARTS: tl.constexpr, GATE_STARTS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A share (R, C) of the masters, each row's element (R,) of the gate, and where it lies, for `store_share`."""
    first, distance, row, left = place_share(share, ROWS, COLUMNS, STARTS, R, C)
    offsets, exists = share_tile(first, distance, left, R, C)
    value = tl.load(choose(share, masters, STARTS) + offsets, mask=exists, other=0.0)
    rows = tl.arange(0, R)
    gated = (rows < left) & (share >= GATE_STARTS[0])
    factor = tl.load(choose(share, gates, GATE_STARTS) + row + rows, mask=gated, other=1.0)
    return value, factor, first, distance, left


@triton.jit
def store_share(share, loaded, copies, STARTS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Write what `load_share` gave, multiplied, in the copies' type; nothing where there was nothing."""
    value, factor, first, distance, left = loaded
    offsets, exists = share_tile(first, distance, left, R, C)
    product = value.to(tl.float32) * factor.to(tl.float32)[:, None]
    tl.store(choose(share, copies, STARTS) + offsets, product.to(copies[0].dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["M"])
def up_swiglu_kernel(
    x, weight, gate_up, hidden, masters, gates, copies, M,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STARTS: tl.constexpr, GATE_STARTS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Hidden (M, F) from x (M, D) and weight (2F, D); with KEEP also gate_up (M, 2F), the product itself.

    Beside it, unless EVERY is 0, copies of the masters (N, M) in another type, the rows of the last of them multiplied
    by gates (N,): in shares, see above, of which a program has at most D / BK / EVERY.
    """
    start_early(EARLY)
    row, column = tile_corner(M, F, BM, BN, GROUP)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    share = tl.program_id(0)
    if EVERY > 0:
        held = load_share(share, masters, gates, ROWS, COLUMNS, STARTS, GATE_STARTS, R, C)
    for k in range(0, D, BK):
        tokens = x.load([row, k])
        gate = tl.dot(tokens, weight.load([column, k]).T, gate)
        up = tl.dot(tokens, weight.load([F + column, k]).T, up)
        if EVERY > 0:  # noqa: SIM102 - what is known when compiling, and what isn't
            if (k // BK) % EVERY == EVERY - 1:
                store_share(share, held, copies, STARTS, R, C)
                share += tl.num_programs(0)
                held = load_share(share, masters, gates, ROWS, COLUMNS, STARTS, GATE_STARTS, R, C)
    # Rounded first, as the product by itself would be: the backward pass begins with the rounded values.
    dtype: tl.constexpr = hidden.dtype
    rounded_gate = gate.to(dtype)
    rounded_up = up.to(dtype)
    if KEEP:
        gate_up.store([row, column], rounded_gate)
        gate_up.store([row, F + column], rounded_up)
    gate, up = widen((rounded_gate, rounded_up), PRECISION != "interpreter")
    # exp2 may overflow for gates far below 0; the sigmoid is then 0, as it should be.
    hidden.store([row, column], (gate * sigmoid(gate, PRECISION) * up).to(dtype))


@triton.jit(do_not_specialize=["M"])
def down_swiglu_backward_kernel(
    dout, weight, gate_up, dgate_up, hidden, M,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """dgate_up (M, 2F) and hidden (M, F) from dout (M, D), weight (D, F) and gate_up (M, 2F)."""
    start_early(EARLY)
    row, column = tile_corner(M, F, BM, BN, GROUP)
    gradient = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        gradient = tl.dot(dout.load([row, k]), weight.load([k, column]), gradient)
    dtype: tl.constexpr = hidden.dtype
    gate = gate_up.load([row, column]).to(tl.float32)
    share = sigmoid(gate, PRECISION)
    silu = gate * share
    dgate_up.store([row, F + column], (gradient * silu).to(dtype))
    # Only now, so that no more than three numbers an element are there at once.
    up = gate_up.load([row, F + column]).to(tl.float32)
    hidden.store([row, column], (silu * up).to(dtype))
    dgate_up.store([row, column], (gradient * up * (share + silu * (1.0 - share))).to(dtype))
