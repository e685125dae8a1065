"""One DiG block on this project's kernels, tokens in raster order: with gradients or without, compiled or as it is.

Its passes are written out in `dig.raster_training` and `dig.raster_inference`; for torch.compile each of them is one
operation (`dig.raster_compiled`).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dig import raster_compiled
from dig.ops.derivatives import refuse_export, refuse_second_derivatives
from dig.ops.side_stream import Part, side_work
from dig.ops.tiles import passes_for
from dig.raster_inference import infer_block, infer_images
from dig.raster_operations import steps_for
from dig.raster_plan import BlockPlan
from dig.raster_training import backward_pass, forward_pass
from dig.raster_weights import Ahead, BlockWeights, Prepared, Settings, prepare_block


class RasterBlock(torch.autograd.Function):
    """`dig.model.DiGBlock` in raster order, for `train_block`, which names the arguments.

    Autograd knows positions only: after the tokens x (B, T, D), the condition after its SiLU c (B, D), the settings,
    the part of the side work that runs on into the next block (`Ahead`; or None) and `Prepared` come `BlockWeights`,
    field by field. Of what was prepared nothing is differentiated, and autograd isn't told of its tensors: gradients go
    to the parameters and to c. Differentiable once (`dig.ops.derivatives`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        c: Tensor,
        settings: Settings,
        part: Part | None,
        prepared: Prepared,
        *weights: Tensor | None,
    ) -> Tensor:
        """(B, T, D) in x's dtype."""
        w, modulation = BlockWeights._make(weights), prepared.modulation
        steps = steps_for(x, c, modulation, w, settings)
        out, kept = forward_pass(x, c, modulation, prepared.products, w, settings, steps)
        ctx.save_for_backward(*kept, *w)
        ctx.settings, ctx.part = settings, part
        ctx.plan = steps if isinstance(steps, BlockPlan) else None
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, c and the parameters; None for a parameter that is frozen."""
        refuse_second_derivatives()
        needed = BlockWeights._make(ctx.needs_input_grad[-_WEIGHTS:])
        condition, dout, part = ctx.needs_input_grad[1], dout.contiguous(), cast("Part | None", ctx.part)
        with side_work(dout.device) if part is None else part.work(dout.device):
            dx, dc, gradients = backward_pass(
                partial(_take, ctx), dout, ctx.settings, needed, condition=condition, part=part, plan=ctx.plan
            )
        weights = [gradient if asked else None for gradient, asked in zip(gradients, needed, strict=True)]
        return dx, dc, None, None, None, *weights


_WEIGHTS = len(BlockWeights._fields)


def _take(ctx: Any) -> tuple[Tensor | None, ...]:
    """What a node has saved, which it lets go unless the graph is kept."""
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()
    return saved


def train_block(
    x: Tensor,
    c: Tensor,
    prepared: Prepared,
    weights: BlockWeights,
    settings: Settings,
    part: Part | None = None,
) -> Tensor:
    """`RasterBlock` by names.

    Args:
        x: (B, T, D) in raster order, in the dtype of the products.
        c: (B, D), the condition after its SiLU.
        prepared: Without folded gates.
        weights: The block's.
        settings: Its settings.
        part: As of `Ahead`.

    Returns:
        (B, T, D) in x's dtype.
    """
    out: Tensor = RasterBlock.apply(x, c, settings, part, prepared, *weights)
    return out


def run_block(x: Tensor, c: Tensor, weights: BlockWeights, settings: Settings, ahead: Ahead | None = None) -> Tensor:
    """A whole block, with gradients or without.

    Args:
        x: (B, T, D) in raster order, in the dtype of the products.
        c: (B, D), the condition before its SiLU.
        weights: The block's.
        settings: Its settings.
        ahead: What was computed before, for it.

    Returns:
        (B, T, D) in x's dtype.
    """
    # Gates can act on weights instead of tokens where one condition serves all of them, and no gradient asks for both.
    fold_gates = folds_gates(x, weights)
    activated = F.silu(c) if ahead is None else ahead.activated
    prepared = None if ahead is None else ahead.prepared
    grad = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        # What a pass takes of the weights and the condition is part of its operation; nothing was made ahead of it.
        if grad:
            refuse_export()
            return raster_compiled.train_block(x, activated, weights, settings)
        return raster_compiled.infer(x, activated, weights, settings, fold_gates=fold_gates)
    if prepared is None:
        prepared = prepare_block(weights, activated, x.dtype, fold_gates=fold_gates)
    if grad:
        return train_block(x, activated, prepared, weights, settings, None if ahead is None else ahead.part)
    if not fold_gates:
        return infer_images(x, prepared, weights, settings)
    fused_cast, in_place = (None, False) if ahead is None else (ahead.fused_cast, ahead.in_place)
    return infer_block(x, prepared, weights, settings, fused_cast=fused_cast, in_place=in_place)


def folds_gates(x: Tensor, weights: BlockWeights) -> bool:
    """Whether `run_block` takes weights with folded gates for such tokens."""
    images, tokens, width = x.shape
    if images != 1 or torch.is_grad_enabled():
        return False
    passes = passes_for(x.device)
    many = tokens > passes.unfolded_tokens or width < passes.unfolded_width
    return many or any(weight.dtype != x.dtype for weight in weights.products)
