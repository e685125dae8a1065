"""How far a result is from another, and the error where it is too far."""

from __future__ import annotations

from torch import Tensor


class ParityError(RuntimeError):
    """A case is not what its name says; the message says how."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm; infinite where anything is not finite."""
    error = ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return error if error < float("inf") else float("inf")
