"""SwiGLU on Triton: one pass forward and one backward, which computes the activation again.

Registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take it. Bound by memory traffic: in
bf16, 6 bytes for each of the M F elements forward (reads gate and up, writes hidden), 10 backward.

Shapes: M rows, F inner width.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dig.ops.arithmetic import INTERPRETED
from dig.ops.derivatives import once
from dig.ops.launch import Launch, empty, last_contiguous, launch_context, or_none
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
    hidden = _empty_hidden(gate_up)
    kernel = forward_launch(tiles_for(gate_up), gate_up.shape, _distance(gate_up))
    launch_context(gate_up.device).start(kernel, gate_up, hidden)
    return hidden


def _distance(gate_up: Tensor) -> int:
    """From row to row, whatever is before the last dimension."""
    columns = gate_up.shape[-1]
    return columns if gate_up.is_contiguous() else gate_up.view(-1, columns).stride(0)


@functools.lru_cache(maxsize=1024)
def forward_launch(tiles: SwigluTiles, shape: torch.Size, distance: int) -> Launch:
    """`swiglu_kernel`'s: on gate_up of this shape, from row to row at this distance, and hidden."""
    F, rows = shape[-1] // 2, shape[:-1].numel()
    R, C = _shape(tiles, F)
    return Launch(
        swiglu_kernel, (ceil_div(rows, R), ceil_div(F, C)), (distance, rows), F=F, ROWS=R, COLS=C, num_warps=tiles.warps
    )


@functools.lru_cache(maxsize=1024)
def backward_launch(
    tiles: SwigluTiles, shape: torch.Size, distance: int, gradient_distance: int, rebuild: bool
) -> Launch:
    """`swiglu_backward_kernel`'s: on gate_up, hidden's gradient, gate_up's, and hidden if it is rebuilt."""
    F, rows = shape[-1] // 2, shape[:-1].numel()
    R, C = _shape(tiles, F)
    return Launch(
        swiglu_backward_kernel, (ceil_div(rows, R), ceil_div(F, C)), (distance, gradient_distance, rows),
        F=F, ROWS=R, COLS=C, HIDDEN=rebuild, num_warps=tiles.warps,
    )  # fmt: skip


def swiglu_gradients(gate_up: Tensor, dhidden: Tensor, rebuild: bool) -> tuple[Tensor, Tensor | None]:
    """`swiglu_backward`, with None for what is not asked for."""
    F = gate_up.shape[-1] // 2
    # Copied only if its rows aren't at one distance or not contiguous.
    gradient = dhidden if dhidden.is_contiguous() else last_contiguous(dhidden.reshape(-1, F))
    dgate_up, hidden = empty(gate_up), _empty_hidden(gate_up) if rebuild else None
    between = F if gradient is dhidden else gradient.stride(0)
    kernel = backward_launch(tiles_for(gate_up), gate_up.shape, _distance(gate_up), between, rebuild)
    launch_context(gate_up.device).start(kernel, gate_up, gradient, dgate_up, dgate_up if hidden is None else hidden)
    return dgate_up, hidden


@operation("dig::swiglu_backward")
def swiglu_backward(gate_up: Tensor, dhidden: Tensor, rebuild: bool) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and with ``rebuild`` hidden again; without, the second has no elements.

    Hidden is what the gradient of the next layer's weight is made of: one write more here, and it need not be kept.
    """
    dgate_up, hidden = swiglu_gradients(gate_up, dhidden, rebuild)
    return dgate_up, or_none(hidden, gate_up)


def _empty_gradients(gate_up: Tensor, dhidden: Tensor, rebuild: bool) -> tuple[Tensor, Tensor]:
    """Room for what `swiglu_backward` returns."""
    return empty(gate_up), or_none(_empty_hidden(gate_up) if rebuild else None, gate_up)


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
    if not gate_up.is_cuda and not INTERPRETED:
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
