"""Entry of a worker process: one job in, one answer out."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bench.cases.jobs import BuildJob, CaseJob, CeilingJob, Job, ParityJob, Phase, ProbeJob, RankJob
from bench.measure.build import build
from bench.measure.case import measure_case
from bench.measure.ceiling import measure_ceiling
from bench.measure.failures import failure
from bench.measure.probe import probe
from bench.measure.tuners import take_first_tiles
from bench.parity.reference import check_against_reference
from dig.registry import load_source


def check_parity(job: ParityJob) -> dict[str, Any]:
    """The comparison with the reference on a small input; ``{}`` where the case's model is the reference itself.

    Nothing is raised for what a model can do wrong: ``status`` and ``message`` say it.
    """
    take_first_tiles()
    try:
        found = check_against_reference(job.case)
    except Exception as error:
        traceback.print_exc()
        status, message = failure(error)
        return {"status": status, "message": message}
    return {} if found is None else dataclasses.asdict(found)


def _answer(job: Job, tell: Callable[[Phase], None]) -> Any:
    if not isinstance(job, CeilingJob):
        load_source(job.case.source)
    if isinstance(job, CaseJob):
        return measure_case(job, tell).to_json()
    if isinstance(job, BuildJob):
        return build(job.case, threads=job.threads)
    if isinstance(job, ParityJob):
        return check_parity(job)
    return probe(job) if isinstance(job, ProbeJob) else measure_ceiling(job)


def rank_main(connection: Connection, job: RankJob) -> None:
    """Entry of one of the processes that train a model together; it says and answers what `worker_main` does."""
    # Only here: torch.distributed's sharding takes a second to import, which no other worker needs.
    from bench.measure.ranks import measure_rank

    load_source(job.case.source)
    measure_rank(
        job,
        lambda phase: connection.send(("phase", phase)),
        lambda row: connection.send(("answer", row.to_json())),
    )
    connection.close()


def worker_main(connection: Connection, job: Job) -> None:
    """Entry of the worker process.

    Args:
        connection: Takes pairs: ``("phase", name)`` as a case goes on, then ``("answer", value)``; `bench.cases.jobs`
            says what the value is.
        job: What to do.
    """
    answer = _answer(job, lambda phase: connection.send(("phase", phase)))
    connection.send(("answer", answer))
    connection.close()
