"""What runs in the process of one launch of an operation: build, warm up, time, answer with a row."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from bench.cases.jobs import Phase
from bench.measure.case import stay_near
from bench.measure.clocks import Watch
from bench.measure.failures import failure
from bench.measure.timing import sample
from bench.measure.versions import versions
from bench.ops.calls import steps_of, tensors_of
from bench.ops.common import Step, capture
from bench.ops.rows import OpJob, OpRow
from bench.store.rows import Mark, utc_now
from dig.nvml import Gpu

SEED = 0


def measure_op(connection: Connection, job: OpJob) -> None:
    """Entry of the process: sends what it does, and the one row as JSON, as `bench.run.worker.worker_main` does."""
    row = measure(job, lambda phase: connection.send(("phase", phase)))
    connection.send(("answer", row.to_json()))
    connection.close()


def measure(job: OpJob, tell: Callable[[Phase], None] = lambda phase: None) -> OpRow:
    """Measure one launch in this process. Never raises for what an operation can do wrong: that is a row.

    Args:
        job: What to measure.
        tell: Called with what is done next.
    """
    started_at, case = utc_now(), job.case
    environment = {**job.environment, **versions(case.device)}
    try:
        gpu = Gpu.open() if case.device == "cuda" else None
        stay_near(gpu)
        watch = Watch(gpu)  # Before CUDA starts here: what is on the card now is somebody else's.
        tell("compiling")
        torch.manual_seed(SEED)
        steps = steps_of(case)
        if not all(torch.isfinite(tensor).all() for tensor in tensors_of(steps[0]())):
            raise FloatingPointError("the operation's result is not finite")
        run = _together(steps, case.device)
        tell("measuring")
        found = sample(run, device=case.device, budget=job.budget, watch=watch)
        marks: list[Mark] = watch.marks() if case.device == "cuda" else []
        if found.warmup == "bound":
            marks.append("unsteady")
    except Exception as error:
        traceback.print_exc()
        status, message = failure(error)
        return OpRow(
            case=case,
            status=status,
            message=message,
            started_at=started_at,
            launch=job.launch,
            environment=environment,
        )
    return OpRow(
        case=case,
        status="ok",
        started_at=started_at,
        samples_ms=tuple(round(ms / len(steps), 7) for ms in found.samples_ms),
        launch=job.launch,
        marks=tuple(marks),
        environment=environment,
    )


def _together(steps: list[Step], device: str) -> Callable[[], object]:
    """All calls as one: on a GPU in one CUDA graph, so that launches don't count."""
    if device == "cuda":
        return capture(steps).replay

    def run() -> None:
        for step in steps:
            step()

    return run
