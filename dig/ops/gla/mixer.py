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
from torch.nn import functional as F

from dig.ops.gla.projection import GATE_NORMALIZER, split_projection
from dig.ops.gla.tiled import Plan, check_qkv, plan_of, run_block, run_block_backward
from dig.scan import ScanOrder


def _order_code(order: ScanOrder) -> int:
    """As `dig.ops.gla.kernels.scan_tokens` reads it."""
    return int(order.reversed) + 2 * int(order.transposed)


def _prepare(
    projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, heads: int, rows: int, columns: int, order: int
) -> tuple[Plan, tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The launch plan, (q, k, v, gate logits), the output gate, and the low-rank factor."""
    q, k, v, gate, low = split_projection(projected, heads, decay_weight.shape[1])
    # A product of rank 16: computing the logits again in the backward pass is cheaper than keeping them.
    logits = F.linear(low, decay_weight, decay_bias).unflatten(-1, (heads, -1))
    plan = plan_of(q, v, q.shape[-1] ** -0.5, GATE_NORMALIZER, (rows, columns), order)
    return plan, (q, k, v, logits), gate, low


@torch.library.custom_op("dig::gla_mixer", mutates_args=())
def _mixer(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
) -> Tensor:
    with torch.autocast(projected.device.type, enabled=False):
        plan, inputs, gate, _ = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
        return run_block(plan, *inputs, gate, norm_weight, eps).flatten(2)


@torch.library.custom_op("dig::gla_mixer_backward", mutates_args=())
def _mixer_backward(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    dy: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(projected.device.type, enabled=False):
        plan, inputs, gate, low = _prepare(projected, decay_weight, decay_bias, heads, rows, columns, order)
        gradient = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
        dq, dk, dv, dgate, dlow = split_projection(gradient, heads, decay_weight.shape[1])
        dlogits = torch.empty_like(inputs[3])
        dnorm = run_block_backward(
            plan,
            inputs,
            gate,
            norm_weight,
            dy.unflatten(-1, (heads, -1)),
            eps,
            (dq, dk, dv, dlogits),
            dgate,
        )
        tokens = dlogits.flatten(2).flatten(0, 1)
        dlow.copy_((tokens @ decay_weight).view_as(dlow))
        dweight = tokens.T @ low.reshape(len(tokens), -1)
        dbias = tokens.sum(0, dtype=torch.float32).to(decay_bias.dtype)
    return gradient, dweight, dbias, dnorm


@_mixer.register_fake
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
) -> Tensor:
    return projected.new_empty(*projected.shape[:2], heads * norm_weight.shape[0])


@_mixer_backward.register_fake
def _(
    projected: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    norm_weight: Tensor,
    dy: Tensor,
    heads: int,
    rows: int,
    columns: int,
    order: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        projected.new_empty(projected.shape),
        torch.empty_like(decay_weight),
        torch.empty_like(decay_bias),
        torch.empty_like(norm_weight),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_mixer_backward(*ctx.saved_tensors, dy, *ctx.numbers), None, None, None, None, None


_mixer.register_autograd(_autograd, setup_context=_setup)


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
        decay_weight: (D/2, R), second factor of the decay gate, in projected's dtype. As to very strong decay, see
            `dig.ops.gla.tiled.gla_block`.
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
        if tensor.dtype != projected.dtype or tensor.device != projected.device:
            raise ValueError(
                f"{name} must be {projected.dtype} on {projected.device}, as projected is; it is {tensor.dtype} on "
                f"{tensor.device}"
            )
    q, k, v, _, _ = split_projection(projected, heads, rank)
    check_qkv(q, k, v)
    if norm_weight.dtype not in (torch.float32, projected.dtype) or norm_weight.device != projected.device:
        raise ValueError(
            f"norm_weight must be fp32 or {projected.dtype} on {projected.device}; it is {norm_weight.dtype} on "
            f"{norm_weight.device}"
        )
    code = _order_code(order)
    return _mixer(projected, decay_weight, decay_bias, norm_weight, heads, *grid, code, eps)
