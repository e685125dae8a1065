"""Kernels built before anything is measured: compiling takes one core a case, and a host has many. No torch here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

from bench.cases.case import Case
from bench.cases.jobs import BuildJob, Limits
from bench.run.gpus import Card
from bench.run.process import Worker
from dig.registry import find_family

PAUSE = 0.05


def gains(case: Case) -> bool:
    """Whether building a case ahead spares time: Inductor keeps what it made on the disk.

    What tunes itself is left out: beside others, the published DiG's forward passes took five minutes to time all
    their tiles, and no choice may be kept (`bench.measure.build.keep_no_tuning`). Alone it takes one.
    """
    family = find_family(case.family)
    return case.compiles and family.backend_of(dict(case.options)) not in family.tunes


def build_ahead(
    cases: Iterable[Case],
    *,
    at_once: int,
    limits: Limits,
    on_start: Callable[[Case], None],
    cards: Sequence[Card] = (),
) -> dict[Case, str]:
    """Build the kernels of cases side by side, each in a process of its own, and time nothing.

    A case that fails is none of this function's business: it is built again when it is measured, and its row says why.

    Args:
        cases: Each once; those that gain nothing are left out.
        at_once: Processes.
        limits: After ``prepare`` seconds a process is killed.
        on_start: Told each case as it begins.
        cards: GPUs that take turns; CUDA's first if not given.

    Returns:
        How each went: ``ok``, or a status.
    """
    waiting = [case for case in cases if gains(case)]
    threads = max(1, len(os.sched_getaffinity(0)) // at_once) if hasattr(os, "sched_getaffinity") else 1
    running: dict[Worker, tuple[Case, float]] = {}
    went: dict[Case, str] = {}
    begun = 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                case = waiting.pop(0)
                on_start(case)
                variables = cards[begun % len(cards)].variables if cards else None
                worker = Worker(
                    "bench.run.worker:worker_main", BuildJob(case=case, threads=threads), variables=variables
                )
                running[worker] = case, time.monotonic()
                begun += 1
            for worker, (case, since) in list(running.items()):
                late = time.monotonic() - since > limits.prepare
                if late or worker.answered():
                    went[case] = "timeout" if late else worker.status()
                    worker.end()
                    del running[worker]
            time.sleep(PAUSE)
    finally:
        for worker in running:
            worker.end()
    return went
