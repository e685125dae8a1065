"""One DiG block on this project's kernels, tokens in raster order: a forward and a backward pass written out.

Autograd would keep what each operation read and add gradients up in passes of their own. Here a block keeps five
tensors a token (its input, the fused projection, the sum between its halves, SwiGLU's input, the second half's output)
and the recurrence's states. What else its weights' gradients need is written again by kernels that pass over the inputs
anyway: the modulated inputs of both halves by the norms' backward pass, SwiGLU's and the mixer's outputs by theirs.

What no later kernel of the pass waits for goes aside (`dig.ops.aside`): the weights' gradients, the modulation's, and
in `dig.raster` the next block's modulation and weights.

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
from torch.nn import functional as F

from dig.ops.adaln.fused import norm_modulate_backward, norm_modulate_forward, residual_norm_modulate_forward
from dig.ops.aside import aside, mark, side_work, wait
from dig.ops.gla.mixer import mixer_backward, mixer_forward, mixer_sums, order_code
from dig.ops.linear import as_rows, weight_gradient
from dig.ops.srem.fused import srem_backward, srem_forward
from dig.ops.swiglu.products import project_down_backward, project_up, project_up_preparing, rides
from dig.ops.weights import gated_weight_gradient, matrix_vector, matrix_vectors, prepare_weights
from dig.scan import ScanOrder

EPS = 1e-6
PREPARED = 6
"""Tensors of a `Prepared`."""
HALVED_TOKENS = 4096
"""A wide model's projection of q, k, v and gates takes half of the rows at a time, where they are at most so many.

Before a product of many tiles cuBLAS clears a counter of them, by a memset that holds a CUDA graph up for 6.5 µs. The
halves of 4096 rows take none and as long as the whole (D = 1152, an H100): 1.8% of DiG-XL's forward pass. At 16,384
rows the whole is faster.
"""


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
        adaln_weight: (6D, D).
        adaln_bias: (6D,).
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
    adaln_weight: Tensor
    adaln_bias: Tensor

    def in_order(self) -> tuple[Tensor | None, ...]:
        """The fields' values."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def masters(self) -> tuple[Tensor, ...]:
        """The weights of the products, those that take a gate last: the first five fields."""
        return self.in_proj, self.decay_weight, self.gate_proj, self.o_proj, self.down_proj


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a block takes from its weights and the condition, none of it from the tokens.

    Attributes:
        modulation: (B, 6D), adaLN's output.
        products: The weights of the products in the tokens' dtype: the first five of `BlockWeights`; None for those
            that are in it anyway.
    """

    modulation: Tensor
    products: tuple[Tensor | None, ...]

    def or_masters(self, weights: BlockWeights) -> tuple[Tensor, ...]:
        """The weights of the products, whichever way."""
        return _or_masters(self.products, weights.in_order())


def _or_masters(products: Sequence[Tensor | None], masters: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    pairs = zip(products, masters, strict=False)
    return tuple(cast(Tensor, master if product is None else product) for product, master in pairs)


class Rider:
    """The weights of a block that are prepared in the one before, by its product upwards: `project_up_preparing`.

    Args:
        weights: The later block's.
        modulation: The later block's (1, 6D), which has the gates that go into its weights.
    """

    def __init__(self, weights: BlockWeights, modulation: Tensor) -> None:
        self._weights, self._modulation = weights, modulation
        self.prepared: Prepared | None = None

    @staticmethod
    def fits(weights: BlockWeights, h: Tensor) -> bool:
        """Whether such weights ride in the product upwards of tokens like h (B, T, D)."""
        return rides(h, weights.down_proj.shape[1], weights.masters, 2)

    def project_up(self, h: Tensor, weight: Tensor) -> Tensor:
        """SwiGLU's result (B, T, F) from h (B, T, D) and the earlier block's weight (2F, D); fills in ``prepared``."""
        _, _, gate1, _, _, gate2 = self._modulation.chunk(6, dim=1)
        hidden, *copies = project_up_preparing(h, weight, self._weights.masters, [gate1[0], gate2[0]])
        self.prepared = Prepared(modulation=self._modulation, products=tuple(copies))
        return hidden


def modulation_of(weights: BlockWeights, c: Tensor, programs: int | None = None) -> Tensor:
    """A block's modulation (B, 6D) without a gradient; c and programs as of `prepare_block`."""
    with torch.no_grad():
        if len(c) == 1:
            return matrix_vector(weights.adaln_weight, c[0], weights.adaln_bias, programs).unsqueeze(0)
        return adaln(c, weights.adaln_weight, weights.adaln_bias)


def modulations_of(weights: Sequence[BlockWeights], c: Tensor) -> Tensor:
    """The modulations (L, 6D) of L blocks for one image, c (1, D), without a gradient: in one launch."""
    with torch.no_grad():
        return matrix_vectors([w.adaln_weight for w in weights], c[0], [w.adaln_bias for w in weights])


def prepare_block(
    weights: BlockWeights,
    c: Tensor,
    dtype: torch.dtype,
    *,
    fold_gates: bool,
    programs: int | None = None,
    modulation: Tensor | None = None,
) -> Prepared:
    """Compute a block's modulation, and its weights in the dtype of its products; without a gradient.

    Args:
        weights: The block's.
        c: (B, D), the condition after its SiLU.
        dtype: Of the products.
        fold_gates: Whether the two output projections are multiplied by their gates, which takes B = 1.
        programs: At most so many of each kernel, so that others can run beside it; all at once without.
        modulation: (B, 6D), where it is there already.
    """
    modulation = modulation_of(weights, c, programs) if modulation is None else modulation
    masters = weights.masters
    _, _, gate1, _, _, gate2 = modulation.chunk(6, dim=1)
    with torch.no_grad():
        cast_weights = _cast(masters, (gate1[0], gate2[0]) if fold_gates else (), dtype, programs)
    products = (None if copy is master else copy for copy, master in zip(cast_weights, masters, strict=True))
    return Prepared(modulation=modulation, products=tuple(products))


def adaln(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An adaLN layer in its weights' own dtype, whatever autocast says: c (B, D) after its SiLU to (B, N D).

    One product of a vector and a matrix: reading the matrix is all the work, and a copy of it in another dtype would
    take as long again.
    """
    with torch.autocast(c.device.type, enabled=False):
        return F.linear(c.to(weight.dtype), weight, bias)


def _adaln_backward(dmodulation: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of c, weight and bias of `adaln`."""
    with torch.autocast(c.device.type, enabled=False):
        dmodulation = dmodulation.to(weight.dtype)
        dweight = torch.mm(dmodulation.T, c.to(weight.dtype))
        return torch.mm(dmodulation, weight).to(c.dtype), dweight, dmodulation.sum(0)


def _cast(
    weights: Sequence[Tensor], gates: Sequence[Tensor], dtype: torch.dtype, programs: int | None = None
) -> list[Tensor]:
    """`prepare_weights`, of those that aren't there already as they have to be."""
    ungated = len(weights) - len(gates)
    todo = [i for i, weight in enumerate(weights) if i >= ungated or weight.dtype != dtype]
    done = list(weights)
    if todo:
        copies = prepare_weights([weights[i] for i in todo], list(gates), dtype, programs)
        for i, copy in zip(todo, copies, strict=True):
            done[i] = copy
    return done


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, M) times (N, M) transposed: (B, T, N)."""
    return torch.mm(as_rows(x), weight.T).view(*x.shape[:-1], weight.shape[0])


def _linear_in_halves(x: Tensor, weight: Tensor) -> Tensor:
    """`_linear`, half of the rows at a time: see `HALVED_TOKENS`."""
    rows = as_rows(x)
    out, half = rows.new_empty(len(rows), len(weight)), len(rows) // 2
    for part in (slice(half), slice(half, None)):
        torch.mm(rows[part], weight.T, out=out[part])
    return out.view(*x.shape[:-1], len(weight))


def _linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """(B, T, N) times (N, M): the gradient of `_linear`'s x."""
    return torch.mm(as_rows(dy), weight).view(*dy.shape[:-1], weight.shape[1])


def _gated_gradients(d: Tensor, x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gate (1, N) of ``gate ⊙ (weight x)`` of one image, from its gradient d."""
    dweight, dgate = gated_weight_gradient(weight_gradient(as_rows(d), as_rows(x)), weight, gate[0])
    return dweight, dgate.unsqueeze(0)


class RasterBlock(torch.autograd.Function):
    """`dig.model.DiGBlock` in raster order.

    Arguments: x (B, T, D) in the dtype of the products; the condition after its SiLU, c (B, D); norm (``rms`` or
    ``layer``), heads, (rows, columns) of the grid, the scan order; then modulation and products as in `Prepared`, of
    which nothing is differentiated, and the weights as in `BlockWeights`.
    Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        c: Tensor,
        norm: str,
        heads: int,
        grid: tuple[int, int],
        order: ScanOrder,
        *tensors: Tensor | None,
    ) -> Tensor:
        """(B, T, D) in x's dtype."""
        modulation, weights = cast(Tensor, tensors[0]), tensors[PREPARED:]
        in_proj, decay_weight, gate_proj, o_proj, down_proj = _or_masters(tensors[1:PREPARED], weights)
        decay_bias, head_norm, norm1, norm2, conv_weight, conv_bias = weights[5:-2]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        h, stats1 = norm_modulate_forward(x, shift1, scale1, norm1, norm, EPS, x.dtype)
        projected = _linear(h, in_proj)
        y, states = mixer_forward(projected, decay_weight, decay_bias, head_norm, heads, *grid, order_code(order), EPS)
        branch1 = _linear(y, o_proj)
        x1, h, stats2 = residual_norm_modulate_forward(x, branch1, gate1, shift2, scale2, norm2, norm, EPS, x.dtype)
        hidden, gate_up = project_up(h, gate_proj, True)
        branch2 = _linear(hidden, down_proj)
        del hidden
        if conv_weight is None or conv_bias is None:
            out = torch.addcmul(x1, gate2.unsqueeze(1).to(x.dtype), branch2)
        else:
            out = srem_forward(x1, branch2, gate2, conv_weight, conv_bias, *grid, *order)
        # With one image, nothing asks for the first branch again. Weights are cast again, in a launch that is there for
        # the gates anyway: their copies would take half as much as the weights.
        kept = None if len(x) == 1 else branch1
        ctx.save_for_backward(x, projected, states, x1, gate_up, branch2, stats1, stats2, modulation, kept, c, *weights)
        ctx.settings = norm, heads, grid, order
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of everything that is a tensor, but of what was prepared."""
        with side_work(dout.device):
            return _backward(ctx, dout.contiguous())


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (
        x, projected, states, x1, gate_up, branch2, stats1, stats2, modulation, branch1, c,
        *masters, decay_bias, head_norm, norm1, norm2, conv_weight, conv_bias, adaln_weight, _,
    ) = ctx.saved_tensors  # fmt: skip
    if not torch.compiler.is_compiling():
        # Unless the graph is kept, each tensor can go when the last kernel that reads it has been launched.
        ctx.maybe_clear_saved_tensors()
    norm, heads, grid, order = ctx.settings
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    one_image = len(x) == 1
    *_, o_master, down_master = masters
    with aside():
        in_proj, decay_weight, gate_proj, o_proj, down_proj = _cast(
            masters, (gate1[0], gate2[0]) if one_image else (), x.dtype
        )
    weights_ready = mark()
    with aside(projected):
        # Of the recurrence's backward pass the first kernel waits for no gradient.
        sums = mixer_sums(projected, decay_weight, decay_bias, heads, *grid, order_code(order))
    sums_ready = mark()

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
    del branch2
    wait(weights_ready)
    dgate_up, hidden = project_down_backward(d_branch, down_proj, gate_up)
    del gate_up
    with aside(d_branch, hidden):
        if one_image:
            ddown, dgate2 = _gated_gradients(d, hidden, down_master, gate2)
        else:
            ddown = weight_gradient(as_rows(d_branch), as_rows(hidden))
    del hidden, d_branch
    dh = _linear_backward(dgate_up, gate_proj)
    d, d_branch, dgate1, dshift2, dscale2, dnorm2, h = norm_modulate_backward(
        x1, branch1, None if one_image else gate1, shift2, scale2, norm2, stats2, d, dh, norm
    )
    with aside(dgate_up, h):
        dgate_proj = weight_gradient(as_rows(dgate_up), as_rows(h))
    del dgate_up, dh, h, x1, branch1
    d_branch = d if one_image else d_branch
    wait(sums_ready)
    dprojected, ddecay_weight, ddecay_bias, dhead_norm, y = mixer_backward(
        projected, decay_weight, decay_bias, head_norm, states, sums, _linear_backward(d_branch, o_proj), heads, *grid,
        order_code(order), EPS, True,
    )  # fmt: skip
    del projected, states, sums
    with aside(d_branch, y):
        if one_image:
            do_proj, dgate1 = _gated_gradients(d, y, o_master, gate1)
        else:
            do_proj = weight_gradient(as_rows(d_branch), as_rows(y))
    del y, d_branch
    dx, _, _, dshift1, dscale1, dnorm1, h = norm_modulate_backward(
        x, None, None, shift1, scale1, norm1, stats1, d, _linear_backward(dprojected, in_proj), norm
    )
    with aside(dgate1, dgate2):
        dmodulation = torch.cat([dshift1, dscale1, dgate1, dshift2, dscale2, dgate2], dim=1)
        dc, *dadaln = _adaln_backward(dmodulation, c, adaln_weight)
    din_proj = weight_gradient(as_rows(dprojected), as_rows(h))
    gradients = (din_proj, ddecay_weight, dgate_proj, do_proj, ddown)
    dnorms = (None if norm1 is None else dnorm1, None if norm2 is None else dnorm2)
    return (
        dx, dc, None, None, None, None, *(None,) * PREPARED,
        *(g.to(w.dtype) for g, w in zip(gradients, masters, strict=True)),
        ddecay_bias, dhead_norm, *dnorms, dconv_weight, dconv_bias, *dadaln,
    )  # fmt: skip


def train_block(
    x: Tensor,
    c: Tensor,
    prepared: Prepared,
    weights: BlockWeights,
    *,
    norm: str,
    heads: int,
    grid: tuple[int, int],
    order: ScanOrder,
) -> Tensor:
    """`RasterBlock` by names; ``prepared`` without folded gates.

    Returns:
        (B, T, D) in x's dtype.
    """
    tensors = (prepared.modulation, *prepared.products, *weights.in_order())
    out: Tensor = RasterBlock.apply(x, c, norm, heads, grid, order, *tensors)
    return out


def infer_block(
    x: Tensor,
    prepared: Prepared,
    weights: BlockWeights,
    *,
    norm: str,
    heads: int,
    grid: tuple[int, int],
    order: ScanOrder,
    rider: Rider | None = None,
) -> Tensor:
    """The forward pass alone of one image, without gradients; arguments as of `train_block`, but with folded gates.

    **x is overwritten.** With a rider, the next block's weights are prepared too.
    """
    w = weights
    shift1, scale1, _, shift2, scale2, _ = prepared.modulation.chunk(6, dim=1)
    in_proj, decay_weight, gate_proj, o_proj, down_proj = prepared.or_masters(w)
    h, _ = norm_modulate_forward(x, shift1, scale1, w.norm1, norm, EPS, x.dtype)
    halved = rider is not None and h.shape[1] <= HALVED_TOKENS
    projected = _linear_in_halves(h, in_proj) if halved else _linear(h, in_proj)
    y, _ = mixer_forward(projected, decay_weight, w.decay_bias, w.head_norm, heads, *grid, order_code(order), EPS)
    x[0].addmm_(y[0], o_proj.T)
    h, _ = norm_modulate_forward(x, shift2, scale2, w.norm2, norm, EPS, x.dtype)
    hidden = project_up(h, gate_proj, False)[0] if rider is None else rider.project_up(h, gate_proj)
    x[0].addmm_(hidden[0], down_proj.T)
    if w.conv_weight is None or w.conv_bias is None:
        return x
    return srem_forward(x, None, None, w.conv_weight, w.conv_bias, *grid, *order)
