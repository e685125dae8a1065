"""What a block's passes call: the operations between its GEMMs, the GEMMs, and its second half's end.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.ops.adaln.fused import (
    norm_gradients,
    norm_modulate_backward,
    norm_modulate_forward,
    residual_norm_modulate_forward,
)
from dig.ops.gla.mixer import mixer_backward, mixer_forward, mixer_sums
from dig.ops.launch import ALIGNMENT, empty
from dig.ops.library import unseen
from dig.ops.side_stream import Part
from dig.ops.srem.fused import srem_backward, srem_forward, srem_gradients
from dig.ops.swiglu.products import project_down_backward, project_up
from dig.ops.weight_gradients import groups_gradients, weight_gradients
from dig.ops.weights import gated_gradients, gated_weight_gradient
from dig.raster_weights import BlockWeights, LargeGradients, Settings


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


def modulation_room(ops: Operations, modulation: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Room for the gradient of one image's modulation (1, 6D), and its six parts, for the operations to write into.

    None and no parts where each part has a tensor of its own, and who wants the whole puts them together: with several
    images, whose parts don't lie in one piece; where PyTorch is told of the operations, which must change nothing; and
    where Triton would compile other kernels for where the parts lie.
    """
    if ops is not _DIRECT or len(modulation) != 1 or modulation.shape[1] * modulation.itemsize % (6 * ALIGNMENT):
        return None, ()
    whole = empty(modulation)
    return whole, whole.chunk(6, dim=1)


def grouped(ops: Operations, x: Tensor, weights: Sequence[Tensor], needed: Sequence[Any]) -> Any:
    """What gives all these weights' ``dy^T x`` at once, where they are asked for together and that gains; or None."""
    together = ops is _DIRECT and all(needed) and groups_gradients(x, weights)
    return weight_gradients if together else None


def large_places(ops: Operations, x: Tensor, part: Part | None) -> LargeGradients:
    """Memory in which somebody wants the gradients of a block's large weights, for the pass of tokens x under way.

    None where PyTorch is told of the operations, which must change nothing; and with one image, whose products are no
    gradients until they are gated.
    """
    if ops is not _DIRECT or part is None or part.places is None or len(x) == 1:
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
