"""All blocks' gradients, handed to autograd in one piece.

Within a CUDA graph the gradients of a block's weights are computed beside the chain of kernels. What autograd is given
it may read at once: so a block that gave it its own would first have to wait for them, some 50 µs of the 390 that a
block of DiG-S goes back in with 32 images of 256 pixels, and nearly nothing of it computed by the whole card. Here
blocks are given proxies of their parameters, whose gradients meet in one node. Autograd reaches it after all blocks,
it waits once, and hands them on to the parameters. Hooks of parameters and accumulated gradients see what they always
see.

Not where gradients are reduced among processes while the backward pass goes on: they would all come at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dig.ops.side_stream import Across, uses_side_stream
from dig.raster_weights import BlockWeights


def gathers() -> bool:
    """Whether blocks' gradients gain by it, here and now."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return torch.is_grad_enabled() and uses_side_stream() and alone


def gathered(weights: Sequence[BlockWeights], c: Tensor) -> tuple[list[BlockWeights], list[Tensor], Across]:
    """Proxies of all blocks' parameters and for the condition.

    Args:
        weights: Of all blocks; one that is in two of them has a proxy in each.
        c: (B, D), the condition after its SiLU, which each block reads.

    Returns:
        The same values as tensors that the parameters and c get their gradients through: those of the blocks, a c for
        each block, and the side work that ends before any of them is handed on.
    """
    across = Across()
    tensors = [tensor for block in weights for tensor in block if tensor is not None and tensor.requires_grad]
    stand_ins = iter(_Gather.apply(across, len(weights), c, *tensors))
    conditions = [next(stand_ins) for _ in weights]
    blocks = [
        BlockWeights._make(t if t is None or not t.requires_grad else next(stand_ins) for t in block)
        for block in weights
    ]
    return blocks, conditions, across


class _Gather(torch.autograd.Function):
    """As many c's as there are blocks, and the parameters; backwards the sum of the c's gradients, and the others'.

    Autograd knows positions only: after the side work and the number of blocks come c and the parameters.
    """

    @staticmethod
    def forward(ctx: Any, across: Across, blocks: int, c: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.across, ctx.blocks = across, blocks
        ctx.set_materialize_grads(False)
        conditions = tuple(c.detach() for _ in range(blocks))
        if not c.requires_grad:
            ctx.mark_non_differentiable(*conditions)
        return *conditions, *(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        across: Across = ctx.across
        across.join()
        dc: Tensor | None = None
        # From the last block to the first, as autograd would add them.
        for gradient in reversed(gradients[: ctx.blocks]):
            if gradient is not None:
                dc = gradient if dc is None else dc + gradient
        return None, None, dc, *gradients[ctx.blocks :]
