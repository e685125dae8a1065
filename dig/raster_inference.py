"""The forward pass of a DiG block on this project's kernels, without gradients, tokens in raster order.

Nothing is kept. With one image, gates are folded into weights and products are added to x in place.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dig.config import EPS
from dig.ops.gla.mixer import order_code
from dig.ops.linear import as_rows
from dig.ops.tiles import passes_for
from dig.raster_operations import add_and_convolve, linear, operations_for
from dig.raster_weights import BlockWeights, FusedCast, Prepared, Settings


def _linear_in_halves(x: Tensor, weight: Tensor) -> Tensor:
    """`linear`, half of the rows at a time: see `PassChoices`."""
    rows = as_rows(x)
    out, half = rows.new_empty(len(rows), len(weight)), len(rows) // 2
    for part in (slice(half), slice(half, None)):
        torch.mm(rows[part], weight.T, out=out[part])
    return out.view(*x.shape[:-1], len(weight))


def infer_block(
    x: Tensor,
    prepared: Prepared,
    weights: BlockWeights,
    settings: Settings,
    *,
    fused_cast: FusedCast | None = None,
    in_place: bool = False,
) -> Tensor:
    """The forward pass alone of one image, without gradients; arguments as of `train_block`, but with folded gates.

    With a fused cast, the next block's weights are prepared too. In place, **x is overwritten**: the sums need no copy.
    """
    w, p, grid, order = weights, prepared.products, settings.grid, settings.order
    shift1, scale1, _, shift2, scale2, _ = prepared.modulation.chunk(6, dim=1)
    ops = operations_for(x)
    h, _ = ops.norm(x, shift1, scale1, w.norm1, settings.norm, EPS, x.dtype)
    halved = fused_cast is not None and h.shape[1] <= passes_for(x.device).halved_tokens
    projected = _linear_in_halves(h, p.in_proj) if halved else linear(h, p.in_proj)
    y, _ = ops.mixer(
        projected, p.decay_weight, w.decay_bias, w.head_norm, settings.heads, *grid, order_code(order), EPS, False
    )
    x = x if in_place else x.clone()
    x[0].addmm_(y[0], p.o_proj.T)
    h, _ = ops.norm(x, shift2, scale2, w.norm2, settings.norm, EPS, x.dtype)
    hidden = ops.up(h, p.gate_proj, False)[0] if fused_cast is None else fused_cast.project_up(h, p.gate_proj)
    x[0].addmm_(hidden[0], p.down_proj.T)
    if w.conv_weight is None or w.conv_bias is None:
        return x
    return ops.srem(x, None, None, w.conv_weight, w.conv_bias, *grid, *order)


def infer_images(x: Tensor, prepared: Prepared, weights: BlockWeights, settings: Settings) -> Tensor:
    """The forward pass alone of images with a condition each; arguments as of `train_block`: no gate is folded.

    What only a backward pass reads is not written: above all SwiGLU's input, the largest tensor of a block.
    """
    w, p, norm, order = weights, prepared.products, settings.norm, order_code(settings.order)
    shift1, scale1, gate1, shift2, scale2, gate2 = prepared.modulation.chunk(6, dim=1)
    ops = operations_for(x)
    h, _ = ops.norm(x, shift1, scale1, w.norm1, norm, EPS, x.dtype)
    projected = linear(h, p.in_proj)
    y, _ = ops.mixer(
        projected, p.decay_weight, w.decay_bias, w.head_norm, settings.heads, *settings.grid, order, EPS, False
    )
    del projected
    x, h, _ = ops.residual_norm(x, linear(y, p.o_proj), gate1, shift2, scale2, w.norm2, norm, EPS, x.dtype)
    del y
    hidden = ops.up(h, p.gate_proj, False)[0]
    return add_and_convolve(ops, x, linear(hidden, p.down_proj), gate2, w, settings)
