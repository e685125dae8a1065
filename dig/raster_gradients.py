"""Blocks' gradients, handed to autograd later than their blocks end.

Within a CUDA graph the gradients of a block's weights are computed beside the chain of kernels. What autograd is given
it may read at once: so a block that gave it its own would first have to wait for them, some 50 µs of the 390 that a
block of DiG-S goes back in with 32 images of 256 pixels, and nearly nothing of it computed by the whole card. Here
blocks are given proxies of their parameters, whose gradients meet in nodes of their own. Hooks of parameters and
accumulated gradients see what they always see.

**In one piece**, where one process trains: one node has all blocks' parameters. Autograd reaches it after all blocks,
it waits once, and hands them on.

**A block late**, where processes may reduce gradients among each other while the backward pass goes on, as
DistributedDataParallel does: at its end they would all come at once. Each block's parameters have a node, which
autograd reaches when the block that is gone back through next is done. That one has caught up with the side work of the
one before (`dig.ops.side_stream.Part`), so the node waits for nothing. Autograd takes of the nodes that it can go back
through the one that was made last. So a node is made right before the forward pass of the block that it is to be
reached after. Where DistributedDataParallel's sender lends places (`dig.gradient_places`), the gradients of a block's
large weights are written there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dig.gradient_places import Places, places_here
from dig.ops.side_stream import Across, Part, uses_side_stream
from dig.raster_weights import BlockWeights, LargeGradients


def gathers() -> bool:
    """Whether blocks' gradients gain by it, here and now."""
    return torch.is_grad_enabled() and uses_side_stream()


def lags() -> bool:
    """Whether each block's are handed on a block late, and not in one piece: there are processes that may reduce them.

    Nobody says so here. Where none does, a block late is as right.
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Gathered:
    """What all blocks are given, so that the parameters and the condition get their gradients later.

    Args:
        weights: Of all blocks; one that is in two of them has a proxy in each.
        c: (B, D), the condition after its SiLU, which each block reads.

    Attributes:
        weights: Of all blocks, the same values; those of a block may be replaced up to its `step`.
        conditions: A c for each block.
        parts: The side work of each block, which ends before its gradients are handed on.
    """

    def __init__(self, weights: Sequence[BlockWeights], c: Tensor) -> None:
        across = Across()
        self.parts = [across.part() for _ in weights]
        self._late = lags()
        self._places = places_here() if self._late else None
        # Nothing is gone back through after the first block that would catch up with it. So where the others are a
        # block late, it has the node that waits, which the condition's gradient has to come through too.
        last = weights[:1] if self._late else weights
        made = _Gather.apply(across, len(weights), c, *_differentiable(last))
        stand_ins = iter(made)
        self.conditions = [next(stand_ins) for _ in weights]
        self.weights = [_replaced(block, stand_ins) for block in last] + list(weights[len(last) :])
        if self._late and len(made) > len(weights):
            self._find_places(0, weights[0], made[-1])

    def step(self, i: int) -> None:
        """To be called right before block i's forward pass, and before anything takes block i + 1's weights to keep."""
        if not self._late or i + 1 >= len(self.weights):
            return
        tensors = _differentiable(self.weights[i + 1 : i + 2])
        if tensors:
            made = _HandOn.apply(self.parts[i + 1], *tensors)
            self._find_places(i + 1, self.weights[i + 1], made[-1])
            self.weights[i + 1] = _replaced(self.weights[i + 1], iter(made))

    def _find_places(self, i: int, block: BlockWeights, stand_in: Tensor) -> None:
        """Let block i's backward pass ask for places of its parameters, of which the last has this stand-in."""
        if self._places is None:
            return
        tensors = _differentiable([block])
        # Nodes of the parameters, and not the stand-in's own: that holds the part, which would hold it.
        made_by: Any = stand_in.grad_fn
        nodes = [node for node, _ in made_by.next_functions[-len(tensors) :]]
        accumulators = {id(tensor): node for tensor, node in zip(tensors, nodes, strict=True)}
        large = [getattr(block, name) for name in LargeGradients._fields]
        asked = [(tensor, accumulators[id(tensor)]) if tensor.requires_grad else None for tensor in large]
        self.parts[i].places = partial(_take, self._places, asked)


def _take(places: Places, asked: Sequence[tuple[Tensor, Any] | None]) -> LargeGradients:
    return LargeGradients._make(None if one is None else places.take(*one) for one in asked)


def _differentiable(weights: Sequence[BlockWeights]) -> list[Tensor]:
    return [tensor for block in weights for tensor in block if tensor is not None and tensor.requires_grad]


def _replaced(block: BlockWeights, stand_ins: Iterator[Tensor]) -> BlockWeights:
    """A block's parameters, those of `_differentiable` by what stands in for them."""
    return BlockWeights._make(t if t is None or not t.requires_grad else next(stand_ins) for t in block)


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


class _HandOn(torch.autograd.Function):
    """A block's parameters; backwards their gradients, once the block's side work is done."""

    @staticmethod
    def forward(ctx: Any, part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.part = part
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        part: Part = ctx.part
        part.join()
        return None, *gradients
