"""The GEMMs on SwiGLU's two sides with its passes as their epilogues, on Triton: bf16, where `dig.ops.tiles` has any.

A GEMM's result is in a program's registers when it is done. SwiGLU by itself reads it back from memory: at DiG-S/2 that
pass and the GEMM take about the same time. Here the up-projection GEMM ends with SwiGLU, and the GEMM back through the
down-projection ends with SwiGLU's backward pass, so that bytes for each of the M F elements are

    forward     6 instead of 10 (writes gate, up, hidden), 2 where gate and up aren't kept
    backward   10 instead of 14 (reads gate and up; writes their gradients and hidden)

**The fused weight cast.** The up-projection GEMM is the longest of a forward pass, and leaves the memory idle. Without
gradients, it also casts the next block's weights to the GEMMs' dtype, which only moves bytes. As a kernel beside it,
the cast would wait for SMs: a GEMM's program takes a whole one.

Shapes: M tokens, D width, F inner width of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.tools.tensor_descriptor import TensorDescriptor

from dig.ops.arithmetic import INTERPRETED
from dig.ops.launch import empty, launch_context
from dig.ops.library import operation
from dig.ops.linear import as_rows, without_autocast
from dig.ops.swiglu.fused import swiglu_backward, swiglu_forward
from dig.ops.swiglu.product_kernels import down_swiglu_backward_kernel, up_swiglu_kernel
from dig.ops.tiles import for_device
from dig.ops.tiles.products import ProductPass, ProductTiles
from dig.ops.weights import prepare_weights
from dig.ops.whole import ceil_div

NO_SHARES: dict[str, Any] = {"ROWS": (), "COLUMNS": (), "STARTS": (0,), "GATE_STARTS": (0,), "R": 1, "C": 1, "EVERY": 0}
"""What `up_swiglu_kernel` is told where it casts no weights."""
_PRECISION = "interpreter" if INTERPRETED else "tf32"


def tiles_for(which: ProductPass, tokens: Tensor, F: int) -> ProductTiles | None:
    """The tile choices of a pass over tokens (B, T, D), or None where a GEMM and a pass of their own do better."""
    D = tokens.shape[-1]
    if tokens.dtype != torch.bfloat16 or D % 8:
        return None
    return for_device(tokens.device).product_tiles(which, tokens.numel() // D, D, F)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(as_rows(tensor), [rows, columns])


def _grid(tiles: ProductTiles, M: int, F: int) -> tuple[int]:
    return (tiles.programs(M, F),)


@operation("dig::project_up")
def project_up(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``SwiGLU(x weight^T)``, in one kernel or, where that does not fit, by a GEMM and a pass.

    Args:
        x: (B, T, D), contiguous.
        weight: (2F, D), contiguous, in x's dtype.
        keep: Whether the GEMM's result is asked for.

    Returns:
        Hidden (B, T, F), and gate_up (B, T, 2F), without ``keep`` of no elements.
    """
    F = weight.shape[0] // 2
    t = tiles_for("up" if keep else "up alone", x, F)
    if t is None:
        with without_autocast(x.device):
            gate_up = linear(x, weight)
        # Of an operation within this one PyTorch is not told.
        return swiglu_forward.function(gate_up), gate_up if keep else x.new_empty(0)
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
    D, F = x.shape[-1], weight.shape[0] // 2
    M, tile = x.numel() // D, (t.rows, t.columns)
    with launch_context(x.device) as launch:
        launch.early(
            up_swiglu_kernel, _grid(t, M, F),
            (_descriptor(x, t.rows, t.depth), _descriptor(weight, t.columns, t.depth), _descriptor(gate_up, *tile),
             _descriptor(hidden, *tile), *copied),
            (M,),
            D=D, F=F, BM=t.rows, BN=t.columns, BK=t.depth, GROUP=t.group, PRECISION=_PRECISION, **constants, **shares,
            **t.options,
        )  # fmt: skip


@project_up.register_fake
def _empty_up(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    double = weight.shape[0]
    shape = (*x.shape[:-1], double) if keep else (0,)
    return (
        torch.empty(*x.shape[:-1], double // 2, dtype=x.dtype, device=x.device),
        torch.empty(shape, dtype=x.dtype, device=x.device),
    )


def shares_of(
    shapes: Sequence[tuple[int, int]], gated: int, *, share: tuple[int, int], programs: int, steps: int
) -> dict[str, Any] | None:
    """How weights (N, M) are shared among programs that have so many steps; None where they don't fit.

    The last ``gated`` of the weights have gates. A share has so many rows and columns.
    """
    rows, columns = share
    # Without a gate, nothing asks for a weight's own rows.
    ungated = len(shapes) - gated
    cut = [(N * M // columns, columns) if i < ungated else (N, M) for i, (N, M) in enumerate(shapes)]
    whole = all(a * b == N * M and b % columns == 0 for (a, b), (N, M) in zip(cut, shapes, strict=True))
    if not whole or max(N * M for N, M in shapes) >= 2**31:
        return None
    counts = [ceil_div(N, rows) * (M // columns) for N, M in cut]
    starts = (0, *accumulate(counts))
    every = steps // ceil_div(starts[-1], programs)
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


def fuses_cast(x: Tensor, F: int, masters: Sequence[Tensor], gated: int) -> bool:
    """Whether the cast of these weights is fused into the GEMM: they are contiguous, in fp32, and the GEMM is large."""
    return _fused_cast(x, F, masters, gated) is not None


def _fused_cast(x: Tensor, F: int, masters: Sequence[Tensor], gated: int) -> tuple[ProductTiles, dict[str, Any]] | None:
    """Tiles of the GEMM, and the constants of the shares; None where the weights are cast apart."""
    t = tiles_for("up alone", x, F)
    plain = all(master.dtype == torch.float32 and master.is_contiguous() for master in masters)
    choices = for_device(x.device).products
    D = x.shape[-1]
    if t is None or t in choices.few.values() or choices.narrow_width >= D or not plain:
        return None
    (programs,) = _grid(t, x.numel() // D, F)
    shapes = [(len(w), w.numel() // len(w)) for w in masters]
    shares = shares_of(shapes, gated, share=choices.share, programs=programs, steps=ceil_div(D, t.depth))
    return None if shares is None else (t, shares)


@operation("dig::project_up_preparing")
def project_up_preparing(x: Tensor, weight: Tensor, masters: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    """`project_up` without keeping, and `dig.ops.weights.prepare_weights` in x's dtype.

    In one kernel, where `fuses_cast` says so.

    Args:
        x: (B, T, D), contiguous.
        weight: (2F, D), contiguous, in x's dtype.
        masters: Weights (N, M) to cast.
        gates: Of the last ones, (N,) each, contiguous.

    Returns:
        Hidden (B, T, F), and the copies.
    """
    fused = _fused_cast(x, len(weight) // 2, masters, len(gates))
    if fused is None:
        return [project_up(x, weight, False)[0], *prepare_weights(masters, gates, x.dtype)]
    t, shares = fused
    hidden, *copies = _empty_preparing(x, weight, masters, gates)
    copied = (tuple(masters), tuple(gates) or tuple(masters[:1]), tuple(copies))
    _launch_up(t, x, weight, hidden, hidden, copied, shares, KEEP=False)
    return [hidden, *copies]


@project_up_preparing.register_fake
def _empty_preparing(x: Tensor, weight: Tensor, masters: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    return [_empty_up(x, weight, False)[0], *(empty(master, x.dtype) for master in masters)]


@operation("dig::project_down_backward")
def project_down_backward(dout: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The backward pass of ``SwiGLU(gate_up) weight^T``, in one kernel or by a GEMM and a pass.

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
        with without_autocast(dout.device):
            dhidden = torch.matmul(dout, weight)
        return swiglu_backward.function(gate_up, dhidden, True)
    dgate_up, hidden = _empty_down(dout, weight, gate_up)
    M, tile = dout.numel() // D, (t.rows, t.columns)
    with launch_context(dout.device) as launch:
        launch.early(
            down_swiglu_backward_kernel, _grid(t, M, F),
            (_descriptor(dout, t.rows, t.depth), _descriptor(weight, t.depth, t.columns), _descriptor(gate_up, *tile),
             _descriptor(dgate_up, *tile), _descriptor(hidden, *tile)),
            (M,),
            D=D, F=F, BM=t.rows, BN=t.columns, BK=t.depth, GROUP=t.group, PRECISION=_PRECISION, **t.options,
        )  # fmt: skip
    return dgate_up, hidden


@project_down_backward.register_fake
def _empty_down(dout: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return empty(gate_up), torch.empty(*dout.shape[:-1], weight.shape[1], dtype=dout.dtype, device=dout.device)
