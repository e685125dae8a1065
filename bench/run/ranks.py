"""Starts the processes that train one model together, and makes one row of what they answer. No torch here.

They stand and fall together: one that fails, dies or takes too long ends them all, and the row says which it was.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.cases.jobs import Limits, Phase, RankJob
from bench.measure.intervals import MedianInterval
from bench.run.gpus import VISIBLE, Card
from bench.run.process import Worker, WorkerError
from bench.run.runner import PHASES, PREPARING
from bench.store.ledgers import Scaling
from bench.store.rows import Mark, Row

PAUSE = 0.05
GRACE = 1.0
"""Seconds to hear what other ranks have to say of a failure: the first word of it is often a neighbour's."""
QUIET: Mapping[str, str] = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""What every rank is given: NVLink multicast stays off, which a machine may not allow."""
_SECOND_HAND = re.compile(r"(?i)peer|connection|broken pipe|nccl|gloo|store|wait for|barrier")
"""In the message of a rank that only saw another one go."""


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank_variables(rank: int, count: int, *, port: int, cards: Sequence[Card]) -> dict[str, str]:
    """The environment variables of a rank: torchrun's, and the GPUs.

    Each sees all of them in the same order, and takes its own by its number: ranks that copy out of each other's memory
    know GPUs by that.

    Args:
        rank: Which.
        count: Of how many.
        port: Where rank 0 listens.
        cards: One a rank; none on a CPU.
    """
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # What torchrun may have said of its own job, where it has started this harness.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **QUIET,
    }
    if cards:
        found[VISIBLE] = ",".join(card.uuid for card in cards[:count])
    return found


def run_ranks(
    job: RankJob,
    *,
    cards: Sequence[Card],
    limits: Limits,
    on_phase: Callable[[Phase], None] = lambda phase: None,
    entry: str = "bench.run.worker:rank_main",
) -> Row:
    """Measure a case by all its ranks.

    Args:
        job: The case.
        cards: One a rank, at least; none on a CPU.
        limits: After which all of them are killed.
        on_phase: Told what rank 0 does, as it begins.
        entry: Where each process begins.

    Returns:
        One row: the slowest rank's time of every step, the largest memory.

    Raises:
        WorkerError: A rank failed, died or was late; the message says which, and why.
    """
    count = job.case.processes
    port = free_port()
    workers: list[Worker] = []
    try:
        for rank in range(count):
            variables = rank_variables(rank, count, port=port, cards=cards)
            workers.append(Worker(entry, job, variables=variables))
        return merge_ranks(_rows_of(workers, limits, on_phase))
    finally:
        for worker in workers:
            worker.kill()  # All at once: one that is left for a moment would speak of the others' end.
        for worker in workers:
            worker.end()


def _rows_of(workers: Sequence[Worker], limits: Limits, on_phase: Callable[[Phase], None]) -> list[Row]:
    rows: dict[int, Row] = {}
    failures: dict[int, WorkerError] = {}
    doing, limit, since, failed_at = "", limits.prepare, time.monotonic(), 0.0
    while len(rows) < len(workers):
        for rank, worker in enumerate(workers):
            while rank not in rows and rank not in failures and worker.answered():
                kind, value = _hear(worker)
                if kind == "failed":
                    failures[rank] = value
                elif kind == "answer":
                    row = Row.from_json(value)
                    if row.status == "ok":
                        rows[rank] = row
                    else:
                        failures[rank] = WorkerError(row.status, row.message)
                elif rank == 0:
                    on_phase(value)
                    if doing in ("", *map(PHASES.get, PREPARING)) and value not in PREPARING:
                        limit, since = limits.measure, time.monotonic()
                    doing = PHASES[value]
        now = time.monotonic()
        if failures:
            failed_at = failed_at or now
            if now - failed_at >= GRACE or len(failures) + len(rows) == len(workers):
                raise _most_telling(failures, len(workers))
        elif now - since > limit:
            of = f" of {doing}" if doing else ""
            late = ", ".join(str(rank) for rank in range(len(workers)) if rank not in rows)
            raise WorkerError("timeout", f"no result from rank {late} after {limit:g} s{of}; all ranks were killed")
        time.sleep(PAUSE)
    return [rows[rank] for rank in range(len(workers))]


def _hear(worker: Worker) -> tuple[str, Any]:
    try:
        kind, value = worker.answer(0)
    except WorkerError as error:
        return "failed", error
    return kind, value


def _most_telling(failures: Mapping[int, WorkerError], count: int) -> WorkerError:
    """The failure that the others follow from, as far as can be told: full memory, a death, no word of a neighbour."""

    def rank_of(item: tuple[int, WorkerError]) -> tuple[bool, bool, int]:
        rank, error = item
        died = "the process was ended by" in str(error)
        return error.status != "oom", not died and bool(_SECOND_HAND.search(str(error))), rank

    rank, error = min(failures.items(), key=rank_of)
    return WorkerError(error.status, f"rank {rank} of {count}: {error}")


def merge_ranks(rows: Sequence[Row]) -> Row:
    """One row of all ranks' rows, rank 0's first: of every step the slowest rank's time, the largest memory, all marks.

    Raises:
        WorkerError: They did not run the same steps.
    """
    first, scalings = rows[0], [row.scaling for row in rows if row.scaling is not None]
    if len({len(row.samples_ms) for row in rows}) > 1 or len({len(one.silent_ms) for one in scalings}) > 1:
        raise WorkerError("error", "the ranks timed different numbers of steps")
    samples = tuple(map(max, zip(*(row.samples_ms for row in rows), strict=True)))
    interval = MedianInterval.of(samples)
    marks: tuple[Mark, ...] = tuple(dict.fromkeys(mark for row in rows for mark in row.marks))
    errors = [one.gradient_error for one in scalings if one.gradient_error is not None]
    scaling: Scaling | None = None
    if scalings:
        scaling = replace(
            scalings[0],
            ranks=tuple(rank for one in scalings for rank in one.ranks),
            silent_ms=tuple(map(max, zip(*(one.silent_ms for one in scalings), strict=True))),
            gradient_error=max(errors, default=None),
        )
    return replace(
        first,
        samples_ms=samples,
        memory=max((row.memory for row in rows if row.memory), key=lambda memory: memory.peak or 0, default=None),
        marks=marks,
        timing=first.timing and replace(first.timing, ci_low=interval.low, ci_high=interval.high),
        scaling=scaling,
    )
