"""SREM on Triton: one kernel forwards, two backwards.

Registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take it.

Shapes: B batch, T tokens in raster order, D channels.

Kept for the backward pass are the inputs alone: the gated sum is computed again. Going back, one kernel reads dy, x and
branch once and writes dx, dbranch and every patch's sums for the gradients of weight, bias and gate; the other adds
these up. No atomics: two runs agree in every bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dig.ops.arithmetic import INTERPRETED
from dig.ops.derivatives import once
from dig.ops.launch import Launch, empty, launch_context, or_none
from dig.ops.library import operation
from dig.ops.side_stream import on_side_stream
from dig.ops.srem import check_shapes
from dig.ops.srem.kernels import TOKEN_SUMS, srem_backward_kernel, srem_forward_kernel, srem_sum_kernel
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import SremPass, SremTiles
from dig.ops.whole import ceil_div
from dig.scan import ScanOrder

DTYPES = (torch.float32, torch.bfloat16)


def tiles_for(which: SremPass, x: Tensor) -> SremTiles:
    """The tile choices of one pass over tokens like x."""
    return for_device(x.device).srem[which, x.dtype]


@dataclass(frozen=True, kw_only=True)
class SremPlan:
    """The launches of a pass, ``sums`` of the backward one alone."""

    walk: Launch
    sums: Launch | None
    sums_shape: tuple[int, int, int, int]
    """Of what is between both, (B, patches · groups, slots, D)."""


def _plan(
    which: SremPass,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    grid: tuple[int, int],
    order: ScanOrder,
    sum_only: bool = False,
) -> SremPlan:
    bf16 = x.dtype == torch.bfloat16 and (branch is None or branch.dtype == torch.bfloat16)
    between = None if branch is None else branch.stride()
    gates = None if gate is None else gate.stride(0)
    return plan_of(which, tiles_for(which, x), x.shape, x.stride(), between, gates, bf16, grid, order, sum_only)


@functools.lru_cache(maxsize=1024)
def plan_of(
    which: SremPass,
    tiles: SremTiles,
    shape: torch.Size,
    x_strides: tuple[int, int, int],
    branch_strides: tuple[int, int, int] | None,
    gate_stride: int | None,
    bf16: bool,
    grid: tuple[int, int],
    order: ScanOrder,
    sum_only: bool,
) -> SremPlan:
    """`_plan`, from strides; branch's and gate's are None where there is none."""
    B, _, D = shape
    across = ceil_div(grid[1], tiles.groups * tiles.width)
    beside = B * across * ceil_div(D, tiles.channels)
    fitting = max(1, tiles.programs // beside)
    patch_rows = min(tiles.rows, max(tiles.least_rows, ceil_div(grid[0], fitting)))
    down = ceil_div(grid[0], patch_rows)
    patch_rows, patches = ceil_div(grid[0], down), across * down
    taps = _taps(order)
    backward = which == "backward"
    extra: dict[str, Any] = {"SUM_ONLY": sum_only} if backward else {}
    walk = Launch(
        srem_backward_kernel if backward else srem_forward_kernel,
        # Channels vary fastest, then columns: programs that run together share rows of tokens in the L2 cache.
        (ceil_div(D, tiles.channels), patches, B),
        (x_strides[0], branch_strides[0] if branch_strides else 0, gate_stride or 0, *grid, patch_rows, *taps),
        early=True, D=D, X_T=x_strides[1], BRANCH_T=branch_strides[1] if branch_strides else D,
        GATED=branch_strides is not None, PACKED=bf16 and not INTERPRETED,
        W=tiles.width, G=tiles.groups, BD=tiles.channels, **extra, num_warps=tiles.warps, maxnreg=tiles.registers,
    )  # fmt: skip
    gated = gate_stride is not None and not sum_only
    slots, parts = int(TOKEN_SUMS.value), patches * tiles.groups
    sums = Launch(
        srem_sum_kernel, (ceil_div(D, tiles.sum_channels), slots + gated * B), (parts, B * parts, *taps),
        D=D, GATED=gated, STEPS=tiles.sum_steps, BD=tiles.sum_channels, num_warps=tiles.sum_warps,
    )  # fmt: skip
    return SremPlan(walk=walk, sums=sums if backward else None, sums_shape=(B, parts, slots + gated, D))


def _taps(order: ScanOrder) -> tuple[int, int, int]:
    """Where the first tap of the turned kernel lies in a channel's nine, and the steps to the next row and column."""
    row, column = (1, 3) if order.transposed else (3, 1)
    return (8, -row, -column) if order.reversed else (0, row, column)


@operation("dig::srem")
def srem_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
) -> Tensor:
    """`fused_srem` as torch sees it."""
    plan = _plan("forward", x, branch, gate, (rows, columns), ScanOrder(transposed, reversed))
    y = empty(x)
    b_branch, b_gate = x if branch is None else branch, x if gate is None else gate
    launch_context(x.device).start(plan.walk, x, b_branch, b_gate, weight, bias, y)
    return y


def srem_gradients(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
    sum_only: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """`srem_backward`, with None for what is not there."""
    plan = _plan("backward", x, branch, gate, (rows, columns), ScanOrder(transposed, reversed), sum_only)
    dy = dy.contiguous()
    dx, dweight, dbias = empty(x), empty(weight), empty(bias)
    asked = not (branch is None or gate is None or sum_only)
    dbranch, dgate = (empty(branch), empty(gate)) if asked else (None, None)  # type: ignore[arg-type]
    sums = torch.empty(*plan.sums_shape, dtype=torch.float32, device=x.device)
    assert plan.sums is not None
    launch = launch_context(x.device)
    launch.start(
        plan.walk, x, x if branch is None else branch, x if gate is None else gate, weight, dy, dx,
        dx if dbranch is None else dbranch, sums,
    )  # fmt: skip
    with on_side_stream(sums, dweight, dbias, dgate):
        launch.start(plan.sums, sums, dweight, dbias, dx if dgate is None else dgate)
    return dx, dbranch, dgate, dweight, dbias


@operation("dig::srem_backward")
def srem_backward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
    sum_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, weight and bias; those of branch and gate have no elements where there are none.

    With ``sum_only`` the first is the gradient of ``x + gate branch``, from which the caller gets the next two.
    """
    dx, dbranch, dgate, dweight, dbias = srem_gradients(
        x, branch, gate, weight, bias, dy, rows, columns, transposed, reversed, sum_only
    )
    return dx, or_none(dbranch, x), or_none(dgate, x), dweight, dbias


@srem_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
) -> Tensor:
    return empty(x)


@srem_backward.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
    reversed: bool,
    sum_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbranch, dgate = (or_none(None if sum_only or t is None else empty(t), x) for t in (branch, gate))
    return empty(x), dbranch, dgate, empty(weight), empty(bias)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # Unpacked once: checkpointing computes them anew for that, and only once.
    x, branch, gate, weight, bias = ctx.saved_tensors
    rows, columns, transposed, reversed = ctx.numbers
    dx, dbranch, dgate, dweight, dbias = srem_backward(
        x, branch, gate, weight, bias, dy, rows, columns, transposed, reversed, False
    )
    if branch is None:
        return dx, None, None, dweight, dbias, None, None, None, None
    return dx, dbranch, dgate, dweight, dbias, None, None, None, None


srem_forward.register_autograd(once(_autograd), setup_context=_save_inputs)


def fused_srem(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    grid: tuple[int, int],
    order: ScanOrder,
) -> Tensor:
    """`dig.ops.srem.srem` on Triton, in fp32 arithmetic.

    Args:
        x: Tokens (B, T, D) in raster order, fp32 or bf16. Any strides but the last, which must be 1; the same holds for
            branch and gate. Each argument may be fp32 or bf16 by itself.
        branch: (B, T, D), or None.
        gate: (B, D), or None with ``branch=None``: a slice of a wider tensor is read where it is.
        weight: (D, 1, 3, 3), contiguous.
        bias: (D,), contiguous.
        grid: (rows, columns) of the image, with T = rows·columns.
        order: The block's scan order.

    Returns:
        (B, T, D), contiguous, in x's dtype. The sum ``x + gate * branch`` is rounded to x's dtype once, before the
        convolution; y is rounded at the end. Gradients have their argument's dtype.

    Raises:
        ValueError: A shape, dtype, device or stride that the kernels do not take; the message names the argument.
    """
    check_shapes(x, branch, gate, weight, bias, grid)
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(
            f"x must be on a CUDA device (or TRITON_INTERPRET=1 set before the import); it is on {x.device}"
        )
    for name, tensor in (("x", x), ("branch", branch), ("gate", gate), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be {' or '.join(map(str, DTYPES))}; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension; its strides are {tensor.stride()}")
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous; its strides are {weight.stride()}")
    output: Tensor = srem_forward(x, branch, gate, weight, bias, *grid, order.transposed, order.reversed)
    return output
