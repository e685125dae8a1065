"""Triton kernels of SwiGLU, element by element.

Shapes: M rows, F inner width; a row of gate_up is its F gates, then its F values, and rows are ``stride`` apart.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(M, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1), columns (1, COLS) and mask of this program; a mask on columns only where COLS does not divide F.

    Grid (ceil(M / ROWS), ceil(F / COLS)).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    mask = rows < M
    if F % COLS != 0:
        mask = mask & (cols < F)
    return rows.to(tl.int64), cols, mask


@triton.jit(do_not_specialize=["M"])
def swiglu_kernel(gate_up, hidden, stride, M, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Hidden (M, F), contiguous, from gate_up (M, 2F)."""
    rows, cols, mask = tile(M, F, ROWS, COLS)
    pointers = gate_up + rows * stride + cols
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + F, mask=mask, other=0.0).to(tl.float32)
    # exp may overflow for gates far below 0; the sigmoid is then 0, as it should be.
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(hidden + rows * F + cols, (gate * sigmoid * up).to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def swiglu_backward_kernel(
    gate_up,
    dhidden,
    dgate_up,
    hidden,
    stride,
    dhidden_stride,
    M,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The gradient dgate_up (M, 2F), contiguous, from gate_up (M, 2F) and dhidden (M, F).

    With HIDDEN, also the forward pass's hidden (M, F) again, contiguous; it is written only then.
    """
    rows, cols, mask = tile(M, F, ROWS, COLS)
    pointers = gate_up + rows * stride + cols
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + F, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(dhidden + rows * dhidden_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    dup = gradient * silu
    pointers = dgate_up + rows * (2 * F) + cols
    tl.store(pointers, dgate.to(dgate_up.dtype.element_ty), mask=mask)
    tl.store(pointers + F, dup.to(dgate_up.dtype.element_ty), mask=mask)
    if HIDDEN:
        tl.store(hidden + rows * F + cols, (silu * up).to(hidden.dtype.element_ty), mask=mask)
