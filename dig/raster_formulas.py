"""FLOPs of a block's passes where torch.compile takes each as one operation; counted as `dig.ops.formulas` says.

Arguments are shapes where the operations of `dig.raster_compiled` take tensors, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dig import raster_compiled as _raster_compiled  # noqa: F401 - defines the operations
from dig.ops.formulas import BACKWARD, Shape, depthwise_flops, mixer_flops, modulation_flops
from dig.raster_weights import BlockWeights

_PRODUCTS = ("in_proj", "gate_proj", "o_proj", "down_proj")
"""Weights whose gradient is a product of its own, left out for one that is frozen."""


def _forward(x: Shape, w: BlockWeights) -> int:
    """All but the modulation."""
    shapes: Any = w
    products = sum(2 * math.prod(x[:-1]) * math.prod(getattr(shapes, name)) for name in _PRODUCTS)
    mixed = (*x[:-1], shapes.in_proj[0])
    convolved = depthwise_flops(x, None, None, shapes.conv_weight) if shapes.conv_weight else 0
    return products + mixer_flops(mixed, shapes.decay_weight, shapes.decay_bias, shapes.head_norm) + convolved


def _run_block(x: Shape, c: Shape, weights: Sequence[Any], *rest: Any, **named: Any) -> int:
    w: Any = BlockWeights._make(weights)
    return _forward(x, w) + modulation_flops(c, w.adaln_weight)


def _train_block_backward(
    dout: Shape, saved: Sequence[Any], needed: Sequence[bool], condition: bool, *rest: Any, **named: Any
) -> int:
    w: Any = BlockWeights._make(saved[-len(needed) :])
    asked: Any = BlockWeights._make(needed)
    # Of one image, the gates' gradients come of their weights'.
    always = ("o_proj", "down_proj") if dout[0] == 1 else ()
    frozen = [getattr(w, name) for name in _PRODUCTS if name not in always and not getattr(asked, name)]
    saves = sum(2 * math.prod(dout[:-1]) * math.prod(shape) for shape in frozen)
    modulated = condition or asked.adaln_weight or asked.adaln_bias
    return BACKWARD * (_forward(dout, w) + (modulation_flops(dout, w.adaln_weight) if modulated else 0)) - saves


_FORMULAS: dict[str, Callable[..., int]] = {
    "infer_block": _run_block,
    "train_block": _run_block,
    "train_block_backward": _train_block_backward,
}

for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.dig, _name))(_formula)
