"""The operations of `bench.ops.rows` as a model calls them: inputs of a model's sizes, and the call.

Shapes: B batch, T tokens, D width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.ops import gla, rowwise, srem
from bench.ops.common import DTYPES, MODES, Step, make_step, set_count
from bench.ops.rows import OpCase
from dig.config import SIZES, heads_of

LABELS = 1001
"""Rows of the table of labels: ImageNet's, and one for none."""
SINUSOIDS = 256
"""Of a timestep."""


def steps_of(case: OpCase) -> list[Step]:
    """Calls of an operation, each on inputs of its own: on a GPU as many as its L2 cache does not hold."""
    make = MAKERS[case.op]
    if case.device == "cpu":
        return [make(case)]
    before = torch.cuda.memory_allocated()
    first = make(case)
    size = max(1, torch.cuda.memory_allocated() - before)
    return [first, *(make(case) for _ in range(set_count(size, most=32) - 1))]


def _sizes(case: OpCase) -> tuple[int, int, int]:
    """D, F and T."""
    width = SIZES[case.size][1]
    return width, _rowwise_shape(case).F, case.side**2


def _mode(case: OpCase) -> str:
    return MODES[case.mode == "train"]


def _random(case: OpCase, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=case.device, dtype=dtype or DTYPES[case.dtype])


def _gla(case: OpCase) -> Step:
    heads = heads_of(case.size, "release")
    value = SIZES[case.size][1] // heads
    shape = gla.Shape(B=case.batch, T=case.side**2, H=heads, K=value // 2, V=value, dtype=case.dtype)
    if case.implementation == "triton":
        return gla.mixer_step(shape, _mode(case), case.device)
    from dig.ops.gla import gated_linear_attention

    leaves, gradient = gla.make_inputs(shape, "recurrence", case.device)
    function = partial(gated_linear_attention, implementation=case.implementation)
    return make_step(function, _mode(case), leaves, [gradient])


def _srem(case: OpCase) -> Step:
    shape = srem.Shape(B=case.batch, rows=case.side, columns=case.side, D=SIZES[case.size][1], dtype=case.dtype)
    leaves, gradient = srem.make_inputs(shape, case.device)
    return make_step(srem.operation(case.implementation, shape.grid), _mode(case), leaves, [gradient])


def _rowwise_shape(case: OpCase) -> rowwise.Shape:
    width = SIZES[case.size][1]
    return rowwise.Shape(
        B=case.batch, T=case.side**2, D=width, norm="layer", stream=case.dtype, dtype=case.dtype
    )  # fmt: skip


def _rowwise(operation: str, case: OpCase) -> Step:
    shape = _rowwise_shape(case)
    leaves, gradients = rowwise.make_inputs(shape, operation, case.device)
    return make_step(rowwise.function_of(operation, case.implementation, shape), _mode(case), leaves, gradients)


def _products(case: OpCase) -> Step:
    from dig.ops.swiglu.products import project_down_backward, project_up

    D, F, T = _sizes(case)
    x, up = _random(case, case.batch, T, D), _random(case, 2 * F, D) / D**0.5
    if case.mode == "forward":
        return partial(project_up, x, up, False)
    down, gate_up, dout = _random(case, D, F) / D**0.5, _random(case, case.batch, T, 2 * F), torch.randn_like(x)

    def both() -> list[Tensor]:
        return [*project_up(x, up, True), *project_down_backward(dout, down, gate_up)]

    return both


def _condition(case: OpCase) -> Step:
    from dig.ops.condition import condition

    D, _, _ = _sizes(case)
    draw = partial(_random, case, dtype=torch.float32)
    t, y = (torch.arange(case.batch, device=case.device) for _ in range(2))
    first, second = draw(D, SINUSOIDS) / SINUSOIDS**0.5, draw(D, D) / D**0.5
    return partial(condition, t, y, first, draw(D), second, draw(D), draw(LABELS, D))


def _weights(case: OpCase) -> Step:
    from dig.ops.gla.projection import GATE_RANK, projection_splits
    from dig.ops.weights import gated_weight_gradient, prepare_weights

    D, F, _ = _sizes(case)
    draw = partial(_random, case, dtype=torch.float32)
    # In the order of `dig.raster_weights.Products`.
    shapes = [(sum(projection_splits(D)), D), (D // 2, GATE_RANK), (2 * F, D), (D, D), (D, F)]
    weights, gates = [draw(*shape) for shape in shapes], [draw(D), draw(D)]
    forward = partial(prepare_weights, weights, gates, DTYPES[case.dtype])
    if case.mode == "forward":
        return forward
    products = [torch.randn_like(weight) for weight in weights[-2:]]

    def both() -> list[Tensor]:
        gradients = zip(products, weights[-2:], gates, strict=True)
        return [*forward(), *(part for three in gradients for part in gated_weight_gradient(*three))]

    return both


def _modulation(case: OpCase) -> Step:
    from dig.ops.modulation import modulation, modulation_backward
    from dig.ops.weights import matrix_vector

    width, _, _ = _sizes(case)
    draw = partial(_random, case, dtype=torch.float32)
    # The condition is in fp32, for the labels' table is.
    c, weight, bias = draw(case.batch, width), draw(6 * width, width) / width**0.5, draw(6 * width)
    dout = torch.randn_like(bias.expand(case.batch, -1))
    if case.implementation == "reference":
        leaves = [leaf.requires_grad_() for leaf in (c, weight, bias)]
        return make_step(linear, _mode(case), leaves, [dout])

    def forward() -> list[Tensor]:
        # As `dig.raster_weights.modulation_of` chooses.
        return [matrix_vector(weight, c[0], bias) if case.batch == 1 else modulation(c, weight, bias)]

    if case.mode == "forward":
        return forward
    return lambda: [*forward(), *modulation_backward(dout, c, weight)]


MAKERS: dict[str, Callable[[OpCase], Step]] = {
    "gla": _gla,
    "srem": _srem,
    "adaln": partial(_rowwise, "residual_norm_modulate"),
    "swiglu": partial(_rowwise, "swiglu"),
    "products": _products,
    "condition": _condition,
    "weights": _weights,
    "modulation": _modulation,
}


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors that a call gave."""
    return [result] if isinstance(result, Tensor) else [tensor for tensor in result if tensor is not None]
