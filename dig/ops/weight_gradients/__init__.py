"""The gradients of a block's four large weights in one launch, where each by itself would leave most SMs idle.

Shapes: M tokens of all images, N and K rows and columns of a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dig.ops.descriptors import Box
from dig.ops.launch import ALIGNMENT, Launch, launch_context
from dig.ops.tiles import for_device
from dig.ops.tiles.products import GradientTiles
from dig.ops.weight_gradients.kernels import grouped_product_kernel

COUNT = 4
"""Weights of a launch."""
_BF16 = 2
"""Bytes."""


def groups_gradients(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `weight_gradients` computes these weights' gradients, and does it faster than a GEMM each.

    Args:
        x: Tokens (B, T, D), in the dtype of the products.
        weights: (N, K) each, in the dtype of their gradients.
    """
    return _tiles(x, weights) is not None


def _tiles(x: Tensor, weights: Sequence[Tensor]) -> GradientTiles | None:
    D = x.shape[-1]
    tiles = for_device(x.device).gradient_tiles(x.numel() // D, D)
    if tiles is None or len(weights) != COUNT or x.dtype != torch.bfloat16:
        return None
    # A loop, for this is asked of every block in every backward pass.
    for weight in weights:
        N, K = weight.shape
        # Rows of a tile's operands begin at what TMA asks for, and tiles end with the rows.
        if weight.dtype != torch.float32 or N * _BF16 % ALIGNMENT or K % tiles.columns:
            return None
    return tiles


@functools.lru_cache(maxsize=1024)
def _launch(tiles: GradientTiles, M: int, sizes: tuple[tuple[int, int], ...]) -> Launch:
    """`grouped_product_kernel`'s: on each weight's dy and x, M rows, and its gradient, whose sizes these are."""
    boxes: list[Box | None] = []
    for N, K in sizes:
        boxes += [([M, N], [N, 1], [tiles.depth, tiles.rows]), ([M, K], [K, 1], [tiles.depth, tiles.columns]), None]
    named = chain.from_iterable(((f"N{i}", N), (f"K{i}", K)) for i, (N, K) in enumerate(sizes))
    constants: dict[str, Any] = {**dict(named), **tiles.options}
    return Launch(
        grouped_product_kernel, (sum(tiles.programs(*size) for size in sizes),), (M,), early=True, boxes=tuple(boxes),
        BN=tiles.rows, BK=tiles.columns, BM=tiles.depth, **constants,
    )  # fmt: skip


def weight_gradients(
    pairs: Sequence[tuple[Tensor, Tensor]],
    tiles: GradientTiles | None = None,
    places: Sequence[Tensor | None] = (None,) * COUNT,
) -> list[Tensor]:
    """``dy^T x`` of each pair, in fp32: the gradients (N, K) of four weights.

    Args:
        pairs: dy (..., N) and x (..., K) of each weight, M rows both, contiguous, in bf16; see `groups_gradients`.
        tiles: Those to take; the device's if not given.
        places: Memory to write each gradient into, contiguous, in fp32; new memory where there is none. At 16 bytes it
            takes the same compiled kernel.

    Raises:
        ValueError: The device has none.
    """
    (dy, _), *_ = pairs
    t = for_device(dy.device).gradients if tiles is None else tiles
    if t is None:
        raise ValueError(f"{for_device(dy.device)} has no tile choices for weights' gradients in one launch")
    sizes = tuple([(dy.shape[-1], x.shape[-1]) for dy, x in pairs])
    device = dy.device
    given: list[Tensor] = []
    gradients: list[Tensor] = []
    for (one, other), (N, K), place in zip(pairs, sizes, places, strict=True):
        gradient = torch.empty(N, K, dtype=torch.float32, device=device) if place is None else place
        gradients.append(gradient)
        given += (one, other, gradient)
    launch_context(device).start(_launch(t, dy.numel() // sizes[0][0], sizes), *given)
    return gradients
