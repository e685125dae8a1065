"""SwiGLU, the non-linearity of DiG's feed-forward half: ``silu(gate) · up``, gate and up one projection's output."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dig.ops.first_call import from_triton
from dig.ops.swiglu.reference import reference_swiglu

__all__ = ["IMPLEMENTATIONS", "swiglu"]


@from_triton
def _triton_swiglu() -> Callable[[Tensor], Tensor]:
    from dig.ops.swiglu.fused import fused_swiglu

    return fused_swiglu


IMPLEMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"reference": reference_swiglu, "triton": _triton_swiglu}


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
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if gate_up.ndim < 2 or 0 in gate_up.shape or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be (..., 2F), no dimension 0; got {tuple(gate_up.shape)}")
    return IMPLEMENTATIONS[implementation](gate_up)
