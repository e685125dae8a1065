"""Build a case's kernels without timing them, for the caches that they leave on the disk."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from bench.cases.case import Case
from bench.measure.failures import failure
from bench.measure.steps import build_step, warm_up
from dig.packages import is_installed


def keep_no_tuning() -> None:
    """Let Inductor and Triton keep no choice that they make in this process: they time them beside other processes.

    What it compiled is kept; the process that measures makes its own choices among it, alone on the card.
    """
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    # By this name: compiled graphs are kept with their kernels' methods, which are looked up by name later.
    def save(self: object, *choice: Any, **named: Any) -> None:
        return None

    setattr(AutotuneCache, "save", save)  # noqa: B010 - a method, to mypy
    if is_installed("triton"):
        from triton.runtime.autotuner import Autotuner

        # Kernels that tune themselves, as fla's do, keep what they timed where Triton keeps what it compiled.
        def check_disk_cache(self: object, key: object, configs: object, time: Callable[[], object]) -> bool:
            time()
            return False

        setattr(Autotuner, "check_disk_cache", check_disk_cache)  # noqa: B010 - likewise


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
