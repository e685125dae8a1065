"""Time SREM's convolution alone: the fused kernels beside PyTorch's convolution, in the same run.

    python -m bench ops srem                                 # DiG-S/2 at 512, 1024, 1792 and 2048, bf16
    python -m bench ops srem --width 1152 --sides 128 --kernels --json srem.jsonl
    python -m bench ops srem --sides 112 --sweep             # what `dig.ops.tiles.sm90.SREM` is made from

Implementations: ``triton`` and ``reference`` as in `dig.ops.srem.srem`, tokens in raster order; ``moved`` is the gated
residual, the convolution and the reordering for the next block as in a model whose tokens move, at a transition that
both transposes and flips. How times are taken, and what cold and hot mean: `bench.ops.common`. Rates are those of the
bytes that must move: x and branch read and y written; backwards x, branch and dy read, dx and dbranch written. A copy's
rate on the same card stands beside them. Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ops.common import (
    DTYPES,
    MODES,
    Step,
    Times,
    kernel_times,
    make_step,
    measure,
    report,
    set_count,
    use_tiles,
)
from dig.ops.srem import srem
from dig.ops.tiles.choices import SremTiles
from dig.scan import ScanOrder, reorder

ORDER = ScanOrder(transposed=False, reversed=True)
NEXT_ORDER = ScanOrder(transposed=True, reversed=False)
IMPLEMENTATIONS = ("triton", "reference", "moved")
KERNELS = {"forward": "srem_forward_kernel", "backward": "srem_backward_kernel"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One case: a grid of rows and columns, B batch, D width, dtype a key of `DTYPES`."""

    B: int
    rows: int
    columns: int
    D: int
    dtype: str

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    def least_bytes(self, mode: str) -> int:
        """Bytes that must move: each token read or written once."""
        tensors = 3 if mode == "forward" else 8
        return tensors * self.B * self.rows * self.columns * self.D * DTYPES[self.dtype].itemsize


def make_inputs(shape: Shape, device: str = "cuda") -> tuple[list[Tensor], Tensor]:
    """x, branch, gate, weight and bias for one step, and the output's gradient; gate is a slice, as in the model."""
    B, T, D = shape.B, shape.rows * shape.columns, shape.D
    x, branch, gradient = (torch.randn(B, T, D, device=device, dtype=DTYPES[shape.dtype]) for _ in range(3))
    gate = torch.randn(B, 6 * D, device=device, dtype=DTYPES[shape.dtype]).chunk(6, dim=1)[5].detach()
    weight, bias = torch.randn(D, 1, 3, 3, device=device), torch.randn(D, device=device)
    return [leaf.requires_grad_() for leaf in (x, branch, gate, weight, bias)], gradient


def operation(implementation: str, grid: tuple[int, int]) -> Callable[..., Tensor]:
    """One of `IMPLEMENTATIONS` as a function of x, branch, gate, weight and bias."""

    def moved(x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x + gate.unsqueeze(1) * branch
        image = x.transpose(1, 2).unflatten(2, ORDER.grid(grid))
        image = F.conv2d(image, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=x.shape[2])
        return reorder(image.flatten(2).transpose(1, 2), grid, ORDER, NEXT_ORDER)

    if implementation == "moved":
        return moved
    return lambda *inputs: srem(*inputs, grid=grid, order=ORDER, implementation=implementation)


def make_steps(shape: Shape, implementation: str, mode: str) -> list[Step]:
    """Cold steps, each on inputs of its own."""
    function = operation(implementation, shape.grid)
    sets = [make_inputs(shape) for _ in range(set_count(shape.least_bytes("forward")))]
    return [make_step(function, mode, leaves, [gradient]) for leaves, gradient in sets]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a sweep tries; fields of `dig.ops.tiles.choices.SremTiles`, 0 registers being what the compiler takes.

    ``best`` is how many of each pass are printed.
    """

    channels: tuple[int, ...]
    groups: tuple[int, ...]
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    warps: tuple[int, ...]
    registers: tuple[int, ...]
    best: int


def sweep(shape: Shape, choices: Choices) -> None:
    """Time the kernel of each pass under every tile choice, and print them from the fastest to the slowest.

    Inputs are hot: small grids then show what the instructions cost, and large ones do not fit into the L2 cache.
    """
    from triton.runtime.errors import OutOfResources

    from dig.ops.srem import fused

    (x, branch, gate, weight, bias), gradient = make_inputs(shape)
    (rows, columns), order = shape.grid, ORDER

    def step() -> None:
        # As the model runs it for one image, whose gate's gradient comes from elsewhere.
        with torch.no_grad():
            fused.srem_forward(x, branch, gate, weight, bias, rows, columns, *order)
            fused.srem_backward(x, branch, gate, weight, bias, gradient, rows, columns, *order, True)

    base = fused.tiles_for("forward", x)
    times: dict[str, list[tuple[float, SremTiles]]] = {name: [] for name in KERNELS}
    for channels, groups, width, rows, warps, registers in itertools.product(
        choices.channels, choices.groups, choices.widths, choices.rows, choices.warps, choices.registers
    ):
        if channels * groups not in (64 * warps, 128 * warps):
            continue  # two or four channels a thread
        tiles = replace(
            base,
            channels=channels,
            groups=groups,
            width=width,
            rows=rows,
            warps=warps,
            registers=registers or None,
            programs=1,
        )
        try:
            with use_tiles(fused, tiles):
                kernels = kernel_times(step)
        except OutOfResources as error:
            print(f"{tiles}: {error}", flush=True)
            continue
        for name, kernel in KERNELS.items():
            times[name].append((kernels[kernel][0], tiles))
    for name, found in times.items():
        for microseconds, tiles in sorted(found, key=lambda item: item[0])[: choices.best]:
            print(f"{shape.rows:>4} x {shape.columns:<4} {name:<8} {microseconds:8.1f} µs  {tiles}", flush=True)


def time_shape(shape: Shape, implementations: Iterable[str], times: Times) -> None:
    """Time implementations (`IMPLEMENTATIONS`), a line each."""
    for implementation, mode in itertools.product(implementations, MODES):
        row = measure(
            asdict(shape) | {"implementation": implementation, "operation": "srem", "mode": mode},
            partial(make_steps, shape, implementation, mode),
            size=shape.least_bytes(mode),
            times=times,
        )
        start = f"{shape.rows:>4} x {shape.columns:<4} D={shape.D:<5} {mode:<17} {implementation:<10}"
        report(row, start, times.json)
