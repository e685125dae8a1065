"""Build a case's kernels without timing them, for the caches that they leave on the disk."""

from __future__ import annotations

import traceback

from bench.cases.case import Case
from bench.measure.failures import failure
from bench.measure.steps import build_step, warm_up
from bench.measure.tuners import keep_no_tuning


def compile_in(threads: int) -> None:
    """Let Inductor compile in so many processes; with 1 in this one, and it starts no others.

    By default it starts one a core, and each imports PyTorch. For seconds they slow what is built beside them, and a
    case whose kernels only have to be read from the disk.
    """
    from torch._inductor import config

    config.compile_threads = threads


def build(case: Case, *, threads: int = 1) -> str:
    """Run a case's step as often as it takes to build its kernels: ``ok``, or the status of what was raised."""
    try:
        compile_in(threads)
        keep_no_tuning()
        warm_up(build_step(case).run, case.device)
    except Exception as error:
        traceback.print_exc()
        return failure(error)[0]
    return "ok"
