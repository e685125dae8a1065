"""The passes of a DiG block that trains, on this project's kernels and tokens in raster order, written out.

Autograd would keep what each operation read and add gradients up in passes of their own. Here a block keeps five
tensors a token (its input, the fused projection, the sum between its halves, SwiGLU's input, the second half's output)
and the recurrence's states. What else its weights' gradients need is written again by kernels that pass over the inputs
anyway: the modulated inputs of both halves by the norms' backward pass, SwiGLU's and the mixer's outputs by theirs.

What no later kernel of the pass waits for goes to a side stream (`dig.ops.side_stream`): the weights' gradients, the
modulation's, and in `dig.raster` the next block's modulation and weights.

**One image.** A gate is then the same for all tokens, and ``gate ⊙ (W x)`` is ``(diag(gate) W) x``. With d the gradient
of the sum that the branch is added to, ``P = d^T x`` gives ``dW = diag(gate) P`` and ``dgate_i = sum_j W_ij P_ij``: no
gradient of the branch is ever formed. Without gradients, the product adds to x in place.

Shapes: B batch, T tokens, D width, F inner width of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dig.ops.linear import as_rows, weight_gradient
from dig.ops.side_stream import Part, let_go, mark, on_side_stream, wait
from dig.raster_operations import Steps, grouped, is_direct, large_places, linear, linear_backward, steps_for
from dig.raster_plan import GATE1, GATE2, BlockPlan
from dig.raster_weights import BlockWeights, Products, Settings


class Kept(NamedTuple):
    """What a block keeps for its backward pass beside its parameters; shapes as of the operations it comes from.

    Attributes:
        x: Its input.
        projected: q, k, v, output gate and the decay gate's first factor.
        states: The recurrence's, before each chunk.
        x1: The sum between the halves.
        gate_up: SwiGLU's input.
        branch1: The first half's output; None with one image.
        branch2: The second half's.
        stats1: Statistics of the first norm.
        stats2: Of the second.
        modulation: adaLN's output.
        c: The condition after its SiLU.
    """

    x: Tensor
    projected: Tensor
    states: Tensor
    x1: Tensor
    gate_up: Tensor
    branch1: Tensor | None
    branch2: Tensor
    stats1: Tensor
    stats2: Tensor
    modulation: Tensor
    c: Tensor


_KEPT = len(Kept._fields)


def forward_pass(
    x: Tensor,
    c: Tensor,
    modulation: Tensor,
    p: Products,
    w: BlockWeights,
    settings: Settings,
    steps: Steps | None = None,
) -> tuple[Tensor, Kept]:
    """The forward pass of a block that trains, and what its backward pass needs beside the parameters.

    Args:
        x: (B, T, D) in raster order, in the dtype of the products.
        c: (B, D), the condition after its SiLU.
        modulation: (B, 6D), adaLN's output.
        p: The weights of the products in x's dtype, no gates folded in.
        w: The block's parameters.
        settings: Its settings.
        steps: Those of `steps_for`, where they have been asked for already.

    Returns:
        (B, T, D) in x's dtype; and `Kept`, which holds x, c and the modulation as they are.
    """
    ops = steps_for(x, c, modulation, w, settings) if steps is None else steps
    h, stats1 = ops.norm1(x, modulation, w.norm1)
    projected = linear(h, p.in_proj)
    y, states = ops.mixer(projected, p.decay_weight, w.decay_bias, w.head_norm)
    branch1 = linear(y, p.o_proj)
    x1, h, stats2 = ops.norm2(x, branch1, modulation, w.norm2)
    hidden, gate_up = ops.up(h, p.gate_proj)
    branch2 = linear(hidden, p.down_proj)
    del hidden
    if w.conv_weight is None or w.conv_bias is None:
        out = torch.addcmul(x1, ops.gate(GATE2, modulation).unsqueeze(1).to(x.dtype), branch2)
    else:
        out = ops.end(x1, branch2, modulation, w.conv_weight, w.conv_bias)
    # With one image, nothing asks for the first branch again. Weights are cast again, in a launch that is there for the
    # gates anyway: their copies would take half as much as the weights.
    return out, Kept(
        x=x,
        projected=projected,
        states=states,
        x1=x1,
        gate_up=gate_up,
        branch1=None if x.shape[0] == 1 else branch1,
        branch2=branch2,
        stats1=stats1,
        stats2=stats2,
        modulation=modulation,
        c=c,
    )


def backward_pass(
    saved: Callable[[], Sequence[Tensor | None]],
    dout: Tensor,
    settings: Settings,
    needed: BlockWeights,
    *,
    condition: bool,
    part: Part | None,
    plan: BlockPlan | None = None,
) -> tuple[Tensor, Tensor | None, BlockWeights]:
    """The backward pass of `forward_pass`.

    Args:
        saved: Gives `Kept` and then `BlockWeights`, field by field, and holds none of them any longer where nobody else
            asks for them: each tensor can then go when the last kernel that reads it has been launched.
        dout: (B, T, D), contiguous.
        settings: The block's.
        needed: Whether a parameter's gradient is asked for, by its name.
        condition: Whether c's is.
        part: Of the side work that runs on into the next block; None where it ends with this one.
        plan: The forward pass's, if it had one and it is known here.

    Returns:
        Gradients of x, of c, and of the parameters. What is not asked for may be None.
    """
    tensors = saved()
    w = BlockWeights._make(tensors[_KEPT:])
    x, projected, states, x1, gate_up, branch1, branch2, stats1, stats2, modulation, c = Kept._make(tensors[:_KEPT])
    del tensors
    one_image = x.shape[0] == 1
    read = projected, states, x1, gate_up, branch1, branch2, dout
    ops = steps_for(x, c, modulation, w, settings, read, known=plan)
    del read
    direct = is_direct(ops)
    # Nothing else may hold these: autograd copies a gradient that somebody has, and then nothing is saved.
    places = large_places(direct, x, part)
    together = grouped(
        direct, x, (w.down_proj, w.gate_proj, w.o_proj, w.in_proj),
        (needed.down_proj, needed.gate_proj, needed.o_proj, needed.in_proj),
    )  # fmt: skip
    pairs: list[tuple[Tensor, Tensor]] = []
    dmodulation = ops.room(modulation)
    with on_side_stream(ahead=True):
        p = ops.cast(w, modulation)
    weights_ready = mark(ahead=True)
    with on_side_stream(projected, ahead=True):
        # Of the recurrence's backward pass the first kernel waits for no gradient.
        sums = ops.mixer_sums(projected, p.decay_weight, w.decay_bias)
    sums_ready = mark(ahead=True)

    # d is the gradient of x1 and of x1 plus the gated branch. d_branch is that of the branch; with one image it is d,
    # because the gate is in the weight.
    dconv_weight = dconv_bias = dgate2 = None
    if w.conv_weight is None or w.conv_bias is None:
        d = dout
        if not one_image:
            gate2 = ops.gate(GATE2, modulation)
            d_branch = dout * gate2.unsqueeze(1).to(x.dtype)
            dgate2 = (dout.float() * branch2.float()).sum(1).to(gate2.dtype)
    else:
        d, d_branch, dgate2, dconv_weight, dconv_bias = ops.end_backward(
            x1, branch2, modulation, w.conv_weight, w.conv_bias, dout
        )
    d_branch = d if one_image else d_branch
    del branch2
    wait(weights_ready)
    dgate_up, hidden = ops.down_backward(d_branch, p.down_proj, gate_up)
    del gate_up
    ddown = do_proj = dgate_proj = din_proj = None
    if together is not None:
        pairs.append((d_branch, hidden))
    else:
        with on_side_stream(d_branch, hidden):
            if one_image:
                product = weight_gradient(as_rows(d), as_rows(hidden))
                ddown, dgate2 = ops.gated(GATE2, product, w.down_proj, modulation, dmodulation)
                del product
            elif needed.down_proj:
                ddown = weight_gradient(as_rows(d_branch), as_rows(hidden), w.down_proj.dtype, places.down_proj)
    del hidden, d_branch
    dh = linear_backward(dgate_up, p.gate_proj)
    d, d_branch, dgate1, dshift2, dscale2, dnorm2, h = ops.norm2_backward(
        x1, branch1, modulation, w.norm2, stats2, d, dh, dmodulation
    )
    if together is not None:
        pairs.append((dgate_up, h))
    elif needed.gate_proj:
        with on_side_stream(dgate_up, h):
            dgate_proj = weight_gradient(as_rows(dgate_up), as_rows(h), w.gate_proj.dtype, places.gate_proj)
    second_half = mark()
    del dgate_up, dh, h, x1, branch1
    d_branch = d if one_image else d_branch
    wait(sums_ready)
    if part is not None:
        part.catch_up()
    dprojected, ddecay_weight, ddecay_bias, dhead_norm, y = ops.mixer_backward(
        projected, p.decay_weight, w.decay_bias, w.head_norm, states, sums, linear_backward(d_branch, p.o_proj)
    )
    del projected, states, sums
    if together is not None:
        pairs.append((d_branch, y))
    else:
        with on_side_stream(d_branch, y):
            if one_image:
                product = weight_gradient(as_rows(d), as_rows(y))
                do_proj, dgate1 = ops.gated(GATE1, product, w.o_proj, modulation, dmodulation)
                del product
            elif needed.o_proj:
                do_proj = weight_gradient(as_rows(d_branch), as_rows(y), w.o_proj.dtype, places.o_proj)
    del y, d_branch
    dx, dshift1, dscale1, dnorm1, h = ops.norm1_backward(
        x, modulation, w.norm1, stats1, d, linear_backward(dprojected, p.in_proj), dmodulation
    )
    if together is not None:
        pairs.append((dprojected, h))
        with on_side_stream(*(tensor for pair in pairs for tensor in pair)):
            into = places.down_proj, places.gate_proj, places.o_proj, places.in_proj
            ddown, dgate_proj, do_proj, din_proj = together(pairs, places=into)
            if one_image:
                ddown, dgate2 = ops.gated(GATE2, ddown, w.down_proj, modulation, dmodulation)
                do_proj, dgate1 = ops.gated(GATE1, do_proj, w.o_proj, modulation, dmodulation)
        pairs.clear()
    dc = dadaln_weight = dadaln_bias = None
    if condition or needed.adaln_weight or needed.adaln_bias:
        parts = [dshift1, dscale1, dgate1, dshift2, dscale2, dgate2]
        with on_side_stream(*parts, dmodulation, c):
            dmodulation = torch.cat(parts, dim=1) if dmodulation is None else dmodulation
            dc, dadaln_weight, dadaln_bias = ops.adaln_backward(dmodulation, c, w.adaln_weight, places.adaln_weight)
    if together is None and needed.in_proj:
        # Beside the next block, where its side work runs on into that; else nothing is left that it could run beside.
        with nullcontext() if part is None else on_side_stream(dprojected, h):
            din_proj = weight_gradient(as_rows(dprojected), as_rows(h), w.in_proj.dtype, places.in_proj)
    # Done by now; the most of what is held.
    let_go(second_half)
    gradients = BlockWeights(
        in_proj=_as(din_proj, w.in_proj),
        decay_weight=_as(ddecay_weight, w.decay_weight),
        gate_proj=_as(dgate_proj, w.gate_proj),
        o_proj=_as(do_proj, w.o_proj),
        down_proj=_as(ddown, w.down_proj),
        decay_bias=ddecay_bias,
        head_norm=dhead_norm,
        norm1=None if w.norm1 is None else dnorm1,
        norm2=None if w.norm2 is None else dnorm2,
        conv_weight=dconv_weight,
        conv_bias=dconv_bias,
        adaln_weight=dadaln_weight,  # type: ignore[arg-type]
        adaln_bias=dadaln_bias,  # type: ignore[arg-type]
    )
    return dx, dc, gradients


def _as(gradient: Tensor | None, weight: Tensor) -> Any:
    """A gradient in its weight's dtype; a BlockWeights of gradients has None for those that weren't asked for."""
    return gradient if gradient is None or gradient.dtype == weight.dtype else gradient.to(weight.dtype)
