"""FLOPs of this project's operations, for `torch.utils.flop_counter.FlopCounterMode`, to which they are opaque.

As PyTorch's own formulas do, these count matrix products, convolutions and recurrences, two FLOPs a multiply-add, and
leave out norms, activations and other element-wise work; what a kernel computes again counts once. A whole block's are
in `dig.raster_formulas`. Imported with the operations (`dig.raster`).

Arguments are shapes where the operations take tensors, in their order; B batch, T tokens, D width, H heads, K and V key
and value width of a head, R rank of the decay gate, F inner width of SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Each of these defines the operations that are named below.
from dig.ops import condition as _condition  # noqa: F401
from dig.ops import modulation as _modulation_ops  # noqa: F401
from dig.ops import weights as _weights  # noqa: F401
from dig.ops.adaln import fused as _adaln  # noqa: F401
from dig.ops.gla import mixer as _mixer  # noqa: F401
from dig.ops.gla import tiled as _tiled  # noqa: F401
from dig.ops.srem import fused as _srem  # noqa: F401
from dig.ops.swiglu import fused as _swiglu  # noqa: F401
from dig.ops.swiglu import products as _products  # noqa: F401

Shape = Sequence[int]
BACKWARD = 2
"""Times the forward pass: a gradient of each of a product's two factors."""


def recurrence_flops(q: Shape, v: Shape) -> int:
    """Of gated linear attention, q (…, K) and v (…, V): every token's k^T v goes into the state, and its q reads it."""
    return 2 * 2 * math.prod(q) * v[-1]


def mixer_flops(
    projected: Shape, decay_weight: Shape, decay_bias: Shape, norm_weight: Shape, *rest: Any, **named: Any
) -> int:
    """Of the decay gate's second factor and the recurrence; projected (…, 3D + R)."""
    tokens, (inner, rank) = math.prod(projected[:-1]), decay_weight
    return 2 * tokens * rank * inner + recurrence_flops((tokens, inner), norm_weight)


def _gla(q: Shape, k: Shape, v: Shape, *rest: Any, **named: Any) -> int:
    return recurrence_flops(q, v)


def _product(x: Shape, weight: Shape, *rest: Any, **named: Any) -> int:
    """x (…, D) times weight (N, D) transposed."""
    return 2 * math.prod(x) * weight[0]


def _product_backward(dy: Shape, weight: Shape, *rest: Any, **named: Any) -> int:
    """dy (…, N) times weight (N, D)."""
    return 2 * math.prod(dy) * weight[1]


def _matrix_vectors(weights: Sequence[Shape], *rest: Any, **named: Any) -> int:
    return sum(2 * math.prod(weight) for weight in weights)


def modulation_flops(c: Shape, weight: Shape, *rest: Any, **named: Any) -> int:
    """Of c (B, D) and weight (N, D)."""
    return 2 * c[0] * math.prod(weight)


def _modulation_backward(dout: Shape, c: Shape, weight: Shape, *rest: Any, **named: Any) -> int:
    return BACKWARD * modulation_flops(c, weight)


def _condition_flops(
    t: Shape, y: Shape, first: Shape, first_bias: Shape, second: Shape, *rest: Any, **named: Any
) -> int:
    return 2 * t[0] * (math.prod(first) + math.prod(second))


def depthwise_flops(x: Shape, branch: Shape | None, gate: Shape | None, weight: Shape, *rest: Any, **named: Any) -> int:
    """Of x (B, T, D) and one kernel a channel, (D, 1, 3, 3)."""
    return 2 * math.prod(x) * math.prod(weight[2:])


def _nothing(*arguments: Any, **named: Any) -> int:
    """Of what is element-wise, or copies."""
    return 0


def _twice(forward: Callable[..., int]) -> Callable[..., int]:
    def backward(*arguments: Any, **named: Any) -> int:
        return BACKWARD * forward(*arguments, **named)

    return backward


FORMULAS: dict[str, Callable[..., int]] = {
    "gla": _gla,
    "gla_backward": _twice(_gla),
    "gla_block": _gla,
    "gla_block_backward": _twice(_gla),
    "gla_mixer": mixer_flops,
    "gla_mixer_sums": _nothing,
    "gla_mixer_backward": _twice(mixer_flops),
    "project_up": _product,
    "project_up_preparing": _product,
    "project_down_backward": _product_backward,
    "matrix_vectors": _matrix_vectors,
    "condition": _condition_flops,
    "modulation": modulation_flops,
    "modulation_backward": _modulation_backward,
    "srem": depthwise_flops,
    "srem_backward": _twice(depthwise_flops),
    "norm_modulate": _nothing,
    "residual_norm_modulate": _nothing,
    "norm_modulate_backward": _nothing,
    "swiglu": _nothing,
    "swiglu_backward": _nothing,
    "prepare_weights": _nothing,
    "gated_weight_gradient": _nothing,
}
"""By name in ``torch.ops.dig``; an operation without a formula is none that can be counted, and a test says so."""


def _added_product(x: Shape, first: Shape, second: Shape, *rest: Any, **named: Any) -> int:
    """x (M, N) plus first (M, K) times second (K, N)."""
    return 2 * math.prod(first) * second[1]


for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.dig, _name))(_formula)
if torch.ops.aten.addmm_ not in flop_registry:
    # In place, as sums are written over the tokens without gradients; PyTorch counts only the product that is not.
    register_flop_formula(torch.ops.aten.addmm_)(_added_product)
