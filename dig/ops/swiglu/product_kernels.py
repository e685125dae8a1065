"""Triton kernels of the matrix products on SwiGLU's two sides, with its passes in them.

Shapes: M tokens, D width, F inner width of SwiGLU. A program computes BM tokens by BN of the F columns.

Operands come through tensor descriptors, which Hopper's copy engine reads tiles by: rows past the end are read as 0 and
not written.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["M"])
def up_swiglu_kernel(
    x, weight, gate_up, hidden, M,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Hidden (M, F) from x (M, D) and weight (2F, D); with KEEP also gate_up (M, 2F), the product itself."""
    row, column = tile_corner(M, F, BM, BN, GROUP)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        tokens = x.load([row, k])
        gate = tl.dot(tokens, weight.load([column, k]).T, gate)
        up = tl.dot(tokens, weight.load([F + column, k]).T, up)
    # Rounded first, as the product by itself would be: the backward pass begins with the rounded values.
    dtype: tl.constexpr = hidden.dtype
    rounded_gate = gate.to(dtype)
    rounded_up = up.to(dtype)
    if KEEP:
        gate_up.store([row, column], rounded_gate)
        gate_up.store([row, F + column], rounded_up)
    gate = rounded_gate.to(tl.float32)
    # exp may overflow for gates far below 0; the sigmoid is then 0, as it should be.
    hidden.store([row, column], (gate / (1.0 + tl.exp(-gate)) * rounded_up.to(tl.float32)).to(dtype))


@triton.jit(do_not_specialize=["M"])
def down_swiglu_backward_kernel(
    dout, weight, gate_up, dgate_up, hidden, M,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dgate_up (M, 2F) and hidden (M, F) from dout (M, D), weight (D, F) and gate_up (M, 2F)."""
    row, column = tile_corner(M, F, BM, BN, GROUP)
    gradient = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        gradient = tl.dot(dout.load([row, k]), weight.load([k, column]), gradient)
    dtype: tl.constexpr = hidden.dtype
    gate = gate_up.load([row, column]).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate_up.store([row, F + column], (gradient * silu).to(dtype))
    # Only now, so that no more than three numbers an element are there at once.
    up = gate_up.load([row, F + column]).to(tl.float32)
    hidden.store([row, column], (silu * up).to(dtype))
    dgate_up.store([row, column], (gradient * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype))
