"""Triton kernel of a block's weights' gradients: four matrix products that add up over all tokens, in one launch.

Each has few tiles: with a width of 384 one weight's gradient is 9 to 48 tiles of 128 by 128, where a GPU has 132 SMs.
Together they are a whole wave.
"""
# Kernels are written in Triton's language, whose values and decorators carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dig.ops.early_launch import start_early


@triton.jit
def gradient_tile(
    dy, x, gradient, tile, M, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """One tile (BN, BK) of ``dy^T x``, gradient (N, K) in fp32, from descriptors of dy (M, N) and x (M, K)."""
    across: tl.constexpr = K // BK
    row, column = tile // across * BN, tile % across * BK
    total = tl.zeros((BN, BK), tl.float32)
    for m in range(0, M, BM):
        total = tl.dot(dy.load([m, row]).T, x.load([m, column]), total)
    rows = row + tl.arange(0, BN)
    places = gradient + rows[:, None] * K + (column + tl.arange(0, BK))[None, :]
    tl.store(places, total, mask=(rows < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def grouped_product_kernel(
    dy0, x0, gradient0, dy1, x1, gradient1, dy2, x2, gradient2, dy3, x3, gradient3, M,
    N0: tl.constexpr, K0: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
    N3: tl.constexpr, K3: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradients (N, K), in fp32, of four weights, from dy (M, N) and x (M, K) of each.

    A program computes a tile of BN by BK of one of them, from BM tokens at a time. Widths K are multiples of BK.
    Grid: the tiles of the first, then those of the second, and so on.
    """
    start_early(EARLY)
    tile = tl.program_id(0)
    end0: tl.constexpr = tl.cdiv(N0, BN) * (K0 // BK)
    end1: tl.constexpr = end0 + tl.cdiv(N1, BN) * (K1 // BK)
    end2: tl.constexpr = end1 + tl.cdiv(N2, BN) * (K2 // BK)
    if tile < end0:
        gradient_tile(dy0, x0, gradient0, tile, M, N0, K0, BN, BK, BM)
    if (tile >= end0) & (tile < end1):
        gradient_tile(dy1, x1, gradient1, tile - end0, M, N1, K1, BN, BK, BM)
    if (tile >= end1) & (tile < end2):
        gradient_tile(dy2, x2, gradient2, tile - end1, M, N2, K2, BN, BK, BM)
    if tile >= end2:
        gradient_tile(dy3, x3, gradient3, tile - end2, M, N3, K3, BN, BK, BM)
