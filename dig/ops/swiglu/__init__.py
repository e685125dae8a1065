"""SwiGLU, the non-linearity of DiG's feed-forward half: ``silu(gate) · up``, gate and up one projection's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from dig.ops.swiglu.reference import reference_swiglu, reference_swiglu_linear
from dig.packages import require

__all__ = ["IMPLEMENTATIONS", "swiglu", "swiglu_linear"]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute both operations."""

    swiglu: Callable[[Tensor], Tensor]
    swiglu_linear: Callable[[Tensor, Tensor], Tensor]


def _fused() -> ModuleType:
    """`dig.ops.swiglu.fused`, imported at the first call: this package does without Triton until then.

    A plain import comes first, for torch.compile can trace that, but no search for an installed package.
    """
    try:
        from dig.ops.swiglu import fused
    except ImportError:
        require("triton", "implementation 'triton'")
        raise
    return fused


def _triton_swiglu(gate_up: Tensor) -> Tensor:
    hidden: Tensor = _fused().fused_swiglu(gate_up)
    return hidden


def _triton_swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _fused().fused_swiglu_linear(gate_up, weight)
    return out


IMPLEMENTATIONS = {
    "reference": Implementation(swiglu=reference_swiglu, swiglu_linear=reference_swiglu_linear),
    "triton": Implementation(swiglu=_triton_swiglu, swiglu_linear=_triton_swiglu_linear),
}


def _implementation(name: str, gate_up: Tensor) -> Implementation:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
    if gate_up.ndim < 2 or 0 in gate_up.shape or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be (..., 2F), no dimension 0; got {tuple(gate_up.shape)}")
    return IMPLEMENTATIONS[name]


def swiglu(gate_up: Tensor, *, implementation: str) -> Tensor:
    """``silu(gate) · up``, computed in fp32 (fp64 for fp64 inputs).

    Args:
        gate_up: (..., 2F), the F gates before the F values.
        implementation: ``reference`` (PyTorch, any device) or ``triton`` (this project's kernels; NVIDIA GPUs). The
            latter takes fp32 and bf16, rows at one distance from each other, and is differentiable once.

    Returns:
        (..., F) in gate_up's dtype.

    Raises:
        ValueError: An argument that does not fit; the message names it and what it must be.
        MissingPackageError: The implementation's package is not installed.
    """
    return _implementation(implementation, gate_up).swiglu(gate_up)


def swiglu_linear(gate_up: Tensor, weight: Tensor, *, implementation: str) -> Tensor:
    """``swiglu(gate_up) @ weight.T``, the second half of a feed-forward network; see `swiglu`.

    Args:
        gate_up: (..., 2F).
        weight: (D, F), in gate_up's dtype.
        implementation: As of `swiglu`; ``triton`` keeps gate_up alone for the backward pass, not the hidden values.

    Returns:
        (..., D) in gate_up's dtype.

    Raises:
        ValueError: An argument that does not fit; the message names it and what it must be.
        MissingPackageError: The implementation's package is not installed.
    """
    chosen = _implementation(implementation, gate_up)
    if weight.ndim != 2 or 2 * weight.shape[1] != gate_up.shape[-1]:
        raise ValueError(f"weight must be (D, {gate_up.shape[-1] // 2}); got {tuple(weight.shape)}")
    return chosen.swiglu_linear(gate_up, weight)
