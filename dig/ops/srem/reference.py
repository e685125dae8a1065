"""SREM in PyTorch: the readable form that the kernels are compared with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dig.scan import ScanOrder


def oriented(weight: Tensor, order: ScanOrder) -> Tensor:
    """The kernel (D, 1, 3, 3) that does on the raster grid what ``weight`` does on the grid folded in ``order``."""
    if order.transposed:
        weight = weight.transpose(2, 3)
    return weight.flip((2, 3)) if order.reversed else weight


def reference_srem(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    grid: tuple[int, int],
    order: ScanOrder,
) -> Tensor:
    """`dig.ops.srem.srem` on any device and in any floating dtype, differentiable."""
    if branch is not None and gate is not None:
        x = (x + gate.unsqueeze(1) * branch).to(x.dtype)
    image = x.transpose(1, 2).unflatten(2, grid)
    kernel = oriented(weight, order).to(x.dtype)
    return F.conv2d(image, kernel, bias.to(x.dtype), padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)
