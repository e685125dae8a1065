"""Triton kernels of SREM: a 3x3 depth-wise convolution of gated, residual tokens, forwards and backwards.

Shapes: B batch, T tokens in raster order, D channels; W columns that a thread computes side by side, G such groups in a
program, BD channels of a program.

A program owns a strip of BD channels, and of the grid a patch of ``patch_rows`` rows and G·W columns, which it walks
down row by row. Everything stays in registers: a thread loads the W + 2 columns of a row that its outputs need, so a
token is loaded (W + 2) / W times, all but one of them from the caches, and its gated sum is computed that often. The
loads of a row are issued one iteration before they are needed.

The kernel that SREM's orientation asks for is read from the unoriented weight: the tap at row a and column b of the
raster grid lies at ``tap_start + a * tap_row + b * tap_column`` of a channel's nine. These three are arguments and not
constants, so that all orders share one binary.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# Tuples of tensors are built up one by one, which to mypy changes their type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated, unreachable"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.arithmetic import widen
from dig.ops.early_launch import start_early

TOKEN_SUMS = tl.constexpr(10)
"""Gradients that are sums over every token: nine taps and the bias. The gate's is one for each batch entry."""
UNSPECIALIZED = ["rows", "columns", "patch_rows", "tap_start", "tap_row", "tap_column"]
"""Integers that Triton shall not specialize on (divisible by 16): one binary serves every grid and order."""


@triton.jit
def patch_corner(patch_rows, columns, W: tl.constexpr, G: tl.constexpr):
    """The program's first row, and the first column (G, 1) of each of its groups."""
    across = tl.cdiv(columns, G * W)
    patch = tl.program_id(1)
    return patch // across * patch_rows, (patch % across * (G * W) + tl.arange(0, G) * W)[:, None]


@triton.jit
def strip(D: tl.constexpr, BD: tl.constexpr):
    """The program's channels (BD,), and which of them exist."""
    channels = tl.program_id(0) * BD + tl.arange(0, BD)
    return channels, channels < D


@triton.jit
def load_taps(weight, channels, exists, tap_start, tap_row, tap_column):
    """Nine (1, BD) in fp32, row by row."""
    taps = ()
    for a in tl.static_range(3):
        for b in tl.static_range(3):
            at = weight + tap_start + a * tap_row + b * tap_column
            taps += (tl.load(at + channels * 9, mask=exists, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def load_row(start, row_stride, row, first_row, end_row, inside, STRIDE: tl.constexpr):
    """A tuple of (G, BD), one for each column; 0 outside rows first_row .. end_row-1 and where not inside.

    Args:
        start: Pointers (G, BD) to the first column, in row 0.
        row_stride: From row to row, int64.
        row: Which one.
        first_row: The first that is wanted and exists.
        end_row: The first after those.
        inside: A mask (G, BD) for each column.
        STRIDE: From column to column.
    """
    wanted = (row >= first_row) & (row < end_row)
    pointers = start + row * row_stride
    values = ()
    for i in tl.static_range(len(inside)):
        values += (tl.load(pointers + i * STRIDE, mask=inside[i] & wanted, other=0.0),)
    return values


@triton.jit
def gated_sum(x, branch, gate, GATED: tl.constexpr, PACKED: tl.constexpr):
    """x + gate · branch, rounded to x's dtype as if it had been stored, in fp32: a tuple like x.

    PACKED is for bf16 throughout on a GPU: one instruction takes two of the sums as they were loaded, and rounds once.
    """
    if not GATED:
        return widen(x, PACKED)
    total = ()
    for i in tl.static_range(len(x)):
        if PACKED:
            value = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [gate.to(tl.bfloat16), branch[i], x[i]],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = (x[i].to(tl.float32) + gate * branch[i].to(tl.float32)).to(x[i].dtype)
        total += (value,)
    return widen(total, PACKED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def srem_forward_kernel(
    x, branch, gate, weight, bias, y, x_b, branch_b, gate_b, rows, columns, patch_rows, tap_start, tap_row, tap_column,
    D: tl.constexpr, X_T: tl.constexpr, BRANCH_T: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y of one patch. x_b, branch_b, gate_b are strides of the batch; X_T, BRANCH_T those of a token."""
    start_early(EARLY)
    batch = tl.program_id(2).to(tl.int64)
    row_tokens = columns.to(tl.int64)
    channels, exists = strip(D, BD)
    first_row, first = patch_corner(patch_rows, columns, W, G)
    end_row = tl.minimum(first_row + patch_rows, rows)
    taps = load_taps(weight, channels, exists, tap_start, tap_row, tap_column)
    constant = tl.load(bias + channels, mask=exists, other=0.0).to(tl.float32)[None, :]
    scale = constant
    if GATED:
        scale = tl.load(gate + batch * gate_b + channels, mask=exists, other=0.0).to(tl.float32)[None, :]

    inside = ()
    for i in tl.static_range(W + 2):
        inside += ((first + (i - 1) >= 0) & (first + (i - 1) < columns) & exists[None, :],)
    x_start = x + batch * x_b + ((first - 1) * X_T + channels[None, :])
    branch_start = branch + batch * branch_b + ((first - 1) * BRANCH_T + channels[None, :])
    y_start = y + batch * rows * columns * D + (first * D + channels[None, :])

    # An input row ends the sum of the row above it, goes on with that of its own row, and begins that of the row below.
    above = ()
    middle = ()
    for _ in tl.static_range(W):
        above += (tl.zeros((G, BD), tl.float32),)
        middle += (tl.zeros((G, BD), tl.float32) + constant,)
    next_x = load_row(x_start, row_tokens * X_T, first_row - 1, 0, rows, inside, X_T)
    next_branch = next_x
    if GATED:
        next_branch = load_row(branch_start, row_tokens * BRANCH_T, first_row - 1, 0, rows, inside, BRANCH_T)
    values = gated_sum(next_x, next_branch, scale, GATED, PACKED)
    last = tl.minimum(rows, end_row + 1)
    row = first_row - 1
    while row <= end_row:
        next_x = load_row(x_start, row_tokens * X_T, row + 1, 0, last, inside, X_T)
        if GATED:
            next_branch = load_row(branch_start, row_tokens * BRANCH_T, row + 1, 0, last, inside, BRANCH_T)
        pointers = y_start + (row - 1) * (row_tokens * D)
        new_above = ()
        new_middle = ()
        for i in tl.static_range(W):
            done = above[i]
            going = middle[i]
            begun = tl.zeros((G, BD), tl.float32) + constant
            for b in tl.static_range(3):
                done += taps[6 + b] * values[i + b]
                going += taps[3 + b] * values[i + b]
                begun += taps[b] * values[i + b]
            tl.store(pointers + i * D, done.to(y.dtype.element_ty), mask=inside[i + 1] & (row > first_row))
            new_above += (going,)
            new_middle += (begun,)
        above = new_above
        middle = new_middle
        values = gated_sum(next_x, next_branch, scale, GATED, PACKED)
        row += 1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def srem_backward_kernel(
    x, branch, gate, weight, dy, dx, dbranch, sums, x_b, branch_b, gate_b, rows, columns, patch_rows,
    tap_start, tap_row, tap_column,
    D: tl.constexpr, X_T: tl.constexpr, BRANCH_T: tl.constexpr, GATED: tl.constexpr, SUM_ONLY: tl.constexpr,
    PACKED: tl.constexpr, W: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dx and dbranch of one patch, and each of its groups' sums over tokens for the gradients of weight, bias and gate.

    With SUM_ONLY, dx is the gradient of x + gate · branch, and dbranch and the gate's gradient are left to the caller.

    With s = x + gate · branch, ds[t] is a sum over taps of w[tap] · dy[t - tap], and dw[tap] one over tokens of
    s[t] · dy[t - tap]: both need the same nine dy, so only dy is read with a halo.
    """
    start_early(EARLY)
    batch = tl.program_id(2).to(tl.int64)
    row_tokens = columns.to(tl.int64)
    channels, exists = strip(D, BD)
    first_row, first = patch_corner(patch_rows, columns, W, G)
    end_row = tl.minimum(first_row + patch_rows, rows)
    taps = load_taps(weight, channels, exists, tap_start, tap_row, tap_column)
    scale = taps[0]
    if GATED:
        scale = tl.load(gate + batch * gate_b + channels, mask=exists, other=0.0).to(tl.float32)[None, :]

    around = ()
    for i in tl.static_range(W + 2):
        around += ((first + (i - 1) >= 0) & (first + (i - 1) < columns) & exists[None, :],)
    inside = around[1:-1]
    x_start = x + batch * x_b + (first * X_T + channels[None, :])
    branch_start = branch + batch * branch_b + (first * BRANCH_T + channels[None, :])
    dy_start = dy + batch * rows * columns * D + ((first - 1) * D + channels[None, :])
    offsets = batch * rows * columns * D + (first * D + channels[None, :])

    SEPARATE: tl.constexpr = GATED and not SUM_ONLY
    zero = tl.zeros((G, BD), tl.float32)
    dtaps = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    dbias = zero
    dgate = zero
    above = widen(load_row(dy_start, row_tokens * D, first_row - 1, 0, rows, around, D), PACKED)
    middle = widen(load_row(dy_start, row_tokens * D, first_row, 0, rows, around, D), PACKED)
    below = widen(load_row(dy_start, row_tokens * D, first_row + 1, 0, rows, around, D), PACKED)
    next_x = load_row(x_start, row_tokens * X_T, first_row, 0, end_row, inside, X_T)
    next_branch = next_x
    if GATED:
        next_branch = load_row(branch_start, row_tokens * BRANCH_T, first_row, 0, end_row, inside, BRANCH_T)
    values = gated_sum(next_x, next_branch, scale, GATED, PACKED)
    branches = widen(next_branch, PACKED)
    last = tl.minimum(rows, end_row + 1)
    row = first_row
    while row < end_row:
        next_dy = load_row(dy_start, row_tokens * D, row + 2, 0, last, around, D)
        next_x = load_row(x_start, row_tokens * X_T, row + 1, 0, end_row, inside, X_T)
        if GATED:
            next_branch = load_row(branch_start, row_tokens * BRANCH_T, row + 1, 0, end_row, inside, BRANCH_T)
        window = below + middle + above
        at = offsets + row * (row_tokens * D)
        for i in tl.static_range(W):
            ds = zero
            updated = ()
            for a in tl.static_range(3):
                for b in tl.static_range(3):
                    neighbour = window[a * (W + 2) + i + 2 - b]
                    ds += taps[3 * a + b] * neighbour
                    updated += (dtaps[3 * a + b] + values[i] * neighbour,)
            dtaps = updated
            # Columns outside the grid were read as 0.
            dbias += middle[i + 1]
            tl.store(dx + at + i * D, ds.to(dx.dtype.element_ty), mask=inside[i])
            if SEPARATE:
                dgate += branches[i] * ds
                tl.store(dbranch + at + i * D, (scale * ds).to(dbranch.dtype.element_ty), mask=inside[i])
        above = middle
        middle = below
        below = widen(next_dy, PACKED)
        values = gated_sum(next_x, next_branch, scale, GATED, PACKED)
        branches = widen(next_branch, PACKED)
        row += 1

    totals = dtaps
    totals += (dbias,)
    if SEPARATE:
        totals += (dgate,)
    # A row for each group of columns. To add those up here would take eleven trips through shared memory, or one in
    # which all threads of a warp write to the same bank.
    groups = (batch * tl.num_programs(1) + tl.program_id(1)) * G + tl.arange(0, G)
    sums += groups[:, None] * (len(totals) * D) + channels[None, :]
    for k in tl.static_range(len(totals)):
        tl.store(sums + k * D, totals[k], mask=exists[None, :])


@triton.jit(do_not_specialize=["parts", "partials", "tap_start", "tap_row", "tap_column"])
def srem_sum_kernel(
    sums, dweight, dbias, dgate, parts, partials, tap_start, tap_row, tap_column,
    D: tl.constexpr, GATED: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add up what `srem_backward_kernel` left of each group of a patch, always in the same order.

    A program takes a strip of channels of one tap, of the bias, or of the gate of one batch entry, which has ``parts``
    of all ``partials``.
    """
    channels, exists = strip(D, BD)
    which = tl.program_id(1)
    batch = tl.maximum(which - TOKEN_SUMS, 0)
    slot = tl.minimum(which, TOKEN_SUMS)
    first = batch * parts
    end = tl.where(which < TOKEN_SUMS, partials, first + parts)
    total = tl.zeros((STEPS, BD), tl.float32)
    while first < end:
        steps = first + tl.arange(0, STEPS)
        at = (steps.to(tl.int64) * (TOKEN_SUMS + GATED) + slot) * D
        total += tl.load(
            sums + at[:, None] + channels[None, :], mask=(steps < end)[:, None] & exists[None, :], other=0.0
        )
        first += STEPS
    value = tl.sum(total, 0)
    if which < 9:
        at = tap_start + which // 3 * tap_row + which % 3 * tap_column
        tl.store(dweight + channels * 9 + at, value.to(dweight.dtype.element_ty), mask=exists)
    elif which == 9:
        tl.store(dbias + channels, value.to(dbias.dtype.element_ty), mask=exists)
    else:
        tl.store(dgate + batch.to(tl.int64) * D + channels, value.to(dgate.dtype.element_ty), mask=exists)
