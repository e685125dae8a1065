"""Runs cases one after the other, each in a process of its own, and stores every row as it comes. No torch here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.jobs import BUDGETS, Budget, CaseJob, CeilingJob
from bench.results import Case, ResultsWriter, Row, utc_now

FINAL = frozenset({"ok", "oom", "unsupported"})
"""Statuses that a resumed run does not measure again; a timeout or an error may have been the moment's."""


class WorkerError(RuntimeError):
    """A worker process ended without an answer; ``status`` is what its row says."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def _context() -> ForkServerContext | SpawnContext:
    """Worker processes fork from a server that has imported torch once, and never touched CUDA."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.preload"])
    return context


def _end(process: BaseProcess) -> None:
    """Kill a worker with everything that it started, and wait until it is gone."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _tail(path: Path, characters: int = 600) -> str:
    return path.read_text(errors="replace").strip()[-characters:]


def run_job(job: CaseJob | CeilingJob, *, time_limit: float) -> Any:
    """Do a job in a process of its own.

    Args:
        job: What to do.
        time_limit: Seconds until the process and its children are killed.

    Returns:
        The worker's answer.

    Raises:
        WorkerError: Time ran out, or the process died; the message holds the end of its stderr.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="dig-bench-") as folder:
        errors = Path(folder) / "stderr"
        errors.touch()
        process = context.Process(target=_worker, args=(sender, job, str(errors)), daemon=False)
        process.start()
        sender.close()
        try:
            if not receiver.poll(time_limit):
                raise WorkerError("timeout", f"no result after {time_limit:g} s; the process was killed")
            try:
                return receiver.recv()
            except EOFError:
                process.join()
                raise WorkerError("error", _post_mortem(process.exitcode, _tail(errors))) from None
        finally:
            _end(process)
            receiver.close()


def _worker(connection: Any, job: Any, errors: str) -> None:
    from bench.worker import worker_main

    worker_main(connection, job, errors)


def _post_mortem(exit_code: int | None, stderr: str) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (most often: the host ran out of memory)" if -exit_code == signal.SIGKILL else ""
        return f"the process was ended by {name}{hint}; {stderr or 'it printed nothing'}"
    return f"the process ended with status {exit_code}; {stderr or 'it printed nothing'}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A run over cases.

    Attributes:
        cases: What to measure, in order.
        done: Cases that need no measuring, being in the results file already.
        time_limit: Seconds a case may take, model build and kernel tuning included.
        budget: How long to sample, or None for the device's own.
    """

    cases: tuple[Case, ...]
    done: frozenset[Case]
    time_limit: float
    budget: Budget | None = None

    @property
    def remaining(self) -> tuple[Case, ...]:
        """The cases that are measured, in order."""
        return tuple(case for case in self.cases if case not in self.done)


def finished_cases(rows: Mapping[Case, Row]) -> frozenset[Case]:
    """The cases that a resumed run leaves alone."""
    return frozenset(case for case, row in rows.items() if row.status in FINAL)


def run_sweep(
    sweep: Sweep,
    writer: ResultsWriter,
    *,
    environment: Mapping[str, Any],
    on_start: Callable[[Case], None],
) -> Iterator[Row]:
    """Measure the remaining cases; each row is on the disk before it is yielded."""
    ceilings: dict[tuple[str, str], float | None] = {}
    for case in sweep.remaining:
        on_start(case)
        key = (case.device, case.dtype)
        if key not in ceilings:
            ceilings[key] = _ceiling(case, sweep.time_limit)
        job = CaseJob(
            case=case,
            budget=sweep.budget or BUDGETS[case.device],
            environment=environment,
            matmul_ceiling=ceilings[key],
        )
        started_at = utc_now()
        try:
            row = Row.from_json(run_job(job, time_limit=sweep.time_limit))
        except WorkerError as error:
            status: Any = error.status
            row = Row(
                case=case, status=status, message=str(error), started_at=started_at, environment=dict(environment)
            )
        writer.write(row)
        yield row


def _ceiling(case: Case, time_limit: float) -> float | None:
    try:
        return float(run_job(CeilingJob(device=case.device, dtype=case.dtype), time_limit=time_limit))
    except WorkerError:
        return None  # Rows then say null: no share of a ceiling that was not measured.
