"""What the harness asks of a worker process. No torch here, so that the harness itself starts at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.cases.case import Case, Device, Dtype


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a case is sampled.

    Attributes:
        settle_s: Least seconds of untimed steps, for clocks and caches.
        settle_max_s: Most seconds of untimed steps, but for three blocks of them, which are always run; 0: none.
        steady: The case is steady when the medians of three blocks in a row lie within this share of each other.
        min_samples: Fewest timed steps, whatever they take.
        least_s: Least seconds of timed steps: a shorter look sees one moment of the clock.
        width: Stop when the median's 95% interval is no wider than this share of the median.
        target_s: Stop after so many seconds of timed steps, narrow or not.
        max_samples: Most timed steps.
    """

    settle_s: float = 0.2
    settle_max_s: float = 1.0
    steady: float = 0.01
    min_samples: int = 7
    least_s: float = 0.3
    width: float = 0.005
    target_s: float = 0.8
    max_samples: int = 200

    def __post_init__(self) -> None:
        """Raise ValueError on a budget that times nothing."""
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(f"need 1 <= min_samples <= max_samples; got {self.min_samples} and {self.max_samples}")
        seconds = (self.settle_s, self.settle_max_s, self.least_s, self.target_s, self.width, self.steady)
        if not all(0 <= x < math.inf for x in seconds):
            raise ValueError("seconds, width and steady must be finite and not negative")


BUDGETS: dict[Device, Budget] = {
    "cuda": Budget(),
    "cpu": Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, least_s=0.0, target_s=1.0, max_samples=30),
}


Phase = Literal["building", "compiling", "measuring", "checking"]
"""What a worker does with a case. Kernels are built and tuned in ``compiling``, which has a time limit of its own."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a worker may take.

    Attributes:
        prepare: Seconds of building the model, and of building and tuning kernels.
        measure: Seconds of everything after that.
    """

    prepare: float = 900.0
    measure: float = 300.0


@dataclass(frozen=True, kw_only=True)
class CaseJob:
    """Measure a case; the answer is a row as JSON, and before it every `Phase` as it begins.

    Attributes:
        built: What the case compiles was compiled before, and lies on the disk.
    """

    case: Case
    budget: Budget
    environment: Mapping[str, Any]
    matmul_ceiling: float | None
    launch: int = 0
    key: str = ""
    built: bool = False


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """Be one of the processes that train a case's model together; the answer is a row as of `CaseJob`, as this one
    sees it. Where it stands among them, the environment says (`bench.run.ranks`).

    Attributes:
        job: The case, and what its row holds.
        run: As of `bench.store.ledgers.Scaling`.
        patience: Seconds that a rank waits for the others.
    """

    job: CaseJob
    run: str
    patience: float

    @property
    def case(self) -> Case:
        """What they train."""
        return self.job.case


@dataclass(frozen=True, kw_only=True)
class ParityJob:
    """Compare a case's model with its reference on a small input; the answer is an `Agreement` of
    `bench.parity.reference`, as a dict.
    """

    case: Case


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """Run a case's step twice, to see whether it fits; the answer is its memory ledger, as a dict.

    Attributes:
        case: What to run.
        limit: Bytes that the process may take, or None for all there are.
    """

    case: Case
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """Build a case's kernels and time nothing; the answer is ``ok``, or the status of what was raised.

    Attributes:
        case: What to build.
        threads: Processes that Inductor may compile in: many cases share the cores.
    """

    case: Case
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class CeilingJob:
    """Measure the FLOP/s of a large GEMM; the answer is a float."""

    device: Device
    dtype: Dtype


Job = CaseJob | ParityJob | ProbeJob | BuildJob | CeilingJob
