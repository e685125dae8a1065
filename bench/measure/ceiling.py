"""The GEMM ceiling: the rate of a large matrix product, measured in the same run."""

from __future__ import annotations

from bench.cases.jobs import Budget, CeilingJob
from bench.measure.timing import sample
from dig.ceiling import large_product


def measure_ceiling(job: CeilingJob) -> float:
    """FLOP/s of a square matrix product on random data; a model's share is of this."""
    run, flops = large_product(job.device, job.dtype)
    budget = Budget(settle_s=0.2, settle_max_s=0.2, min_samples=10, target_s=0.3)
    found = sample(run, device=job.device, budget=budget)
    return flops / (found.interval.median / 1000)
