"""One DiG block on this project's kernels, tokens in raster order: a forward and a backward pass written out.

Autograd would keep what each operation read and add gradients up in passes of their own. Here a block keeps five
tensors a token (its input, the fused projection, the sum between its halves, SwiGLU's input, the second half's output)
and the recurrence's states. What else its weights' gradients need is written again by kernels that pass over the inputs
anyway: the modulated inputs of both halves by the norms' backward pass, SwiGLU's and the mixer's outputs by theirs.

**One image.** A gate is then the same for all tokens, and ``gate ⊙ (W x)`` is ``(diag(gate) W) x``. With d the gradient
of the sum that the branch is added to, ``P = d^T x`` gives ``dW = diag(gate) P`` and ``dgate_i = sum_j W_ij P_ij``: no
gradient of the branch is ever formed. Without gradients, the product adds to x in place.

Shapes: B batch, T tokens, D width, F inner width of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from dig.ops.adaln.fused import norm_modulate_backward, norm_modulate_forward, residual_norm_modulate_forward
from dig.ops.gla.mixer import mixer_backward, mixer_forward, order_code
from dig.ops.linear import as_rows, weight_gradient
from dig.ops.srem.fused import srem_backward, srem_forward
from dig.ops.swiglu.fused import swiglu_backward, swiglu_forward
from dig.ops.weights import gated_weight_gradient, prepare_weights
from dig.scan import ScanOrder

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """A block's parameters, in the order in which `RasterBlock` takes them; None where a variant has none.

    Attributes:
        in_proj: (3D + R, D).
        decay_weight: (D/2, R).
        gate_proj: (2F, D).
        o_proj: (D, D).
        down_proj: (D, F).
        decay_bias: (D/2,).
        head_norm: (D/H,).
        norm1: (D,) or None.
        norm2: (D,) or None.
        conv_weight: (D, 1, 3, 3) or None.
        conv_bias: (D,) or None.
    """

    in_proj: Tensor
    decay_weight: Tensor
    gate_proj: Tensor
    o_proj: Tensor
    down_proj: Tensor
    decay_bias: Tensor
    head_norm: Tensor
    norm1: Tensor | None
    norm2: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None

    def in_order(self) -> tuple[Tensor | None, ...]:
        """The fields' values."""
        return tuple(getattr(self, field.name) for field in fields(self))


def _cast(weights: Sequence[Tensor], gates: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`prepare_weights`, of those that aren't there already as they have to be."""
    ungated = len(weights) - len(gates)
    todo = [i for i, weight in enumerate(weights) if i >= ungated or weight.dtype != dtype]
    done = list(weights)
    if todo:
        for i, copy in zip(todo, prepare_weights([weights[i] for i in todo], list(gates), dtype), strict=True):
            done[i] = copy
    return done


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, M) times (N, M) transposed: (B, T, N)."""
    return torch.mm(as_rows(x), weight.T).view(*x.shape[:-1], weight.shape[0])


def _linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """(B, T, N) times (N, M): the gradient of `_linear`'s x."""
    return torch.mm(as_rows(dy), weight).view(*dy.shape[:-1], weight.shape[1])


def _gated_gradients(d: Tensor, x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gate (1, N) of ``gate ⊙ (weight x)`` of one image, from its gradient d."""
    dweight, dgate = gated_weight_gradient(weight_gradient(as_rows(d), as_rows(x)), weight, gate[0])
    return dweight, dgate.unsqueeze(0)


class RasterBlock(torch.autograd.Function):
    """`dig.model.DiGBlock` in raster order.

    Arguments: x (B, T, D) in the dtype of the products; the modulation (B, 6D); norm (``rms`` or ``layer``), heads,
    (rows, columns) of the grid, the scan order; then the weights as in `BlockWeights`.
    Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        modulation: Tensor,
        norm: str,
        heads: int,
        grid: tuple[int, int],
        order: ScanOrder,
        *weights: Tensor | None,
    ) -> Tensor:
        """(B, T, D) in x's dtype."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        *masters, decay_bias, head_norm, norm1, norm2, conv_weight, conv_bias = weights
        in_proj, decay_weight, gate_proj, o_proj, down_proj = _cast(cast(list[Tensor], masters), (), x.dtype)
        h, stats1 = norm_modulate_forward(x, shift1, scale1, norm1, norm, EPS, x.dtype)
        projected = _linear(h, in_proj)
        y, states = mixer_forward(projected, decay_weight, decay_bias, head_norm, heads, *grid, order_code(order), EPS)
        branch1 = _linear(y, o_proj)
        x1, h, stats2 = residual_norm_modulate_forward(x, branch1, gate1, shift2, scale2, norm2, norm, EPS, x.dtype)
        gate_up = _linear(h, gate_proj)
        branch2 = _linear(swiglu_forward(gate_up), down_proj)
        if conv_weight is None or conv_bias is None:
            out = torch.addcmul(x1, gate2.unsqueeze(1).to(x.dtype), branch2)
        else:
            out = srem_forward(x1, branch2, gate2, conv_weight, conv_bias, *grid, *order)
        # With one image, nothing asks for the first branch again. Weights are cast again, in a launch that is there for
        # the gates anyway: their copies would take half as much as the weights.
        kept = None if len(x) == 1 else branch1
        ctx.save_for_backward(x, projected, states, x1, gate_up, branch2, stats1, stats2, modulation, kept, *weights)
        ctx.settings = norm, heads, grid, order
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of everything that is a tensor."""
        (
            x, projected, states, x1, gate_up, branch2, stats1, stats2, modulation, branch1,
            *masters, decay_bias, head_norm, norm1, norm2, conv_weight, conv_bias,
        ) = ctx.saved_tensors  # fmt: skip
        norm, heads, grid, order = ctx.settings
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        one_image = len(x) == 1
        *_, o_master, down_master = masters
        dout = dout.contiguous()
        in_proj, decay_weight, gate_proj, o_proj, down_proj = _cast(
            masters, (gate1[0], gate2[0]) if one_image else (), x.dtype
        )

        # d is the gradient of x1 plus the gated branch, and of x1; d_branch that of the branch, or with one image d,
        # its gate being in the weight.
        if conv_weight is None:
            d, dconv_weight, dconv_bias = dout, None, None
            if not one_image:
                d_branch = dout * gate2.unsqueeze(1).to(x.dtype)
                dgate2 = (dout.float() * branch2.float()).sum(1).to(gate2.dtype)
        else:
            d, d_branch, dgate2, dconv_weight, dconv_bias = srem_backward(
                x1, branch2, gate2, conv_weight, conv_bias, dout, *grid, *order, one_image
            )
        d_branch = d if one_image else d_branch
        dgate_up, hidden = swiglu_backward(gate_up, _linear_backward(d_branch, down_proj), True)
        if one_image:
            ddown, dgate2 = _gated_gradients(d, hidden, down_master, gate2)
        else:
            ddown = weight_gradient(as_rows(d_branch), as_rows(hidden))
        del hidden, d_branch
        dh = _linear_backward(dgate_up, gate_proj)
        d, d_branch, dgate1, dshift2, dscale2, dnorm2, h = norm_modulate_backward(
            x1, branch1, None if one_image else gate1, shift2, scale2, norm2, stats2, d, dh, norm
        )
        dgate_proj = weight_gradient(as_rows(dgate_up), as_rows(h))
        del dgate_up, dh, h
        d_branch = d if one_image else d_branch
        dprojected, ddecay_weight, ddecay_bias, dhead_norm, y = mixer_backward(
            projected, decay_weight, decay_bias, head_norm, states, _linear_backward(d_branch, o_proj), heads, *grid,
            order_code(order), EPS, True,
        )  # fmt: skip
        if one_image:
            do_proj, dgate1 = _gated_gradients(d, y, o_master, gate1)
        else:
            do_proj = weight_gradient(as_rows(d_branch), as_rows(y))
        del y, d_branch
        dx, _, _, dshift1, dscale1, dnorm1, h = norm_modulate_backward(
            x, None, None, shift1, scale1, norm1, stats1, d, _linear_backward(dprojected, in_proj), norm
        )
        din_proj = weight_gradient(as_rows(dprojected), as_rows(h))
        dmodulation = torch.cat([dshift1, dscale1, dgate1, dshift2, dscale2, dgate2], dim=1)
        gradients = (din_proj, ddecay_weight, dgate_proj, do_proj, ddown)
        dnorms = (None if norm1 is None else dnorm1, None if norm2 is None else dnorm2)
        return (
            dx, dmodulation, None, None, None, None, *(g.to(w.dtype) for g, w in zip(gradients, masters, strict=True)),
            ddecay_bias, dhead_norm, *dnorms, dconv_weight, dconv_bias,
        )  # fmt: skip


def train_block(
    x: Tensor,
    modulation: Tensor,
    weights: BlockWeights,
    *,
    norm: str,
    heads: int,
    grid: tuple[int, int],
    order: ScanOrder,
) -> Tensor:
    """`RasterBlock` by names.

    Returns:
        (B, T, D) in x's dtype.
    """
    out: Tensor = RasterBlock.apply(x, modulation, norm, heads, grid, order, *weights.in_order())
    return out


def infer_block(
    x: Tensor,
    modulation: Tensor,
    weights: BlockWeights,
    *,
    norm: str,
    heads: int,
    grid: tuple[int, int],
    order: ScanOrder,
) -> Tensor:
    """The forward pass alone, for use without gradients; arguments as `train_block`, and **x is overwritten**."""
    if len(x) > 1:
        return train_block(x, modulation, weights, norm=norm, heads=heads, grid=grid, order=order)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    w = weights
    in_proj, decay_weight, gate_proj, o_proj, down_proj = _cast(
        (w.in_proj, w.decay_weight, w.gate_proj, w.o_proj, w.down_proj), (gate1[0], gate2[0]), x.dtype
    )
    h, _ = norm_modulate_forward(x, shift1, scale1, w.norm1, norm, EPS, x.dtype)
    projected = _linear(h, in_proj)
    y, _ = mixer_forward(projected, decay_weight, w.decay_bias, w.head_norm, heads, *grid, order_code(order), EPS)
    x[0].addmm_(y[0], o_proj.T)
    h, _ = norm_modulate_forward(x, shift2, scale2, w.norm2, norm, EPS, x.dtype)
    gate_up = _linear(h, gate_proj)
    x[0].addmm_(swiglu_forward(gate_up)[0], down_proj.T)
    if w.conv_weight is None or w.conv_bias is None:
        return x
    return srem_forward(x, None, None, w.conv_weight, w.conv_bias, *grid, *order)
