r"""Gated linear attention, the recurrence of DiG (paper Eq. 6-8).

.. math:: S_t = \operatorname{diag}(\alpha_t)\, S_{t-1} + k_t^\top v_t, \qquad o_t = q_t S_t

with one state :math:`S \in R^{K \times V}` per batch entry and head, zero before the first token. The published model
gates the keys only (its :math:`\beta` is 1), so a gate is a vector of K values.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dig.flops import counts_as
from dig.ops.first_call import from_triton
from dig.ops.gla.peer import fla_gla
from dig.ops.gla.reference import chunked_gla, recurrent_gla

__all__ = ["IMPLEMENTATIONS", "chunked_gla", "gated_linear_attention", "recurrent_gla"]


@from_triton
def _triton_gla() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    from dig.ops.gla.tiled import tiled_gla

    return tiled_gla


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "recurrent": recurrent_gla,
    "reference": chunked_gla,
    "triton": _triton_gla,
    "fla": fla_gla,
}


def _needed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, implementation: str) -> int:
    """FLOPs of the recurrence itself: k_t^T v_t into the state, q_t times the state."""
    return 2 * 2 * q.numel() * v.shape[-1]


def _like(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, implementation: str) -> Tensor:
    return v.new_empty(v.shape)


@counts_as(_needed, _like)
def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, implementation: str) -> Tensor:
    """Run the gated linear recurrence over the tokens in the order given.

    Args:
        q: Queries (B, T, H, K), already scaled.
        k: Keys (B, T, H, K).
        v: Values (B, T, H, V).
        log_decay: Natural logarithm of the gates, (B, T, H, K), each at most 0.
        implementation: ``recurrent`` (step by step: the truth that tests compare with), ``reference`` (chunked PyTorch,
            any device), ``triton`` (this project's kernels, see `dig.ops.gla.tiled.tiled_gla`; NVIDIA GPUs) or
            ``fla`` (flash-linear-attention's ``chunk_gla``, NVIDIA GPUs).

    Returns:
        (B, T, H, V) in v's dtype. The state is kept in fp32, or in fp64 for fp64 inputs.

    Raises:
        ValueError: Unknown implementation, or shapes that do not fit together; the message names the argument.
        MissingPackageError: The implementation's package is not installed.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if q.ndim != 4:
        raise ValueError(f"q must be (B, T, H, K); got {tuple(q.shape)}")
    for name, tensor in (("k", k), ("log_decay", log_decay)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {tuple(q.shape)}; got {tuple(tensor.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be (B, T, H, V) with q's B, T, H {tuple(q.shape[:3])}; got {tuple(v.shape)}")
    return IMPLEMENTATIONS[implementation](q, k, v, log_decay)
