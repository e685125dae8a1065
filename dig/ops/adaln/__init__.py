r"""Adaptive norm (adaLN): a norm whose scale and shift come from the condition, alone or after a gated residual.

.. math:: x' = x + g \odot \text{branch}, \qquad h = \operatorname{norm}(x') \odot (1 + \text{scale}) + \text{shift}

This is what stands before each half of a DiG or DiT block, and between the two (paper Alg. 1). The norm is RMSNorm with
a weight (``rms``, DiG's paper variant) or LayerNorm without one (``layer``, its release variant, and DiT).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dig.ops.adaln.reference import reference_norm_modulate, reference_residual_norm_modulate
from dig.ops.first_call import from_triton

__all__ = ["IMPLEMENTATIONS", "NORMS", "norm_modulate", "residual_norm_modulate"]

NORMS = ("rms", "layer")

NormModulate = Callable[[Tensor, Tensor, Tensor, Tensor | None, str, float, torch.dtype], Tensor]
ResidualNormModulate = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, str, float, torch.dtype], tuple[Tensor, Tensor]
]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute both operations; arguments are theirs, in order."""

    norm_modulate: NormModulate
    residual_norm_modulate: ResidualNormModulate


@from_triton
def _triton_norm_modulate() -> NormModulate:
    from dig.ops.adaln.fused import fused_norm_modulate

    return fused_norm_modulate


@from_triton
def _triton_residual_norm_modulate() -> ResidualNormModulate:
    from dig.ops.adaln.fused import fused_residual_norm_modulate

    return fused_residual_norm_modulate


IMPLEMENTATIONS = {
    "reference": Implementation(
        norm_modulate=reference_norm_modulate, residual_norm_modulate=reference_residual_norm_modulate
    ),
    "triton": Implementation(
        norm_modulate=_triton_norm_modulate, residual_norm_modulate=_triton_residual_norm_modulate
    ),
}


def _implementation(name: str) -> Implementation:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
    return IMPLEMENTATIONS[name]


def _check_shapes(x: Tensor, per_batch: dict[str, Tensor], weight: Tensor | None, norm: str) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (B, T, D), none of them 0; got {tuple(x.shape)}")
    B, _, D = x.shape
    for name, tensor in per_batch.items():
        if tensor.shape != (B, D):
            raise ValueError(f"{name} must have shape {(B, D)}; got {tuple(tensor.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    if norm == "layer" and weight is not None:
        raise ValueError("weight must be None for norm 'layer', which has none")
    if norm == "rms" and (weight is None or weight.shape != (D,)):
        got = None if weight is None else tuple(weight.shape)
        raise ValueError(f"weight must have shape {(D,)} for norm 'rms'; got {got}")


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm: str,
    eps: float = 1e-6,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    """``norm(x) (1 + scale) + shift``, computed in fp32 (fp64 for fp64 inputs).

    Args:
        x: (B, T, D).
        shift: (B, D); a slice of the modulation's (B, 6D) is read where it is.
        scale: (B, D), as shift.
        weight: (D,) for ``rms``, None for ``layer``.
        norm: ``rms`` or ``layer``.
        eps: Added to the mean square, or the variance, before its root.
        dtype: Of the result: what the next matrix product takes.
        implementation: ``reference`` (PyTorch, any device) or ``triton`` (this project's kernels; NVIDIA GPUs). The
            latter takes fp32 and bf16, any strides of batch and token, and is differentiable once.

    Returns:
        (B, T, D) in ``dtype``.

    Raises:
        ValueError: An argument that does not fit; the message names it and what it must be.
        MissingPackageError: The implementation's package is not installed.
    """
    chosen = _implementation(implementation)
    _check_shapes(x, {"shift": shift, "scale": scale}, weight, norm)
    return chosen.norm_modulate(x, shift, scale, weight, norm, eps, dtype)


def residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm: str,
    eps: float = 1e-6,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """``x_new = x + gate branch`` and ``h = norm(x_new) (1 + scale) + shift``; see `norm_modulate`.

    Args:
        x: (B, T, D), the residual stream.
        branch: (B, T, D), what a half of the block computed; its dtype may differ from x's.
        gate: (B, D), as shift.
        shift: (B, D).
        scale: (B, D).
        weight: (D,) for ``rms``, None for ``layer``.
        norm: ``rms`` or ``layer``.
        eps: Added to the mean square, or the variance, before its root.
        dtype: Of h.
        implementation: ``reference`` or ``triton``.

    Returns:
        x_new (B, T, D) in x's dtype, added up in fp32 and rounded once, and h (B, T, D) in ``dtype``, from x_new as
        rounded.

    Raises:
        ValueError: An argument that does not fit; the message names it and what it must be.
        MissingPackageError: The implementation's package is not installed.
    """
    chosen = _implementation(implementation)
    _check_shapes(x, {"gate": gate, "shift": shift, "scale": scale}, weight, norm)
    if branch.shape != x.shape:
        raise ValueError(f"branch must have x's shape {tuple(x.shape)}; got {tuple(branch.shape)}")
    return chosen.residual_norm_modulate(x, branch, gate, shift, scale, weight, norm, eps, dtype)
