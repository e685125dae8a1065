"""A case's kernels, built and timed by nobody: what they leave in the caches on the disk is all that is wanted."""

from __future__ import annotations

import traceback
from typing import Any

from bench.cases.case import Case
from bench.measure.failures import failure
from bench.measure.steps import build_step, warm_up


def keep_no_tuning() -> None:
    """Let Inductor keep none of the choices that it makes in this process: it times them beside other processes.

    What it compiled is kept; the process that measures makes its own choices among it, alone on the card.
    """
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    def forget(self: object, *choice: Any, **named: Any) -> None:
        return None

    setattr(AutotuneCache, "save", forget)  # noqa: B010 - a method, to mypy


def build(case: Case) -> str:
    """Run a case's step as often as it takes to build its kernels: ``ok``, or the status of what was raised."""
    try:
        keep_no_tuning()
        warm_up(build_step(case).run, case.device)
    except Exception as error:
        traceback.print_exc()
        return failure(error)[0]
    return "ok"
