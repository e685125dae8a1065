"""A matrix product with a few columns, by a kernel that is short and leaves room for others beside it.

Shapes: M rows, D width, N columns.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dig.ops.launch import on_device

MOST_COLUMNS = 64
ROWS, DEPTH, WARPS, STAGES = 32, 128, 4, 4
"""Rows of a program, elements of the sum that it takes at a time, its warps, and steps in flight: 128 programs at
T = 4096, about as many as an H100 has multiprocessors.
"""


@triton.jit(do_not_specialize=["M"])
def narrow_product_kernel(
    x, weight, out, M, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (M, N) from x (M, D) and weight (N, D). Grid (ceil(M / BM),); NP is N padded to a power of two."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.arange(0, NP)
    total = tl.zeros([BM, NP], tl.float32)
    for k in range(0, D, BK):
        at = k + tl.arange(0, BK)
        tokens = tl.load(
            x + rows[:, None] * X_ROW + at[None, :], mask=(rows < M)[:, None] & (at < D)[None, :], other=0.0
        )
        factors = tl.load(
            weight + columns[None, :] * D + at[:, None], mask=(columns < N)[None, :] & (at < D)[:, None], other=0.0
        )
        total = tl.dot(tokens, factors, total, input_precision="ieee")
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows[:, None] * OUT_ROW + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("dig::narrow_product", mutates_args=("out",))
def narrow_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write ``x weight^T``, summed in fp32, to out.

    Args:
        x: (M, D), contiguous in its last dimension.
        weight: (N, D), of x's dtype; N at most `MOST_COLUMNS`.
        out: (M, N), likewise, of any distance between rows.

    Raises:
        ValueError: An argument that does not fit; the message names it.
    """
    M, D = x.shape
    N = len(weight)
    if weight.dtype != x.dtype or weight.shape[1] != D or not 1 <= N <= MOST_COLUMNS:
        allowed = f"(N, {D}) in {x.dtype}, N from 1 to {MOST_COLUMNS}"
        raise ValueError(f"weight must be {allowed}; got {tuple(weight.shape)}, {weight.dtype}")
    if tuple(out.shape) != (M, N) or out.dtype != x.dtype:
        raise ValueError(f"out must be ({M}, {N}) in {x.dtype}; got {tuple(out.shape)}, {out.dtype}")
    for name, tensor in (("x", x), ("out", out)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension; its strides are {tensor.stride()}")
    with on_device(x.device):
        narrow_product_kernel[(triton.cdiv(M, ROWS),)](
            x, weight.contiguous(), out, M, X_ROW=x.stride(0), OUT_ROW=out.stride(0),
            D=D, N=N, NP=max(16, triton.next_power_of_2(N)), BM=ROWS, BK=DEPTH, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip


@narrow_product.register_fake
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None
