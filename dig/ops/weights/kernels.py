"""Triton kernels of `dig.ops.weights`; shapes as there."""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare_kernel(
    weights,
    gates,
    copies,
    SIZES: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNGATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy every tensor of a tuple; from the one at UNGATED on, times its row's element of its gate.

    Grid (P,), any P. The blocks of all tensors are counted through, and a program takes every P-th: a grid of as many
    programs as there are blocks gives each one.
    """
    block = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        blocks = tl.cdiv(SIZES[i], BLOCK)
        while block < blocks:
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < SIZES[i]
            value = tl.load(weights[i] + at, mask=mask, other=0.0).to(tl.float32)
            if i >= UNGATED:
                value *= tl.load(gates[i] + at // COLUMNS[i], mask=mask, other=0.0).to(tl.float32)
            tl.store(copies[i] + at, value.to(copies[i].dtype.element_ty), mask=mask)
            block += tl.num_programs(0)
        block -= blocks


@triton.jit
def matrix_vector_kernel(weights, vector, biases, out, N, M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``weight vector + bias`` of every weight (N, M) and bias (N,) of tuples, in fp32, ROWS elements at a time.

    Grid (P, L), any P up to ceil(N / ROWS), of L weights; out (L, N) contiguous.
    """
    layer = tl.program_id(1)
    weight = weights[0]
    bias = biases[0]
    for i in tl.static_range(1, len(weights)):
        weight = tl.where(layer == i, weights[i], weight)
        bias = tl.where(layer == i, biases[i], bias)
    first = tl.program_id(0) * ROWS
    while first < N:
        rows = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        at = weight + rows.to(tl.int64)[:, None] * M
        for start in tl.static_range(0, M, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            factor = tl.load(vector + cols, mask=cols < M, other=0.0).to(tl.float32)
            mask = (rows < N)[:, None] & (cols < M)[None, :]
            total += tl.load(at + cols[None, :], mask=mask, other=0.0).to(tl.float32) * factor[None, :]
        value = tl.sum(total, axis=1) + tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        tl.store(out + layer * N + rows, value.to(out.dtype.element_ty), mask=rows < N)
        first += tl.num_programs(0) * ROWS


@triton.jit
def gated_weight_gradient_kernel(product, weight, gate, dweight, dgate, M: tl.constexpr, BLOCK: tl.constexpr):
    """One row of the gradients. Grid (N,)."""
    row = tl.program_id(0)
    factor = tl.load(gate + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, M, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < M
        value = tl.load(product + row * M + cols, mask=mask, other=0.0).to(tl.float32)
        total += value * tl.load(weight + row * M + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dweight + row * M + cols, (factor * value).to(dweight.dtype.element_ty), mask=mask)
    tl.store(dgate + row, tl.sum(total, axis=0).to(dgate.dtype.element_ty))
