"""Entry of a worker process: one job in, one answer out."""

from __future__ import annotations

import dataclasses
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bench.cases.jobs import CaseJob, CeilingJob, Job, ParityJob, Phase, ProbeJob
from bench.measure.case import measure_case
from bench.measure.ceiling import measure_ceiling
from bench.measure.failures import failure
from bench.measure.probe import probe
from bench.parity.reference import check_against_reference, tune_without_timing
from bench.run.lifeline import die_with_parent, end_with_parent, give_way
from dig.registry import load_source


def check_parity(job: ParityJob) -> dict[str, Any]:
    """The comparison with the reference on a small input; ``{}`` where the case's model is the reference itself.

    Nothing is raised for what a model can do wrong: ``status`` and ``message`` say it.
    """
    tune_without_timing()
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
    if isinstance(job, ParityJob):
        return check_parity(job)
    return probe(job) if isinstance(job, ProbeJob) else measure_ceiling(job)


def worker_main(connection: Connection, job: Job, errors: str) -> None:
    """Entry of the worker process.

    Args:
        connection: Takes pairs: ``("phase", name)`` as a case goes on, then ``("answer", value)``; `bench.cases.jobs`
            says what the value is.
        job: What to do.
        errors: Path of a file that takes what the process prints to stderr, for the message of a crash.
    """
    end_with_parent()  # In a group of its own, which a time limit ends too.
    die_with_parent()
    give_way()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the harness's to handle.
    try:
        with open(errors, "ab", buffering=0) as stderr:
            os.dup2(stderr.fileno(), 2)
    except FileNotFoundError:
        return  # The harness was interrupted while this process started, and has removed the folder: nobody waits.
    answer = _answer(job, lambda phase: connection.send(("phase", phase)))
    connection.send(("answer", answer))
    connection.close()
