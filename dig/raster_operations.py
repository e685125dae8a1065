"""What a block's passes call: the operations between its GEMMs, the GEMMs, and its second half's end.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.config import EPS
from dig.ops.adaln.fused import (
    norm_gradients,
    norm_modulate_backward,
    norm_modulate_forward,
    residual_norm_modulate_forward,
)
from dig.ops.gla.mixer import mixer_backward, mixer_forward, mixer_sums, order_code
from dig.ops.launch import ALIGNMENT, empty
from dig.ops.library import unseen
from dig.ops.side_stream import Part
from dig.ops.srem.fused import srem_backward, srem_forward, srem_gradients
from dig.ops.swiglu.products import project_down_backward, project_up
from dig.ops.weight_gradients import groups_gradients, weight_gradients
from dig.ops.weights import gated_gradients, gated_weight_gradient
from dig.raster_plan import GATE1, GATE2, SCALE2, SHIFT2, BlockPlan, plan_for
from dig.raster_weights import BlockWeights, LargeGradients, Products, Settings, adaln_backward, cast_products


class Operations(NamedTuple):
    """What a block's passes call between their GEMMs."""

    norm: Any = norm_modulate_forward
    residual_norm: Any = residual_norm_modulate_forward
    norm_backward: Any = norm_modulate_backward
    mixer: Any = mixer_forward
    mixer_sums: Any = mixer_sums
    mixer_backward: Any = mixer_backward
    up: Any = project_up
    down_backward: Any = project_down_backward
    srem: Any = srem_forward
    srem_backward: Any = srem_backward
    gated_gradient: Any = gated_weight_gradient


_REGISTERED = Operations()
# Called directly, those whose results have an optional part give None for it, and make nothing to stand for it; and
# gradients of a modulation's parts can be written where the caller has room for them.
_DIRECT = Operations._make(operation.function for operation in _REGISTERED)._replace(
    norm_backward=norm_gradients, srem_backward=srem_gradients, gated_gradient=gated_gradients
)


def operations_for(x: Tensor) -> Operations:
    """Those to call for tokens x: where nobody asks PyTorch about them, the functions, asked for once and not each."""
    return _DIRECT if unseen(x) else _REGISTERED


class Separate:
    """A training block's operations one by one, each of which sees for itself what it is given.

    PyTorch may be told of them. `dig.raster_plan.BlockPlan` is in its place where nobody asks.

    Args:
        ops: Those to call.
        x: Like the tokens (B, T, D).
        modulation: (B, 6D).
        settings: The block's.
    """

    def __init__(self, ops: Operations, x: Tensor, modulation: Tensor, settings: Settings) -> None:
        self._ops, self._settings, self._dtype = ops, settings, x.dtype
        self._one_image = x.shape[0] == 1
        self._parts = modulation.chunk(6, dim=1)
        self._room: tuple[Tensor, ...] = ()
        self._mixing = settings.heads, *settings.grid, order_code(settings.order)

    def norm1(self, x: Tensor, m: Tensor, weight: Tensor | None) -> Any:
        """As of `BlockPlan`, as are all others."""
        shift, scale = self._parts[:2]
        return self._ops.norm(x, shift, scale, weight, self._settings.norm, EPS, self._dtype)

    def norm2(self, x: Tensor, branch: Tensor, m: Tensor, weight: Tensor | None) -> Any:
        """See there."""
        return self._ops.residual_norm(
            x, branch, *self._parts[GATE1 : SCALE2 + 1], weight, self._settings.norm, EPS, self._dtype
        )

    def norm1_backward(
        self, x: Tensor, m: Tensor, weight: Tensor | None, stats: Tensor, d: Tensor, dh: Tensor, dm: Tensor | None
    ) -> Any:
        """See there."""
        shift, scale = self._parts[:2]
        dx, _, _, *others = self._ops.norm_backward(
            x, None, None, shift, scale, weight, stats, d, dh, self._settings.norm, *self._room[:2]
        )
        return dx, *others

    def norm2_backward(
        self,
        x: Tensor,
        branch: Tensor | None,
        m: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        d: Tensor,
        dh: Tensor,
        dm: Tensor | None,
    ) -> Any:
        """See there."""
        gate, shift, scale = self._parts[GATE1 : SCALE2 + 1]
        return self._ops.norm_backward(
            x, branch, None if self._one_image else gate, shift, scale, weight, stats, d, dh, self._settings.norm,
            *self._room[SHIFT2 : SCALE2 + 1],
        )  # fmt: skip

    def mixer(self, projected: Tensor, decay_weight: Tensor, decay_bias: Tensor, norm_weight: Tensor) -> Any:
        """See there."""
        return self._ops.mixer(projected, decay_weight, decay_bias, norm_weight, *self._mixing, EPS, True)

    def mixer_sums(self, projected: Tensor, decay_weight: Tensor, decay_bias: Tensor) -> Any:
        """See there."""
        return self._ops.mixer_sums(projected, decay_weight, decay_bias, *self._mixing)

    def mixer_backward(self, projected: Tensor, *tensors: Tensor) -> Any:
        """See there."""
        return self._ops.mixer_backward(projected, *tensors, *self._mixing, EPS, True)

    def up(self, h: Tensor, weight: Tensor) -> Any:
        """See there."""
        return self._ops.up(h, weight, True)

    def down_backward(self, d: Tensor, weight: Tensor, gate_up: Tensor) -> Any:
        """See there."""
        return self._ops.down_backward(d, weight, gate_up)

    def end(self, x: Tensor, branch: Tensor, m: Tensor, weight: Tensor, bias: Tensor) -> Any:
        """See there."""
        settings = self._settings
        return self._ops.srem(x, branch, self._parts[GATE2], weight, bias, *settings.grid, *settings.order)

    def end_backward(self, x: Tensor, branch: Tensor, m: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> Any:
        """See there."""
        settings = self._settings
        return self._ops.srem_backward(
            x, branch, self._parts[GATE2], weight, bias, dy, *settings.grid, *settings.order, self._one_image
        )

    def gate(self, which: int, m: Tensor) -> Tensor:
        """See there."""
        return self._parts[which]

    def cast(self, w: BlockWeights, m: Tensor) -> Products:
        """See there."""
        gates = [self._parts[GATE1], self._parts[GATE2]] if self._one_image else []
        return cast_products(w.products, gates, self._dtype)

    def gated(self, which: int, product: Tensor, weight: Tensor, m: Tensor, dm: Tensor | None) -> Any:
        """See there; the gate's is given too."""
        return self._ops.gated_gradient(product, weight, self._parts[which], *self._room[which : which + 1])

    def adaln_backward(self, dm: Tensor, c: Tensor, weight: Tensor, dweight: Tensor | None) -> Any:
        """See there."""
        return adaln_backward(dm, c, weight, dweight)

    def room(self, m: Tensor) -> Tensor | None:
        """See there. None too where PyTorch is told of the operations, which must change nothing.

        And where Triton would compile other kernels for where the parts lie.
        """
        if self._ops is not _DIRECT or not self._one_image or m.shape[1] * m.itemsize % (6 * ALIGNMENT):
            return None
        whole = empty(m)
        self._room = whole.chunk(6, dim=1)
        return whole


Steps = Separate | BlockPlan


def steps_for(
    x: Tensor,
    c: Tensor,
    modulation: Tensor,
    w: BlockWeights,
    settings: Settings,
    others: Sequence[Tensor | None] = (),
    *,
    known: BlockPlan | None = None,
) -> Steps:
    """What a training block's pass calls between its GEMMs; arguments as of `dig.raster_plan.plan_for`."""
    ops = operations_for(x)
    plan = plan_for(x, c, modulation, w, settings, others, known=known) if ops is _DIRECT else None
    return Separate(ops, x, modulation, settings) if plan is None else plan


def is_direct(steps: Steps) -> bool:
    """Whether PyTorch isn't told of the operations, so that they may write into memory that they are given."""
    return isinstance(steps, BlockPlan) or steps._ops is _DIRECT


def grouped(direct: bool, x: Tensor, weights: Sequence[Tensor], needed: Sequence[Any]) -> Any:
    """What gives all these weights' ``dy^T x`` at once, where they are asked for together and that gains; or None."""
    together = direct and all(needed) and groups_gradients(x, weights)
    return weight_gradients if together else None


def large_places(direct: bool, x: Tensor, part: Part | None) -> LargeGradients:
    """Memory in which somebody wants the gradients of a block's large weights, for the pass of tokens x under way.

    None where PyTorch is told of the operations, which must change nothing; and with one image, whose products are no
    gradients until they are gated.
    """
    if not direct or part is None or part.places is None or len(x) == 1:
        return _ANYWHERE
    found: LargeGradients = part.places()
    return found


_ANYWHERE = LargeGradients()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, M) times (N, M) transposed: (B, T, N)."""
    return F.linear(x, weight)


def linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """(B, T, N) times (N, M): the gradient of `linear`'s x."""
    return torch.matmul(dy, weight)


def add_and_convolve(
    ops: Operations, x: Tensor, branch: Tensor, gate: Tensor, w: BlockWeights, settings: Settings
) -> Tensor:
    """The second half's gated residual, and SREM where there is one."""
    if w.conv_weight is None or w.conv_bias is None:
        return torch.addcmul(x, gate.unsqueeze(1).to(x.dtype), branch)
    out: Tensor = ops.srem(x, branch, gate, w.conv_weight, w.conv_bias, *settings.grid, *settings.order)
    return out
