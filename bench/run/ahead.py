"""What takes one core a case, and times nothing, done before anything is measured: a host has many. No torch here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

from bench.cases.case import Case
from bench.cases.jobs import BuildJob, Limits, ParityJob
from bench.run.gpus import Card
from bench.run.process import Worker, WorkerError
from bench.run.runner import Findings, agreement_of
from dig.registry import find_family

PAUSE = 0.05


def gains(case: Case) -> bool:
    """Whether building a case ahead spares time: Inductor keeps what it made on the disk.

    What tunes itself is left out: beside others, the published DiG's forward passes took five minutes to time all
    their tiles, and no choice may be kept (`bench.measure.tuners.keep_no_tuning`). Alone it takes one.
    Max-autotune times GEMMs too, and Inductor keeps what it chose with the graph.
    """
    family = find_family(case.family)
    return case.compiles and not case.max_autotune and family.backend_of(dict(case.options)) not in family.tunes


def compared(cases: Iterable[Case]) -> list[Case]:
    """One case for each comparison with a reference: a training one where there is any, which serves forward passes."""
    found: dict[tuple[object, ...], Case] = {}
    for case in cases:
        model = agreement_of(case)[:-1]
        if model not in found or (case.mode, found[model].mode) == ("train", "forward"):
            found[model] = case
    return list(found.values())


def longest_first(cases: Iterable[Case]) -> list[Case]:
    """Whole models before blocks, training before forward passes: a long build begun last would be waited for alone."""
    return sorted(cases, key=lambda case: (case.scope != "model", case.mode != "train"))


def build_ahead(
    cases: Iterable[Case],
    *,
    at_once: int,
    limits: Limits,
    on_start: Callable[[Case, str], None],
    cards: Sequence[Card] = (),
    findings: Findings | None = None,
) -> dict[Case, str]:
    """Build the kernels of cases side by side, each in a process of its own, and time nothing.

    Models are compared with their references likewise. A case that fails is none of this function's business: it is
    built, or compared, again when it is measured, and its row says why.

    Args:
        cases: Each once; those that gain nothing are not built.
        at_once: Processes.
        limits: After ``prepare`` seconds a process is killed.
        on_start: Told each case, and what is done with it, as that begins.
        cards: GPUs that take turns; CUDA's first if not given.
        findings: Takes the agreements that were found; without, nothing is compared.

    Returns:
        How each build went: ``ok``, or a status.
    """
    cases = list(cases)
    threads = max(1, len(os.sched_getaffinity(0)) // at_once) if hasattr(os, "sched_getaffinity") else 1
    jobs: list[BuildJob | ParityJob] = []
    if findings is not None:
        jobs += [ParityJob(case=case) for case in compared(cases) if agreement_of(case) not in findings.agreements]
    jobs += [BuildJob(case=case, threads=threads) for case in longest_first(filter(gains, cases))]
    running: dict[Worker, tuple[BuildJob | ParityJob, float]] = {}
    went: dict[Case, str] = {}
    begun = 0
    try:
        while jobs or running:
            while jobs and len(running) < at_once:
                job = jobs.pop(0)
                on_start(job.case, "building ahead" if isinstance(job, BuildJob) else "comparing with its reference")
                variables = cards[begun % len(cards)].variables if cards else None
                running[Worker("bench.run.worker:worker_main", job, variables=variables)] = job, time.monotonic()
                begun += 1
            for worker, (job, since) in list(running.items()):
                late = time.monotonic() - since > limits.prepare
                if not late and not worker.answered():
                    continue
                if isinstance(job, BuildJob):
                    went[job.case] = "timeout" if late else worker.status()
                elif findings is not None and not late:
                    _keep(findings, job.case, worker)
                worker.end()
                del running[worker]
            time.sleep(PAUSE)
    finally:
        for worker in running:
            worker.end()
    return went


def _keep(findings: Findings, case: Case, worker: Worker) -> None:
    """Keep an agreement; a refusal may be of what ran beside it, and is found again alone."""
    try:
        _, found = worker.answer(0)
    except WorkerError:
        return
    if "message" not in found:
        findings.agreements[agreement_of(case)] = found
