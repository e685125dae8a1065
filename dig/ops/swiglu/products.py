"""The matrix products on SwiGLU's two sides with its passes in them, on Triton: bf16 on Hopper.

A product's result is in a program's registers when it is done. SwiGLU by itself reads it back from memory: at
DiG-S/2 that pass and the product take about the same time. Here the product upwards ends with SwiGLU, and the product
that its gradient goes back through ends with SwiGLU's backward pass, so that bytes for each of the M F elements are

    forward     6 instead of 10 (writes gate, up, hidden), 2 where gate and up aren't kept
    backward   10 instead of 14 (reads gate and up; writes their gradients and hidden)

**What rides along.** The product upwards is the longest of a forward pass, and leaves the memory idle. Without
gradients, the copies of the next block's weights in the products' dtype, which move bytes and nothing else, are made in
it: beside it they would wait for multiprocessors, each of which a program of a product has to itself.

Shapes: M tokens, D width, F inner width of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dig.ops.chain import chained
from dig.ops.launch import empty, on_device
from dig.ops.linear import as_rows
from dig.ops.swiglu.fused import swiglu_backward, swiglu_forward
from dig.ops.swiglu.product_kernels import down_swiglu_backward_kernel, up_swiglu_kernel
from dig.ops.weights import prepare_weights


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """Tile choices of one kernel.

    Attributes:
        rows: Tokens of a program, a power of two.
        columns: Of the F columns that a program computes, a power of two.
        depth: Of the sum that it takes at a time, a power of two.
        group: Rows of tiles that are walked together.
        warps: Of a program.
        stages: Steps along the sum whose operands are in shared memory at once.
        registers: Most registers of a thread; None leaves it to the compiler.
    """

    rows: int
    columns: int
    depth: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


Pass = Literal["up", "up alone", "down"]
"""``up alone`` does not keep gate and up."""
NARROW_D = 512
"""The widest D of the first of these tables."""
NARROW: dict[Pass, ProductTiles] = {
    "up": ProductTiles(rows=128, columns=64, stages=3, registers=128),
    "up alone": ProductTiles(rows=128, columns=64, stages=3, registers=128),
    "down": ProductTiles(rows=128, columns=64, stages=4),
}
"""At D = 384 the sum is short: a tile takes as long to write as to compute, so two are to share a multiprocessor."""
WIDE: dict[Pass, ProductTiles] = {"up alone": ProductTiles(rows=128, columns=128, stages=4)}
"""What isn't here is faster apart: at D = 1152 cuBLAS' product takes so much less time that the pass is paid for.

Both are what was fastest of ``python -m bench ops products --sweep`` on an H100, at D = 384 and T = 12,544 and at D =
1152 and T = 4096."""
LEAST_TOKENS = 2048
"""With fewer, tiles of these sizes leave multiprocessors without work."""
SHARE = (32, 128)
"""Rows and columns of a weight that are copied together: 16 elements of each of a program's 256 threads."""
NO_SHARES: dict[str, Any] = {"ROWS": (), "COLUMNS": (), "STARTS": (0,), "GATE_STARTS": (0,), "R": 1, "C": 1, "EVERY": 0}
"""What `up_swiglu_kernel` is told where nothing rides."""


def tiles_for(which: Pass, tokens: Tensor, F: int) -> ProductTiles | None:
    """The tile choices of a pass over tokens (B, T, D), or None where a product and a pass of their own do better."""
    D = tokens.shape[-1]
    tiles = (NARROW if D <= NARROW_D else WIDE).get(which)
    fits = tokens.dtype == torch.bfloat16 and D % 8 == 0 and tokens.numel() >= LEAST_TOKENS * D and tokens.is_cuda
    if tiles is None or not fits or F % tiles.columns:
        return None
    return tiles if torch.cuda.get_device_capability(tokens.device)[0] == 9 else None


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(as_rows(tensor), [rows, columns])


def _grid(tiles: ProductTiles, M: int, F: int) -> tuple[int]:
    return (triton.cdiv(M, tiles.rows) * (F // tiles.columns),)


@torch.library.custom_op("dig::project_up", mutates_args=())
def project_up(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``SwiGLU(x weight^T)``, in one kernel or, where that does not fit, by a product and a pass.

    Args:
        x: (B, T, D), contiguous.
        weight: (2F, D), contiguous, in x's dtype.
        keep: Whether the product's result is asked for.

    Returns:
        Hidden (B, T, F), and gate_up (B, T, 2F), without ``keep`` of no elements.
    """
    F = len(weight) // 2
    t = tiles_for("up" if keep else "up alone", x, F)
    if t is None:
        with torch.autocast(x.device.type, enabled=False):
            gate_up = torch.mm(as_rows(x), weight.T).view(*x.shape[:-1], 2 * F)
        return swiglu_forward(gate_up), gate_up if keep else x.new_empty(0)
    hidden, gate_up = _empty_up(x, weight, keep)
    # A pointer that a kernel does not touch can be anything.
    _launch_up(t, x, weight, gate_up if keep else hidden, hidden, ((x,), (x,), (x,)), NO_SHARES, KEEP=keep)
    return hidden, gate_up


def _launch_up(
    t: ProductTiles,
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    hidden: Tensor,
    copied: tuple[tuple[Tensor, ...], ...],
    shares: dict[str, Any],
    **constants: Any,
) -> None:
    """Launch `up_swiglu_kernel`; copied are its masters, gates and copies, shares the constants about those."""
    D, F = x.shape[-1], len(weight) // 2
    M, tile = x.numel() // D, (t.rows, t.columns)
    with on_device(x.device):
        up_swiglu_kernel[_grid(t, M, F)](
            _descriptor(x, t.rows, t.depth), _descriptor(weight, t.columns, t.depth), _descriptor(gate_up, *tile),
            _descriptor(hidden, *tile), *copied, M,
            D=D, F=F, BM=t.rows, BN=t.columns, BK=t.depth, GROUP=t.group, **constants, **shares,
            **t.options, **chained(x.device),
        )  # fmt: skip


@project_up.register_fake
def _empty_up(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    double = len(weight)
    shape = (*x.shape[:-1], double) if keep else (0,)
    return (
        torch.empty(*x.shape[:-1], double // 2, dtype=x.dtype, device=x.device),
        torch.empty(shape, dtype=x.dtype, device=x.device),
    )


def shares_of(shapes: Sequence[tuple[int, int]], gated: int, *, programs: int, steps: int) -> dict[str, Any] | None:
    """How weights (N, M) are shared among programs that have so many steps; None where they don't fit.

    The last ``gated`` of the weights have gates.
    """
    rows, columns = SHARE
    # Without a gate, nothing asks for a weight's own rows.
    ungated = len(shapes) - gated
    cut = [(N * M // columns, columns) if i < ungated else (N, M) for i, (N, M) in enumerate(shapes)]
    whole = all(a * b == N * M and b % columns == 0 for (a, b), (N, M) in zip(cut, shapes, strict=True))
    if not whole or max(N * M for N, M in shapes) >= 2**31:
        return None
    counts = [triton.cdiv(N, rows) * (M // columns) for N, M in cut]
    starts = (0, *accumulate(counts))
    every = steps // triton.cdiv(starts[-1], programs)
    if not every:
        return None
    return {
        "ROWS": tuple(N for N, _ in cut),
        "COLUMNS": tuple(M for _, M in cut),
        "STARTS": starts,
        # Where no weight has a gate, no share is as far as this.
        "GATE_STARTS": starts[ungated:-1] or starts[-1:],
        "R": rows,
        "C": columns,
        "EVERY": every,
    }


def rides(x: Tensor, F: int, masters: Sequence[Tensor], gated: int) -> bool:
    """Whether `project_up_preparing` copies these weights in its product: contiguous, in fp32, beside a wide one."""
    return _riding(x, F, masters, gated) is not None


def _riding(x: Tensor, F: int, masters: Sequence[Tensor], gated: int) -> tuple[ProductTiles, dict[str, Any]] | None:
    """Tiles of the product, and the constants of the shares; None where nothing `rides`."""
    t = tiles_for("up alone", x, F)
    plain = all(master.dtype == torch.float32 and master.is_contiguous() for master in masters)
    if t is None or x.shape[-1] <= NARROW_D or not plain:
        return None
    D = x.shape[-1]
    (programs,) = _grid(t, x.numel() // D, F)
    shapes = [(len(w), w.numel() // len(w)) for w in masters]
    shares = shares_of(shapes, gated, programs=programs, steps=triton.cdiv(D, t.depth))
    return None if shares is None else (t, shares)


@torch.library.custom_op("dig::project_up_preparing", mutates_args=())
def project_up_preparing(x: Tensor, weight: Tensor, masters: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """`project_up` without keeping, and `dig.ops.weights.prepare_weights` in x's dtype: in one kernel where it `rides`.

    Args:
        x: (B, T, D), contiguous.
        weight: (2F, D), contiguous, in x's dtype.
        masters: Weights (N, M) to copy.
        gates: Of the last ones, (N,) each, contiguous.

    Returns:
        Hidden (B, T, F), and the copies.
    """
    riding = _riding(x, len(weight) // 2, masters, len(gates))
    if riding is None:
        return [project_up(x, weight, False)[0], *prepare_weights(masters, gates, x.dtype)]
    t, shares = riding
    hidden, *copies = _empty_preparing(x, weight, masters, gates)
    copied = (tuple(masters), tuple(gates) or tuple(masters[:1]), tuple(copies))
    _launch_up(t, x, weight, hidden, hidden, copied, shares, KEEP=False)
    return [hidden, *copies]


@project_up_preparing.register_fake
def _empty_preparing(x: Tensor, weight: Tensor, masters: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    return [_empty_up(x, weight, False)[0], *(empty(master, x.dtype) for master in masters)]


@torch.library.custom_op("dig::project_down_backward", mutates_args=())
def project_down_backward(dout: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The backward pass of ``SwiGLU(gate_up) weight^T``, in one kernel or by a product and a pass.

    Args:
        dout: (B, T, D), the gradient of the result, contiguous.
        weight: (D, F), contiguous, in dout's dtype.
        gate_up: (B, T, 2F), contiguous.

    Returns:
        The gradient of gate_up, and hidden (B, T, F), which the gradient of weight is made of.
    """
    D, F = weight.shape
    t = tiles_for("down", dout, F)
    if t is None:
        with torch.autocast(dout.device.type, enabled=False):
            dhidden = torch.mm(as_rows(dout), weight).view(*dout.shape[:-1], F)
        gradients: tuple[Tensor, Tensor] = swiglu_backward(gate_up, dhidden, True)
        return gradients
    dgate_up, hidden = _empty_down(dout, weight, gate_up)
    M, tile = dout.numel() // D, (t.rows, t.columns)
    with on_device(dout.device):
        down_swiglu_backward_kernel[_grid(t, M, F)](
            _descriptor(dout, t.rows, t.depth), _descriptor(weight, t.depth, t.columns), _descriptor(gate_up, *tile),
            _descriptor(dgate_up, *tile), _descriptor(hidden, *tile), M,
            D=D, F=F, BM=t.rows, BN=t.columns, BK=t.depth, GROUP=t.group, **t.options,
            **chained(dout.device),
        )  # fmt: skip
    return dgate_up, hidden


@project_down_backward.register_fake
def _empty_down(dout: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return empty(gate_up), torch.empty(*dout.shape[:-1], weight.shape[1], dtype=dout.dtype, device=dout.device)
