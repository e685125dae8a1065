"""SwiGLU on Triton: one pass forward and one backward, which computes the activation again.

Registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take it. Bound by memory traffic: in
bf16, 6 bytes for each of the M F elements forward (reads gate and up, writes hidden), 10 backward.

Shapes: M rows, F inner width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from dig.ops.derivatives import once
from dig.ops.launch import empty, last_contiguous, launching
from dig.ops.library import operation
from dig.ops.swiglu.kernels import swiglu_backward_kernel, swiglu_kernel
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import SwigluTiles
from dig.ops.whole import ceil_div, power_of_two

DTYPES = (torch.float32, torch.bfloat16)


def tiles_for(gate_up: Tensor) -> SwigluTiles:
    """The tile choices for gate_up (..., 2F)."""
    return for_device(gate_up.device).swiglu[gate_up.dtype]


def _shape(tiles: SwigluTiles, F: int) -> tuple[int, int]:
    """Rows and columns of a program: columns that divide F if there are enough such, for then none need a mask."""
    divisor = F & -F
    columns = min(tiles.columns, divisor if divisor >= 64 else power_of_two(F))
    return max(1, tiles.elements // columns), columns


def _empty_hidden(gate_up: Tensor) -> Tensor:
    *leading, double = gate_up.shape
    return torch.empty(*leading, double // 2, dtype=gate_up.dtype, device=gate_up.device)


@operation("dig::swiglu")
def swiglu_forward(gate_up: Tensor) -> Tensor:
    """Hidden (..., F) from gate_up (..., 2F)."""
    F = gate_up.shape[-1] // 2
    rows = gate_up.view(-1, 2 * F)
    hidden = _empty_hidden(gate_up)
    tiles = tiles_for(gate_up)
    R, C = _shape(tiles, F)
    with launching(gate_up.device) as launch:
        launch(
            swiglu_kernel, (ceil_div(rows.shape[0], R), ceil_div(F, C)),
            (rows, hidden), (rows.stride(0), rows.shape[0]),
            F=F, ROWS=R, COLS=C, num_warps=tiles.warps,
        )  # fmt: skip
    return hidden


@operation("dig::swiglu_backward")
def swiglu_backward(gate_up: Tensor, dhidden: Tensor, rebuild: bool) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and with ``rebuild`` hidden again; without, the second has no elements.

    Hidden is what the gradient of the next layer's weight is made of: one write more here, and it need not be kept.
    """
    F = gate_up.shape[-1] // 2
    rows = gate_up.view(-1, 2 * F)
    # Copied only if its rows aren't at one distance or not contiguous.
    gradient = last_contiguous(dhidden.reshape(-1, F))
    dgate_up, hidden = _empty_gradients(gate_up, dhidden, rebuild)
    tiles = tiles_for(gate_up)
    R, C = _shape(tiles, F)
    with launching(gate_up.device) as launch:
        launch(
            swiglu_backward_kernel, (ceil_div(rows.shape[0], R), ceil_div(F, C)),
            (rows, gradient, dgate_up, hidden), (rows.stride(0), gradient.stride(0), rows.shape[0]),
            F=F, ROWS=R, COLS=C, HIDDEN=rebuild, num_warps=tiles.warps,
        )  # fmt: skip
    return dgate_up, hidden


def _empty_gradients(gate_up: Tensor, dhidden: Tensor, rebuild: bool) -> tuple[Tensor, Tensor]:
    """Room for what `swiglu_backward` returns."""
    none = torch.empty(0, dtype=gate_up.dtype, device=gate_up.device)
    return empty(gate_up), _empty_hidden(gate_up) if rebuild else none


swiglu_forward.register_fake(_empty_hidden)
swiglu_backward.register_fake(_empty_gradients)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dhidden: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    return swiglu_backward(gate_up, dhidden, False)[0]


swiglu_forward.register_autograd(once(_autograd), setup_context=_save)


def fused_swiglu(gate_up: Tensor) -> Tensor:
    """`dig.ops.swiglu.swiglu` on Triton, its shape checked already.

    Raises:
        ValueError: A dtype, device or stride that the kernels do not take; the message names the argument.
    """
    _check(gate_up)
    hidden: Tensor = swiglu_forward(gate_up)
    return hidden


def _check(gate_up: Tensor) -> None:
    if not gate_up.is_cuda and isinstance(swiglu_kernel, triton.runtime.JITFunction):
        raise ValueError(
            f"gate_up must be on a CUDA device (or TRITON_INTERPRET=1 set before the import); it is on {gate_up.device}"
        )
    if gate_up.dtype not in DTYPES:
        raise ValueError(f"gate_up must be {' or '.join(map(str, DTYPES))}; got {gate_up.dtype}")
    if gate_up.stride(-1) != 1:
        raise ValueError(f"gate_up must be contiguous in its last dimension; its strides are {gate_up.stride()}")
    if not _rows_at_one_distance(gate_up):
        raise ValueError(
            f"gate_up must have its rows at one distance from each other; its shape is {tuple(gate_up.shape)}, "
            f"its strides are {gate_up.stride()}"
        )


def _rows_at_one_distance(gate_up: Tensor) -> bool:
    """Whether ``gate_up.view(-1, 2F)`` works, without a try that torch.compile would have to trace."""
    outer = [(size, stride) for size, stride in zip(gate_up.shape[:-1], gate_up.stride()[:-1], strict=True) if size > 1]
    return all(far == size * near for (_, far), (size, near) in pairwise(outer))
