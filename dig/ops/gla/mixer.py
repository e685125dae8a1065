"""DiG's whole token mixer between its two projections, on Triton, straight from the fused projection's output.

One projection gives every token q, k, v, the output gate and the first factor of the decay gate, side by side. The
kernels read them where they lie, and write the gradient of the whole row likewise, so that nothing is split, copied or
put together again on either way. Tokens stay in raster order; the recurrence walks them in the block's scan order.

Shapes: B batch, T tokens, D width, H heads, R rank of the decay gate.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.derivatives import once
from dig.ops.gla.block_launches import run_rows, run_rows_backward
from dig.ops.gla.launches import Plan, check_kept, decay_sums, empty_states, empty_sums, no_states, plan_of
from dig.ops.gla.layouts import Layout, Outline, Rows, Slots, gate_constants
from dig.ops.gla.projection import GATE_NORMALIZER, projection_splits, split_projection
from dig.ops.gla.tiled import check_qkv
from dig.ops.launch import empty, last_contiguous, launch_context
from dig.ops.library import operation
from dig.ops.linear import as_rows, weight_gradient, without_autocast
from dig.ops.side_stream import on_side_stream
from dig.scan import ScanOrder


def order_code(order: ScanOrder) -> int:
    """As `dig.ops.gla.pieces.scan_tokens` reads it."""
    return int(order.reversed) + 2 * int(order.transposed)


class Projection(NamedTuple):
    """What a fused projection is made of, from its shape and strides alone."""

    layout: Layout
    slots: Slots
    """Its gradient's, contiguous, and the logits' in a tensor of their own."""
    q: Outline
    v: Outline
    width: int
    """D."""
    low: int
    """The first column of the decay gate's factor."""


@functools.lru_cache(maxsize=1024)
def projection_of(
    shape: torch.Size, strides: tuple[int, int, int], dtype: torch.dtype, device: torch.device, heads: int, rank: int
) -> Projection:
    """Of a fused projection (B, T, 3D + R) with R = rank."""
    B, T, columns = shape
    batch, token, _ = strides
    D = (columns - rank) // 3
    K, V = D // 2 // heads, D // heads
    q, k, v, g, low = accumulate(projection_splits(D, rank)[:-1], initial=0)
    layout = Layout(
        tensors=3,
        qkv=((0, q), (0, k), (0, v)),
        gate=((0, low), (1, 0), (2, 0)),
        g=(0, g),
        qkv_strides=(batch, token, K, batch, token, K, batch, token, V),
        gate_strides=(batch, token, 0),
        g_strides=(batch, token, V),
        constants=gate_constants(rank, logits=True),
    )
    slots = Slots(
        tensors=2,
        parts=((0, q), (0, k), (0, v), (1, 0), (0, g)),
        strides=(columns, columns, columns, heads * K, columns),
    )
    q_outline, v_outline = (Outline((B, T, heads, each), dtype, device) for each in (K, V))
    return Projection(layout, slots, q_outline, v_outline, D, low)


def _prepare(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
) -> tuple[Plan, Rows, Projection]:
    """The launch plan, the inputs, and where in them is what."""
    rank = decay_weight.shape[1]
    p = projection_of(projected.shape, projected.stride(), projected.dtype, projected.device, heads, rank)
    plan = plan_of(p.q, p.v, p.q.shape[-1] ** -0.5, GATE_NORMALIZER, (rows, columns), order)
    return plan, Rows((projected, decay_weight, decay_bias), p.layout), p


@operation("dig::gla_mixer")
def mixer_forward(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`gla_mixer` as torch sees it, order as `order_code` gives it: its result, and the states before each chunk.

    The backward pass needs the latter; unless ``keep`` they have no elements.
    """
    plan, inputs, p = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
    return run_rows(plan, inputs, (plan.B, plan.T, p.width), norm_weight, eps, keep)


@operation("dig::gla_mixer_sums")
def mixer_sums(
    projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, heads: int, rows: int, columns: int, order: int
) -> Tensor:
    """The sums of the decays, which the backward pass begins with: they depend on no gradient."""
    plan, inputs, _ = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
    return decay_sums(launch_context(projected.device), plan, inputs)


@mixer_sums.register_fake
def _(
    projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, heads: int, rows: int, columns: int, order: int
) -> Tensor:
    # Not `_prepare`, whose keys can't be torch.compile's symbols.
    q, _, v, *_ = split_projection(projected, heads, decay_weight.shape[1])
    return empty_sums(plan_of(q, v, q.shape[-1] ** -0.5, GATE_NORMALIZER, (rows, columns), order), v)


@operation("dig::gla_mixer_backward")
def mixer_backward(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    states: Tensor,
    sums: Tensor | None,
    dy: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
    rebuild: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four tensors, decay_weight's in fp32; with ``rebuild`` the output again, else no elements.

    ``sums`` are `mixer_sums`', or None to compute them here.
    """
    dy = last_contiguous(dy)
    plan, inputs, p = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
    gradient = empty(projected)
    dlogits = torch.empty(plan.B * plan.T, p.width // 2, dtype=projected.dtype, device=projected.device)
    y = _rebuilt(projected, norm_weight, heads, rebuild)
    batch, token, _ = dy.stride()
    dnorm, dbias = run_rows_backward(
        plan, inputs, p.slots, (gradient, dlogits), norm_weight, decay_bias, states, dy,
        (batch, token, p.v.shape[-1]), eps, y if rebuild else None, sums,
    )  # fmt: skip
    factor = decay_weight if decay_weight.dtype == dlogits.dtype else decay_weight.to(dlogits.dtype)
    with without_autocast(projected.device):
        torch.mm(dlogits, factor, out=_low(gradient, p))
        with on_side_stream(dlogits, projected):
            dweight = weight_gradient(dlogits, _low(projected, p))
    return gradient, dweight, dbias, dnorm, y


def _low(rows: Tensor, p: Projection) -> Tensor:
    """The columns (B T, R) of the decay gate's factor."""
    if rows.is_contiguous():
        columns = rows.shape[2]
        first = rows.storage_offset() + p.low
        return rows.as_strided((rows.shape[0] * rows.shape[1], columns - p.low), (columns, 1), first)
    return as_rows(rows)[:, p.low :]


def _rebuilt(projected: Tensor, norm_weight: Tensor, heads: int, rebuild: bool) -> Tensor:
    width = heads * norm_weight.shape[0] if rebuild else 0
    batch, tokens, _ = projected.shape
    return torch.empty(batch, tokens, width, dtype=projected.dtype, device=projected.device)


@mixer_forward.register_fake
def _(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    q, _, v, *_ = split_projection(projected, heads, decay_weight.shape[1])
    states = empty_states(q, v) if keep else no_states(v)
    return projected.new_empty(*projected.shape[:2], heads * norm_weight.shape[0]), states


@mixer_backward.register_fake
def _(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    states: Tensor,
    sums: Tensor | None,
    dy: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
    rebuild: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty(projected),
        empty(decay_weight, torch.float32),
        empty(decay_bias),
        empty(norm_weight),
        _rebuilt(projected, norm_weight, heads, rebuild),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    check_kept(inputs[-1])
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.numbers = inputs[4:-1]


def _autograd(ctx: Any, dy: Tensor, dstates: None) -> tuple[Tensor | None, ...]:
    # Unpacked once: checkpointing computes them anew for that, and only once.
    projected, weight, bias, norm, states = ctx.saved_tensors
    heads, rows, columns, order, eps = ctx.numbers
    dprojected, dweight, *others, _ = mixer_backward(
        projected, weight, bias, norm, states, None, dy, heads, rows, columns, order, eps, False
    )
    return dprojected, dweight.to(weight.dtype), *others, None, None, None, None, None, None


mixer_forward.register_autograd(once(_autograd), setup_context=_setup)


def _check_parameter(name: str, tensor: Tensor, projected: Tensor) -> None:
    if tensor.dtype not in (torch.float32, projected.dtype) or tensor.device != projected.device:
        raise ValueError(
            f"{name} must be fp32 or {projected.dtype} on {projected.device}; it is {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tensor.stride()}")


def gla_mixer(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    *,
    heads: int,
    grid: tuple[int, int],
    order: ScanOrder,
    eps: float = 1e-6,
) -> Tensor:
    """Decay gate, recurrence, per-head RMSNorm and output gate of DiG (paper Eq. 4-10), between its projections.

    Args:
        projected: (B, T, 3D + R), each token's q, k, v, output gate and low-rank decay factor, in raster order; fp32 or
            bf16, contiguous in its last dimension.
        decay_weight: (D/2, R), contiguous, second factor of the decay gate, fp32 or projected's dtype. As to very
            strong decay, see `dig.ops.gla.tiled.gla_block`.
        decay_bias: (D/2,), likewise.
        norm_weight: (D/H,), shared by the heads, fp32 or projected's dtype.
        heads: H.
        grid: (rows, columns) of the image's tokens.
        order: The order in which the recurrence walks them.
        eps: Added to the mean square of a head's output.

    Returns:
        (B, T, D) in raster order, in projected's dtype.

    Raises:
        ValueError: An argument that does not fit; the message names it.
    """
    if projected.ndim != 3 or projected.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"projected must be (B, {grid[0]}·{grid[1]}, 3D + R); got {tuple(projected.shape)}")
    width = heads * norm_weight.shape[0]
    rank = projected.shape[2] - 3 * width
    if rank < 1 or width % (2 * heads):
        raise ValueError(
            f"projected must have 3D + R columns with D = {width} (heads times norm_weight) even in each of {heads} "
            f"heads; got {projected.shape[2]}"
        )
    for name, tensor, shape in (
        ("decay_weight", decay_weight, (width // 2, rank)),
        ("decay_bias", decay_bias, (width // 2,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
        _check_parameter(name, tensor, projected)
    q, k, v, _, _ = split_projection(projected, heads, rank)
    check_qkv(q, k, v)
    _check_parameter("norm_weight", norm_weight, projected)
    code = order_code(order)
    keep = torch.is_grad_enabled()
    y: Tensor = mixer_forward(projected, decay_weight, decay_bias, norm_weight, heads, *grid, code, eps, keep)[0]
    return y
