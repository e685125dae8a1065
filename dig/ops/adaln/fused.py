"""Adaptive norm on Triton: two differentiable operations over one forward and one backward kernel.

Both are registered with torch.library, so ``torch.compile(fullgraph=True)`` and CUDA graphs take them. They are bound
by memory traffic: with x, the branch and h in bf16, bytes for each of the B T D elements are

    norm_modulate           4 forward (reads x; writes h)                 6 backward (reads x, dh; writes dx)
    residual_norm_modulate  8 forward (x, branch; x_new, h)              12 backward (x_new, branch, both gradients;
                                                                            dx, dbranch)

Saved for the backward pass: one or two fp32 numbers a token, beside inputs and outputs that exist anyway.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dig.ops.adaln.kernels import norm_modulate_backward_kernel, norm_modulate_finish_kernel, norm_modulate_kernel
from dig.ops.arithmetic import INTERPRETED
from dig.ops.derivatives import once
from dig.ops.launch import Launch, empty, last_contiguous, launch_context, or_none
from dig.ops.library import operation
from dig.ops.side_stream import on_side_stream
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import NormTiles
from dig.ops.whole import ceil_div

DTYPES = (torch.float32, torch.bfloat16)
MAX_WIDTH = 2048
"""Widest rows: a program holds whole rows, and wider ones spill out of the registers."""


def tiles_for(x: Tensor) -> NormTiles:
    """The tile choices for x (B, T, D)."""
    return for_device(x.device).adaln_tiles(x.shape[-1], x.dtype)


@functools.cache
def parts_of(D: int, widest: int) -> tuple[tuple[int, int], ...]:
    """Cut D columns into parts (first column, width), each width a power of two and at most ``widest``."""
    parts = []
    first = 0
    while first < D:
        width = min(widest, 1 << ((D - first).bit_length() - 1))
        parts.append((first, width))
        first += width
    return tuple(parts)


def _check(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension; its strides are {tensor.stride()}")


def _check_arguments(
    x: Tensor, branch: Tensor | None, per_batch: dict[str, Tensor], weight: Tensor | None, dtype: torch.dtype
) -> None:
    """Raise ValueError on what the kernels do not take; shapes have been checked already."""
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"x must be on a CUDA device (or TRITON_INTERPRET=1 set before the import); got {x.device}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x must have a width of at most {MAX_WIDTH}; got {x.shape[-1]}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(map(str, DTYPES))}; got {dtype}")
    _check("x", x, x)
    if branch is not None:
        _check("branch", branch, x)
    if weight is not None:
        _check("weight", weight, x)
    _check("scale", per_batch["scale"], x)
    for name, tensor in per_batch.items():
        _check(name, tensor, x, (per_batch["scale"].dtype,))


def _empty_stats(x: Tensor, norm: str) -> Tensor:
    return torch.empty(2 if norm == "layer" else 1, *x.shape[:2], dtype=torch.float32, device=x.device)


@functools.lru_cache(maxsize=1024)
def forward_launch(
    tiles: NormTiles,
    shape: torch.Size,
    x_strides: tuple[int, ...],
    branch_strides: tuple[int, ...] | None,
    gate_stride: int,
    shift_stride: int,
    scale_stride: int,
    norm: str,
    eps: float,
) -> Launch:
    """`norm_modulate_kernel`'s, on x, branch, gate, shift, scale, weight, x_new, h and the statistics."""
    B, T, D = shape
    return Launch(
        norm_modulate_kernel, (ceil_div(T, tiles.rows), B),
        (*x_strides[:2], *(branch_strides or x_strides)[:2], gate_stride, shift_stride, scale_stride, T, eps),
        early=True, D=D, PARTS=parts_of(D, tiles.part), R=tiles.rows, NORM=norm, RESIDUAL=branch_strides is not None,
        num_warps=tiles.warps,
    )  # fmt: skip


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_new (x itself without a branch), h, and the statistics of each token."""
    h, stats = empty(x, dtype), _empty_stats(x, norm)
    x_new = x if branch is None else empty(x)
    b_branch, b_gate, _, b_weight = _stand_ins(x, branch, gate, shift, scale, weight)
    kernel = forward_launch(
        tiles_for(x), x.shape, x.stride(), None if branch is None else branch.stride(), b_gate.stride(0),
        shift.stride(0), scale.stride(0), norm, eps,
    )  # fmt: skip
    launch_context(x.device).start(kernel, x, b_branch, b_gate, shift, scale, b_weight, x_new, h, stats)
    return x_new, h, stats


@operation("dig::norm_modulate")
def norm_modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """h, and the statistics that its backward pass needs."""
    _, h, stats = _forward(x, None, None, shift, scale, weight, norm, eps, dtype)
    return h, stats


@operation("dig::residual_norm_modulate")
def residual_norm_modulate_forward(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_new, h, and the statistics that their backward pass needs."""
    return _forward(x, branch, gate, shift, scale, weight, norm, eps, dtype)


@functools.lru_cache(maxsize=1024)
def backward_launches(
    tiles: NormTiles,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    row_strides: tuple[int, int, int],
    norm: str,
    add: bool,
    branch: bool,
    rebuild: bool,
) -> tuple[Launch, Launch, tuple[int, ...]]:
    """The two of a backward pass, and the shape of the partial sums between them.

    Strides are those of x, branch, dx_new and dh, or of what stands for them; row strides those of gate, shift and
    scale from image to image. The last three say whether there is a dx_new, a branch, and a shift.
    """
    B, T, D = shape
    x, b_branch, dx_new, dh = (each[:2] for each in strides)
    most = tiles.branch_programs if branch else tiles.programs
    programs = max(1, min(ceil_div(T, tiles.backward_rows), most // B))
    first = Launch(
        norm_modulate_backward_kernel, (programs, B), (*x, *b_branch, *row_strides, *dx_new, *dh, T),
        early=True, D=D, PARTS=parts_of(D, tiles.backward_part), R=tiles.backward_rows, NORM=norm, ADD=add,
        BRANCH=branch, REBUILD=rebuild, num_warps=tiles.backward_warps,
    )  # fmt: skip
    sums = tiles.sums(programs)
    second = Launch(
        norm_modulate_finish_kernel, (ceil_div(D, sums["COLS"]), B + (norm == "rms")), (row_strides[2], programs, B),
        D=D, **sums, NORM=norm, BRANCH=branch, num_warps=tiles.sum_warps,
    )  # fmt: skip
    return first, second, (B, programs, 3 if branch else 2, D)


def norm_gradients(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx_new: Tensor | None,
    dh: Tensor,
    norm: str,
    dshift: Tensor | None = None,
    dscale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`norm_modulate_backward`, with None for what was not asked for; dshift and dscale, if given, take these."""
    dx, dshift = empty(x), empty(scale) if dshift is None else dshift
    dscale = empty(scale) if dscale is None else dscale
    dbranch, dgate = None if branch is None else empty(branch), None if gate is None else empty(gate)
    dweight, h = None if weight is None else empty(weight), None if shift is None else empty(dh)
    dh = last_contiguous(dh)
    b_dx_new = dh if dx_new is None else last_contiguous(dx_new)
    b_branch, b_gate, b_shift, b_weight = _stand_ins(x, branch, gate, shift, scale, weight)
    first, second, shape = backward_launches(
        tiles_for(x), x.shape, (x.stride(), b_branch.stride(), b_dx_new.stride(), dh.stride()),
        (b_gate.stride(0), b_shift.stride(0), scale.stride(0)),
        norm, dx_new is not None, branch is not None, shift is not None,
    )  # fmt: skip
    partials = torch.empty(*shape, dtype=torch.float32, device=x.device)
    b_dgate, b_dweight = dx if dgate is None else dgate, dx if dweight is None else dweight
    launch = launch_context(x.device)
    launch.start(
        first, x, b_branch, b_gate, b_shift, scale, b_weight, stats, b_dx_new, dh, dx,
        dx if dbranch is None else dbranch, dh if h is None else h, partials,
    )  # fmt: skip
    with on_side_stream(partials, scale, b_weight, dshift, dscale, dgate, dweight):
        launch.start(second, partials, scale, b_weight, dshift, dscale, b_dgate, b_dweight)
    return dx, dbranch, dgate, dshift, dscale, dweight, h


@operation("dig::norm_modulate_backward")
def norm_modulate_backward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx_new: Tensor | None,
    dh: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of both operations, and of a norm whose input goes on beside it.

    Args:
        x: What was normed, (B, T, D).
        branch: As in `residual_norm_modulate`, with gate; or None.
        gate: (B, D), with branch.
        shift: (B, D), to have h again; or None.
        scale: (B, D).
        weight: (D,), or None.
        stats: Of the forward pass.
        dx_new: Gradient of x from elsewhere, (B, T, D), or None.
        dh: Gradient of h, (B, T, D).
        norm: ``rms`` or ``layer``.

    Returns:
        The gradients of x, branch, gate, shift, scale and weight, and h in dh's dtype. What was not asked for has no
        elements.
    """
    dx, dbranch, dgate, dshift, dscale, dweight, h = norm_gradients(
        x, branch, gate, shift, scale, weight, stats, dx_new, dh, norm
    )
    return dx, or_none(dbranch, x), or_none(dgate, x), dshift, dscale, or_none(dweight, x), or_none(h, dh)


def _stand_ins(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The optional tensors as kernels take them: a pointer that a kernel does not touch can be anything."""
    return (
        x if branch is None else branch,
        scale if gate is None else gate,
        scale if shift is None else shift,
        scale if weight is None else weight,
    )


def _empty_gradients(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx_new: Tensor | None,
    dh: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `norm_modulate_backward` returns."""
    dbranch, dgate, dweight = (
        or_none(None if tensor is None else empty(tensor), x) for tensor in (branch, gate, weight)
    )
    h = or_none(None if shift is None else empty(dh), dh)
    return empty(x), dbranch, dgate, empty(scale), empty(scale), dweight, h


norm_modulate_backward.register_fake(_empty_gradients)


@norm_modulate_forward.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return empty(x, dtype), _empty_stats(x, norm)


@residual_norm_modulate_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), empty(x, dtype), _empty_stats(x, norm)


def _save_norm_modulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, scale, weight, ctx.norm, _, _ = inputs
    ctx.save_for_backward(x, scale, weight, output[1])
    ctx.set_materialize_grads(False)


def _norm_modulate_autograd(ctx: Any, dh: Tensor | None, dstats: None) -> tuple[Tensor | None, ...]:
    if dh is None:
        return (None,) * 7
    x, scale, weight, stats = ctx.saved_tensors
    dx, _, _, dshift, dscale, dweight, _ = norm_modulate_backward(
        x, None, None, None, scale, weight, stats, None, dh, ctx.norm
    )
    return dx, dshift, dscale, None if weight is None else dweight, None, None, None


norm_modulate_forward.register_autograd(once(_norm_modulate_autograd), setup_context=_save_norm_modulate)


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, branch, gate, _, scale, weight, ctx.norm, _, ctx.dtype = inputs
    x_new, _, stats = output
    ctx.save_for_backward(x_new, branch, gate, scale, weight, stats)
    ctx.set_materialize_grads(False)


def _residual_autograd(ctx: Any, dx_new: Tensor | None, dh: Tensor | None, dstats: None) -> tuple[Tensor | None, ...]:
    if dx_new is None and dh is None:
        return (None,) * 9
    x_new, branch, gate, scale, weight, stats = ctx.saved_tensors
    # An output that nothing depends on, as h is of a block whose second half is unused.
    dh = torch.zeros_like(x_new, dtype=ctx.dtype) if dh is None else dh
    *gradients, dweight, _ = norm_modulate_backward(
        x_new, branch, gate, None, scale, weight, stats, dx_new, dh, ctx.norm
    )
    return *gradients, None if weight is None else dweight, None, None, None


residual_norm_modulate_forward.register_autograd(once(_residual_autograd), setup_context=_save_residual)


def fused_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    """`dig.ops.adaln.norm_modulate` on Triton, its shapes checked already.

    fp32 and bf16, each tensor its own, but shift's that of scale.

    Raises:
        ValueError: A width, dtype, device or stride that the kernels do not take; the message names the argument.
    """
    _check_arguments(x, None, {"shift": shift, "scale": scale}, weight, dtype)
    h: Tensor = norm_modulate_forward.recorded(x, shift, scale, weight, norm, eps, dtype)[0]
    return h


def fused_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`dig.ops.adaln.residual_norm_modulate` on Triton, its shapes checked already.

    fp32 and bf16, each tensor its own, but gate's and shift's that of scale.

    Raises:
        ValueError: A width, dtype, device or stride that the kernels do not take; the message names the argument.
    """
    _check_arguments(x, branch, {"gate": gate, "shift": shift, "scale": scale}, weight, dtype)
    x_new, h, _ = residual_norm_modulate_forward(x, branch, gate, shift, scale, weight, norm, eps, dtype)
    return x_new, h
