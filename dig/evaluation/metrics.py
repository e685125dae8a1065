"""Fréchet distance, and precision and recall, between two sets of features.

Shapes: N, M rows (images) of the two sets, F features of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the manifolds, as published (arXiv 1904.06991 §3)."""
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean (F,) and covariance (F, F) of features, fp64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fit (N, F) features; N must be at least 2."""
        if len(features) < 2:
            raise ValueError(f"a distribution needs at least 2 images; got {len(features)}")
        features = features.double()
        return cls(mean=features.mean(0), covariance=torch.cov(features.T).reshape(features.shape[1], -1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two normal distributions (arXiv 1706.08500 Eq. 6).

    ``|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. The last trace is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2),
    which is symmetric, so its eigenvalues are found without the complex detour of a general matrix root.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991 Eq. 1 and 2).

    A set's manifold is the union of balls around its rows that reach to each one's k-th nearest other row. Precision
    is the share of generated rows inside the manifold of the real ones, recall the share of real rows inside that of
    the generated ones.

    Args:
        real: (N, F), N above k.
        generated: (M, F), M above k.
        k: Neighbours.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of either kind")
    real, generated = real.float(), generated.float()
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points that lie in the ball of at least one centre."""
    # The nearest row of all is the row itself.
    radii = torch.cat(
        [torch.cdist(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(ROWS_AT_ONCE)]
    )
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(ROWS_AT_ONCE)]
    return float(torch.cat(inside).double().mean())
