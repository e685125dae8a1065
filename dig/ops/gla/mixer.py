"""DiG's whole token mixer between its two projections, on Triton, straight from the fused projection's output.

One projection gives every token q, k, v, the output gate and the first factor of the decay gate, side by side. The
kernels read them where they lie, and write the gradient of the whole row likewise, so that nothing is split, copied or
put together again on either way. Tokens stay in raster order; the recurrence walks them in the block's scan order.

Shapes: B batch, T tokens, D width, H heads, R rank of the decay gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dig.ops.derivatives import once
from dig.ops.gla.block_launches import run_block, run_block_backward
from dig.ops.gla.launches import (
    DecayGate,
    Plan,
    check_kept,
    decay_sums,
    empty_states,
    empty_sums,
    no_states,
    plan_of,
)
from dig.ops.gla.projection import GATE_NORMALIZER, split_projection
from dig.ops.gla.tiled import check_qkv
from dig.ops.launch import empty, launching
from dig.ops.library import operation
from dig.ops.linear import as_rows, weight_gradient, without_autocast
from dig.ops.side_stream import on_side_stream
from dig.scan import ScanOrder


def order_code(order: ScanOrder) -> int:
    """As `dig.ops.gla.pieces.scan_tokens` reads it."""
    return int(order.reversed) + 2 * int(order.transposed)


def _prepare(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    *,
    alone: bool = False,
) -> tuple[Plan, tuple[Tensor, Tensor, Tensor], DecayGate, Tensor]:
    """The launch plan, (q, k, v), the decay gate, and the output gate; ``alone`` as of `plan_of`."""
    q, k, v, gate, low = split_projection(projected, heads, decay_weight.shape[1])
    plan = plan_of(q, v, q.shape[-1] ** -0.5, GATE_NORMALIZER, (rows, columns), order, alone=alone)
    return plan, (q, k, v), DecayGate(values=low, logits=True, weight=decay_weight, bias=decay_bias), gate


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
    plan, qkv, decay, gate = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order, alone=not keep)
    y, states = run_block(plan, *qkv, decay, gate, norm_weight, eps, keep)
    return y.flatten(2), states


@operation("dig::gla_mixer_sums")
def mixer_sums(
    projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, heads: int, rows: int, columns: int, order: int
) -> Tensor:
    """The sums of the decays, which the backward pass begins with: they depend on no gradient."""
    plan, qkv, decay, _ = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
    with launching(projected.device) as launch:
        return decay_sums(launch, plan, *qkv, decay)


@mixer_sums.register_fake
def _(
    projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, heads: int, rows: int, columns: int, order: int
) -> Tensor:
    plan, (_, _, v), _, _ = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
    return empty_sums(plan, v)


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
    plan, (q, k, v), decay, gate = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
    rank = decay_weight.shape[1]
    gradient = empty(projected)
    dq, dk, dv, dgate, _ = split_projection(gradient, heads, rank)
    dlogits = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    y = _rebuilt(projected, norm_weight, heads, rebuild)
    dnorm, dbias = run_block_backward(
        plan, q, k, v, decay, gate, norm_weight, states, dy.view(*dy.shape[:-1], heads, dy.shape[-1] // heads), eps,
        (dq, dk, dv, dlogits), dgate, y if rebuild else None, sums,
    )  # fmt: skip
    tokens = dlogits.view(-1, dlogits.shape[2] * dlogits.shape[3])
    with without_autocast(projected.device):
        torch.mm(tokens, decay_weight.to(tokens.dtype), out=as_rows(gradient)[:, -rank:])
        with on_side_stream(tokens, projected):
            dweight = weight_gradient(tokens, as_rows(projected)[:, -rank:])
    return gradient, dweight, dbias, dnorm, y


def _rebuilt(projected: Tensor, norm_weight: Tensor, heads: int, rebuild: bool) -> Tensor:
    width = heads * norm_weight.shape[0] if rebuild else 0
    return torch.empty(*projected.shape[:2], width, dtype=projected.dtype, device=projected.device)


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
