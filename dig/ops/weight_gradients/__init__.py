"""The gradients of a block's four large weights in one launch, where each by itself would leave most SMs idle.

Shapes: M tokens of all images, N and K rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dig.ops.launch import ALIGNMENT, launch_context
from dig.ops.tiles import for_device
from dig.ops.tiles.products import GradientTiles
from dig.ops.weight_gradients.kernels import grouped_product_kernel

COUNT = 4
"""Weights of a launch."""


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
    if tiles is None or len(weights) != COUNT:
        return None
    plain = x.dtype == torch.bfloat16 and all(weight.dtype == torch.float32 for weight in weights)
    # Rows of a tile's operands begin at what TMA asks for, and tiles end with the rows.
    whole = all(N * x.itemsize % ALIGNMENT == 0 and K % tiles.columns == 0 for N, K in (w.shape for w in weights))
    return tiles if plain and whole else None


def weight_gradients(
    pairs: Sequence[tuple[Tensor, Tensor]],
    tiles: GradientTiles | None = None,
    places: Sequence[Tensor | None] = (None,) * COUNT,
) -> list[Tensor]:
    """``dy^T x`` of each pair, in fp32: the gradients (N, K) of four weights.

    Args:
        pairs: dy (M, N) and x (M, K) of each weight, contiguous, in bf16; see `groups_gradients`.
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
    gradients = [
        torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device=x.device) if place is None else place
        for (dy, x), place in zip(pairs, places, strict=True)
    ]
    operands = [
        (TensorDescriptor.from_tensor(dy, [t.depth, t.rows]), TensorDescriptor.from_tensor(x, [t.depth, t.columns]), g)
        for (dy, x), g in zip(pairs, gradients, strict=True)
    ]
    sizes = chain.from_iterable(((f"N{i}", g.shape[0]), (f"K{i}", g.shape[1])) for i, g in enumerate(gradients))
    with launch_context(dy.device) as launch:
        launch.early(
            grouped_product_kernel, (sum(t.programs(*g.shape) for g in gradients),), tuple(chain(*operands)),
            (len(dy),), **dict(sizes), BN=t.rows, BK=t.columns, BM=t.depth, **t.options,
        )  # fmt: skip
    return gradients
