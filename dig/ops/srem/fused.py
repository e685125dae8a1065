"""SREM on Triton: one kernel forwards, two backwards.

Registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take it.

Shapes: B batch, T tokens in raster order, D channels.

Kept for the backward pass are the inputs alone: the gated sum is computed again. Going back, one kernel reads dy, x and
branch once and writes dx, dbranch and every patch's sums for the gradients of weight, bias and gate; the other adds
these up. No atomics: two runs agree in every bit.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from dig.ops.aside import aside
from dig.ops.chain import chained
from dig.ops.launch import empty, on_device
from dig.ops.srem import check_shapes
from dig.ops.srem.kernels import TOKEN_SUMS, srem_backward_kernel, srem_forward_kernel, srem_sum_kernel
from dig.scan import ScanOrder

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What a program works on.

    Attributes:
        channels: Channels of a program, a power of two.
        groups: Groups of columns side by side, a power of two.
        width: Columns of a group, computed by the same thread: a token is loaded (width + 2) / width times.
        rows: Rows that a program walks at most.
        least_rows: Rows that it walks at least, where the grid has them: a patch also reads those next to it.
        programs: Patches are as short as leaves at most this many programs: an H100's 132 multiprocessors times the
            programs that each holds at once, so that none begins when the others end.
        warps: Warps of a program. A thread holds channels · groups / (32 · warps) channels, which must be 2 or more:
            bf16 is computed in pairs.
        registers: Most registers of a thread; None leaves it to the compiler.
    """

    channels: int = 64
    groups: int = 4
    width: int = 4
    rows: int = 32
    least_rows: int = 4
    programs: int = 600
    warps: int = 4
    registers: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1; got {value}")
        for name in ("channels", "groups"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two; got {value}")
        if 64 * self.warps > self.channels * self.groups:
            raise ValueError(f"warps must be at most channels · groups / 64; got {self.warps}")


Pass = Literal["forward", "backward"]
TILES: dict[tuple[Pass, torch.dtype], Tiles] = {
    ("forward", torch.bfloat16): Tiles(),
    ("forward", torch.float32): Tiles(),
    ("backward", torch.bfloat16): Tiles(registers=128, programs=4 * 132),
    ("backward", torch.float32): Tiles(registers=168, programs=3 * 132),
}
"""On NVIDIA GPUs, by x's dtype. A table, not autotuning: the first call costs no search, and a run repeats exactly.

From the compiler's counts for sm_90 in bf16. Two channels a thread keep its 9 weights, and going back also their 9
gradients, in few enough registers for 16 warps a multiprocessor and more (72 registers forwards; 128 backwards, without
a spill), where four channels take 210 backwards. Four columns a thread cost 20 instructions an element forwards and 41
backwards; two columns 30 and 46. ``python -m bench ops srem --sweep`` times alternatives."""
INTERPRETER_TILES = Tiles(channels=512, groups=8, width=2, programs=1)
"""Fewer and larger programs: the interpreter takes the same time for each, whatever its width."""
SUM_STEPS, SUM_CHANNELS = 64, 32
"""Patches and channels that a program of the second backward kernel adds up at once."""


def tiles_for(which: Pass, x: Tensor) -> Tiles:
    """The tile choices of one pass over tokens like x."""
    return INTERPRETER_TILES if x.device.type == "cpu" else TILES[which, x.dtype]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything about a pass that its launches share."""

    B: int
    D: int
    tiles: Tiles
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
        return triton.cdiv(self.D, self.tiles.channels), self.patches, self.B

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.tiles.warps, "maxnreg": self.tiles.registers}


def _plan(
    which: Pass,
    x: Tensor,
    branch: Tensor | None,
    grid: tuple[int, int],
    order: ScanOrder,
) -> _Plan:
    B, _, D = x.shape
    tiles = tiles_for(which, x)
    across = triton.cdiv(grid[1], tiles.groups * tiles.width)
    beside = B * across * triton.cdiv(D, tiles.channels)
    fitting = max(1, tiles.programs // beside)
    patch_rows = min(tiles.rows, max(tiles.least_rows, triton.cdiv(grid[0], fitting)))
    down = triton.cdiv(grid[0], patch_rows)
    patch_rows = triton.cdiv(grid[0], down)
    bf16 = all(tensor.dtype == torch.bfloat16 for tensor in (x, branch) if tensor is not None)
    constants = {
        "D": D,
        "X_T": x.stride(1),
        "BRANCH_T": D if branch is None else branch.stride(1),
        "GATED": branch is not None,
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


@torch.library.custom_op("dig::srem", mutates_args=())
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
    with on_device(x.device):
        srem_forward_kernel[plan.launch](
            x, x if branch is None else branch, x if gate is None else gate, weight, bias, y,
            x.stride(0), _first_stride(branch), _first_stride(gate), *plan.sizes, *plan.taps,
            **plan.constants, **plan.options, **chained(x.device),
        )  # fmt: skip
    return y


@torch.library.custom_op("dig::srem_backward", mutates_args=())
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
    dy = dy.contiguous()
    dx, dweight, dbias = empty(x), empty(weight), empty(bias)
    dbranch, dgate = _branch_gradients(x, branch, gate, sum_only)
    gated = gate is not None and not sum_only
    slots = int(TOKEN_SUMS.value) + gated
    sums = torch.empty(plan.B, plan.patches, slots, plan.D, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        srem_backward_kernel[plan.launch](
            x, x if branch is None else branch, x if gate is None else gate, weight, dy, dx, dbranch, sums,
            x.stride(0), _first_stride(branch), _first_stride(gate), *plan.sizes, *plan.taps,
            **plan.constants, SUM_ONLY=sum_only, **plan.options, **chained(x.device),
        )  # fmt: skip
        with aside(sums, dweight, dbias, dgate):
            srem_sum_kernel[(triton.cdiv(plan.D, SUM_CHANNELS), slots - gated + gated * plan.B)](
                sums, dweight, dbias, dgate, plan.patches, plan.B * plan.patches, *plan.taps,
                D=plan.D, GATED=gated, STEPS=SUM_STEPS, BD=SUM_CHANNELS, num_warps=4,
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
    x, branch, *others = ctx.saved_tensors  # Asked for once: checkpointing computes them anew, and once.
    dx, dbranch, dgate, dweight, dbias = srem_backward(x, branch, *others, dy, *ctx.numbers, False)
    if branch is None:
        return dx, None, None, dweight, dbias, None, None, None, None
    return dx, dbranch, dgate, dweight, dbias, None, None, None, None


srem_forward.register_autograd(_autograd, setup_context=_save_inputs)


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
