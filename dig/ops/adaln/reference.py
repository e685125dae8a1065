"""Adaptive norm in PyTorch, as its formulas read; on any device, in fp32 or, for fp64 inputs, in fp64.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    """``norm(x) (1 + scale) + shift``; arguments and result as `dig.ops.adaln.norm_modulate`."""
    wide = _wide(x)
    width = (x.shape[-1],)
    if norm == "rms":
        assert weight is not None
        normed = F.rms_norm(wide, width, weight.to(wide.dtype), eps)
    else:
        normed = F.layer_norm(wide, width, eps=eps)
    scale, shift = (s.to(wide.dtype).unsqueeze(1) for s in (scale, shift))
    return (normed * (1 + scale) + shift).to(dtype)


def reference_residual_norm_modulate(
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
    """``x + gate branch`` and the modulated norm of it; as `dig.ops.adaln.residual_norm_modulate`."""
    wide = _wide(x)
    x_new = (wide + gate.to(wide.dtype).unsqueeze(1) * branch.to(wide.dtype)).to(x.dtype)
    return x_new, reference_norm_modulate(x_new, shift, scale, weight, norm, eps, dtype)
