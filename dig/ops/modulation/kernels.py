"""Triton kernels of `dig.ops.modulation`; shapes as there. Products are of fp32 operands, in three of tf32 each."""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(start, stride, rows, cols, end_row, end_col):
    """Elements (R, C) at rows (R,) and cols (C,) of a matrix whose rows are ``stride`` apart, fp32; 0 outside of it."""
    mask = (rows < end_row)[:, None] & (cols < end_col)[None, :]
    return tl.load(start + rows[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def exact_product(a, b, total):
    """``total + a @ b`` of fp32 operands, to fp32's precision."""
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def modulation_kernel(
    c, weight, bias, out, B, N, M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, IMAGES: tl.constexpr
):
    """out (B, N) = c (B, M) weight (N, M)^T + bias (N,). Grid (ceil(N / ROWS), ceil(B / IMAGES)); all contiguous."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    images = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    total = tl.zeros([ROWS, IMAGES], tl.float32)
    for start in range(0, M, COLS):
        cols = start + tl.arange(0, COLS)
        total = exact_product(
            load_tile(weight, M, rows, cols, N, M), tl.trans(load_tile(c, M, images, cols, B, M)), total
        )
    total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    at = out + images[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (images < B)[None, :])


@triton.jit
def weight_gradient_kernel(
    dout,
    c,
    dweight,
    dbias,
    B,
    N,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    IMAGES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dweight (N, M) = dout (B, N)^T c (B, M), and dbias (N,) the sum of dout.

    Grid (ceil(N / ROWS), ceil(M / COLS)); STEPS times IMAGES are at least B.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    for step in range(STEPS):
        images = step * IMAGES + tl.arange(0, IMAGES)
        gradient = load_tile(dout, N, images, rows, B, N)
        sums += tl.sum(gradient, axis=0)
        total = exact_product(tl.trans(gradient), load_tile(c, M, images, cols, B, M), total)
    at = dweight + rows[:, None].to(tl.int64) * M + cols[None, :]
    tl.store(at, total.to(dweight.dtype.element_ty), mask=(rows < N)[:, None] & (cols < M)[None, :])
    # Each program of a row has the same sums; one writes them.
    tl.store(dbias + rows, sums.to(dbias.dtype.element_ty), mask=(rows < N) & (tl.program_id(1) == 0))


@triton.jit
def condition_gradient_kernel(
    dout,
    weight,
    partials,
    B,
    N,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    IMAGES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Parts of dc (B, M) = dout (B, N) weight (N, M): partials (S, B, M), each over STEPS times ROWS of its rows.

    Grid (ceil(M / COLS), S, ceil(B / IMAGES)).
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    images = tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)
    total = tl.zeros([IMAGES, COLS], tl.float32)
    first = tl.program_id(1) * (STEPS * ROWS)
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        total = exact_product(load_tile(dout, N, images, rows, B, N), load_tile(weight, M, rows, cols, N, M), total)
    at = partials + (tl.program_id(1) * B + images[:, None]).to(tl.int64) * M + cols[None, :]
    tl.store(at, total, mask=(images < B)[:, None] & (cols < M)[None, :])
