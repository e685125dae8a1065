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
import triton
from torch import Tensor

from dig.ops.derivatives import once
from dig.ops.launch import empty, launching
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
class _Plan:
    """Everything about a pass that its launches share."""

    B: int
    D: int
    tiles: SremTiles
    patch_rows: int
    patches: int
    """Of one batch entry."""
    sizes: tuple[int, int, int]
    """Rows and columns of the grid, and rows of a patch."""
    taps: tuple[int, int, int]
    """Where the first tap of the turned kernel lies in a channel's nine, and the steps to the next row and column."""
    constants: dict[str, Any]

    @property
    def launch(self) -> tuple[int, int, int]:
        # Channels vary fastest, then columns: programs that run together share rows of tokens in the L2 cache.
        return ceil_div(self.D, self.tiles.channels), self.patches, self.B

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.tiles.warps, "maxnreg": self.tiles.registers}


def _plan(
    which: SremPass,
    x: Tensor,
    branch: Tensor | None,
    grid: tuple[int, int],
    order: ScanOrder,
) -> _Plan:
    bf16 = all(tensor.dtype == torch.bfloat16 for tensor in (x, branch) if tensor is not None)
    B, _, D = x.shape
    between = None if branch is None else branch.stride(1)
    return _plan_of(tiles_for(which, x), B, D, x.stride(1), between, bf16, grid, order)


@functools.lru_cache(maxsize=1024)
def _plan_of(
    tiles: SremTiles,
    B: int,
    D: int,
    x_tokens: int,
    branch_tokens: int | None,
    bf16: bool,
    grid: tuple[int, int],
    order: ScanOrder,
) -> _Plan:
    """`_plan`, from the distances between tokens; branch's is None where there is none."""
    across = ceil_div(grid[1], tiles.groups * tiles.width)
    beside = B * across * ceil_div(D, tiles.channels)
    fitting = max(1, tiles.programs // beside)
    patch_rows = min(tiles.rows, max(tiles.least_rows, ceil_div(grid[0], fitting)))
    down = ceil_div(grid[0], patch_rows)
    patch_rows = ceil_div(grid[0], down)
    constants = {
        "D": D,
        "X_T": x_tokens,
        "BRANCH_T": D if branch_tokens is None else branch_tokens,
        "GATED": branch_tokens is not None,
        "PACKED": bf16 and isinstance(srem_forward_kernel, triton.runtime.JITFunction),
        "W": tiles.width,
        "G": tiles.groups,
        "BD": tiles.channels,
    }
    return _Plan(
        B=B,
        D=D,
        tiles=tiles,
        patch_rows=patch_rows,
        patches=across * down,
        sizes=(*grid, patch_rows),
        taps=_taps(order),
        constants=constants,
    )


def _taps(order: ScanOrder) -> tuple[int, int, int]:
    """See `_Plan.taps`."""
    row, column = (1, 3) if order.transposed else (3, 1)
    return (8, -row, -column) if order.reversed else (0, row, column)


def _branch_gradients(x: Tensor, branch: Tensor | None, gate: Tensor | None, sum_only: bool) -> tuple[Tensor, Tensor]:
    """Room for the gradients of branch and gate, of no elements where there is none."""
    if branch is None or gate is None or sum_only:
        none = torch.empty(0, dtype=x.dtype, device=x.device)
        return none, torch.empty_like(none)
    return empty(branch), empty(gate)


def _first_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


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
    plan = _plan("forward", x, branch, (rows, columns), ScanOrder(transposed, reversed))
    y = empty(x)
    with launching(x.device) as launch:
        launch.early(
            srem_forward_kernel, plan.launch,
            (x, x if branch is None else branch, x if gate is None else gate, weight, bias, y),
            (x.stride(0), _first_stride(branch), _first_stride(gate), *plan.sizes, *plan.taps),
            **plan.constants, **plan.options,
        )  # fmt: skip
    return y


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
    plan = _plan("backward", x, branch, (rows, columns), ScanOrder(transposed, reversed))
    tiles = plan.tiles
    dy = dy.contiguous()
    dx, dweight, dbias = empty(x), empty(weight), empty(bias)
    dbranch, dgate = _branch_gradients(x, branch, gate, sum_only)
    gated = gate is not None and not sum_only
    slots = int(TOKEN_SUMS.value) + gated
    sums = torch.empty(plan.B, plan.patches, slots, plan.D, dtype=torch.float32, device=x.device)
    with launching(x.device) as launch:
        launch.early(
            srem_backward_kernel, plan.launch,
            (x, x if branch is None else branch, x if gate is None else gate, weight, dy, dx, dbranch, sums),
            (x.stride(0), _first_stride(branch), _first_stride(gate), *plan.sizes, *plan.taps),
            **plan.constants, SUM_ONLY=sum_only, **plan.options,
        )  # fmt: skip
        with on_side_stream(sums, dweight, dbias, dgate):
            launch(
                srem_sum_kernel, (ceil_div(plan.D, tiles.sum_channels), slots - gated + gated * plan.B),
                (sums, dweight, dbias, dgate), (plan.patches, plan.B * plan.patches, *plan.taps),
                D=plan.D, GATED=gated, STEPS=tiles.sum_steps, BD=tiles.sum_channels, num_warps=tiles.sum_warps,
            )  # fmt: skip
    return dx, dbranch, dgate, dweight, dbias


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
    return empty(x), *_branch_gradients(x, branch, gate, sum_only), empty(weight), empty(bias)


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
    if not x.is_cuda and isinstance(srem_forward_kernel, triton.runtime.JITFunction):
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
