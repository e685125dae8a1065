"""What the harness asks of a worker process. No torch here, so that the harness itself starts at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.results import Case, Device, Dtype


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a case is sampled.

    Attributes:
        settle_s: Seconds of untimed steps after warm-up, for clocks and caches.
        min_samples: Fewest timed steps, whatever they take.
        target_s: Seconds of timed steps to aim for.
        max_samples: Most timed steps.
    """

    settle_s: float = 0.3
    min_samples: int = 10
    target_s: float = 1.5
    max_samples: int = 100

    def __post_init__(self) -> None:
        """Raise ValueError on a budget that times nothing."""
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(f"need 1 <= min_samples <= max_samples; got {self.min_samples} and {self.max_samples}")
        if self.settle_s < 0 or self.target_s < 0:
            raise ValueError("settle_s and target_s must not be negative")


BUDGETS: dict[Device, Budget] = {
    "cuda": Budget(),
    "cpu": Budget(settle_s=0.0, min_samples=3, target_s=1.0, max_samples=30),
}


@dataclass(frozen=True, kw_only=True)
class CaseJob:
    """Measure a case; the answer is a row as JSON."""

    case: Case
    budget: Budget
    environment: Mapping[str, Any]
    matmul_ceiling: float | None


@dataclass(frozen=True, kw_only=True)
class CeilingJob:
    """Measure FLOP/s of a large matrix product; the answer is a float."""

    device: Device
    dtype: Dtype
