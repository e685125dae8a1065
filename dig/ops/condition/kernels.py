"""Triton kernels of `dig.ops.condition`; shapes as there. Grid (ceil(D / ROWS), B) both."""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x times its sigmoid, x in fp32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def embed_timestep_kernel(
    t,
    weight,
    bias,
    hidden,
    D: tl.constexpr,
    HALF: tl.constexpr,
    RATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``hidden = silu(weight e(t) + bias)`` (B, D) in fp32 from weight (D, 2 HALF), the cosines' columns first.

    The logarithms of the frequencies are RATE apart. Every program computes all sinusoids: they are few.
    """
    image = tl.program_id(1)
    index = tl.arange(0, BLOCK)
    exists = index < HALF
    angle = tl.load(t + image).to(tl.float32) * tl.exp(index.to(tl.float32) * RATE)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = weight + rows[:, None] * (2 * HALF) + index[None, :]
    mask = (rows < D)[:, None] & exists[None, :]
    cosines = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.cos(angle)[None, :]
    sines = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32) * tl.sin(angle)[None, :]
    value = tl.sum(cosines + sines, axis=1) + tl.load(bias + rows, mask=rows < D, other=0.0).to(tl.float32)
    tl.store(hidden + image * D + rows, silu(value), mask=rows < D)


@triton.jit(do_not_specialize=["labels"])
def finish_condition_kernel(
    hidden,
    weight,
    bias,
    table,
    y,
    out,
    activated,
    labels,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = weight hidden + bias + table[y]`` (B, D) and its SiLU; NaN for a label that the table lacks."""
    image = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = weight + rows[:, None] * D
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        factor = tl.load(hidden + image * D + cols, mask=cols < D, other=0.0)
        mask = (rows < D)[:, None] & (cols < D)[None, :]
        total += tl.load(at + cols[None, :], mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    label = tl.load(y + image)
    known = (label >= 0) & (label < labels)
    vector = tl.load(table + label.to(tl.int64) * D + rows, mask=(rows < D) & known, other=float("nan")).to(tl.float32)
    value = tl.sum(total, axis=1) + tl.load(bias + rows, mask=rows < D, other=0.0).to(tl.float32) + vector
    at = image * D + rows
    tl.store(out + at, value.to(out.dtype.element_ty), mask=rows < D)
    tl.store(activated + at, silu(value).to(out.dtype.element_ty), mask=rows < D)
