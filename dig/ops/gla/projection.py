"""How DiG's fused input projection is laid out: q, k, v, output gate, and the first factor of the decay gate."""

from __future__ import annotations

from torch import Tensor

GATE_RANK = 16
GATE_NORMALIZER = 16
"""The temperature tau of Eq. 5: gates are sigmoid(·) to the power 1/16, so that memory is long at the start."""


def projection_splits(width: int, rank: int = GATE_RANK) -> list[int]:
    """Rows of the fused projection's weight, part by part, for a model of this width."""
    return [width // 2, width // 2, width, width, rank]


def split_projection(projected: Tensor, heads: int, rank: int = GATE_RANK) -> tuple[Tensor, ...]:
    """Views of q, k (B, T, H, D/2H), v, output gate (B, T, H, D/H) and the low-rank factor (B, T, R)."""
    width = (projected.shape[-1] - rank) // 3
    *parts, low = projected.split_with_sizes(projection_splits(width, rank), dim=-1)
    rows = projected.shape[:-1]
    return *(part.view(*rows, heads, part.shape[-1] // heads) for part in parts), low
