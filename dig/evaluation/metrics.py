"""Fréchet distance, and precision and recall, between two sets of features.

Shapes: N, M rows (images) of the two sets, F features of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the manifolds, as published (arXiv 1904.06991 §3)."""
DISTANCES_AT_ONCE = 2**26
"""Half a GiB of them."""


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A normal distribution of features, fp64.

    Attributes:
        mean: (F,).
        factor: (R, F), whose product ``factor.T @ factor`` is the covariance: what is small in the features is not
            squared, and so not lost beside what is large.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fit (N, F) features; N must be at least 2."""
        if len(features) < 2:
            raise ValueError(f"a distribution needs at least 2 images; got {len(features)}")
        features = features.double()
        mean = features.mean(0)
        factor = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
        return cls(mean=mean, factor=factor)

    @property
    def covariance(self) -> Tensor:
        """(F, F)."""
        return self.factor.T @ self.factor


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two normal distributions (arXiv 1706.08500 Eq. 6).

    ``|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. With ``C = R^T R`` the last trace is the sum of the singular
    values of ``R_a R_b^T``. Roots of eigenvalues, the usual way, would turn a rounding error e of a singular
    covariance (fewer images than features, features that never vary) into one of e^(1/2), once for each feature.
    """
    cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    spread = a.factor.square().sum() + b.factor.square().sum() - 2 * cross
    # Of equal distributions rounding may leave a little less than nothing.
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


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
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    at_once = _rows_at_once(real)
    for rows, radii in zip(generated.split(at_once), generated_radii.split(at_once), strict=True):
        distances = _distances(rows, real)
        precise.append((distances <= real_radii).any(1))
        recalled |= (distances <= radii[:, None]).any(0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance from each row to its k-th nearest other."""
    # The nearest row of all is the row itself.
    parts = features.split(_rows_at_once(features))
    return torch.cat([_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in parts])


def _rows_at_once(others: Tensor) -> int:
    """How many rows' distances to all others are held at a time."""
    return max(1, DISTANCES_AT_ONCE // len(others))


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Distance of every row to every other one, from their differences.

    Expanded into squares and products, which is cdist's choice for many rows, they cancel where rows lie closer to
    each other than to the origin, and equal rows are not at distance zero.
    """
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
