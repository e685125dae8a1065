"""Kernels that tune themselves, as fla's do: what they build and time in which process, and what of it is kept.

Triton's tuner compiles a kernel with each of its tiles, times each, and keeps the fastest. fla's kernels have up to 108
choices: on a machine that has compiled none of them, one after the other takes minutes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dig.packages import is_installed

Timed = Callable[[Any, Callable[[], list[float]], dict[str, Any], tuple[Any, ...], dict[str, Any]], list[float]]
"""What times one choice of tiles: of the tuner, the timing itself, what is known of this tuning, and the arguments."""
MOST_THREADS = 32
"""Compilations at once, at most: each takes some hundred megabytes of the host's memory."""


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
        _keep_no_tiles()


def _keep_no_tiles() -> None:
    """Let Triton's tuner neither read nor write what was timed, which it keeps where it keeps what it compiled."""
    from triton.runtime.autotuner import Autotuner

    def check_disk_cache(self: object, key: object, configs: object, time: Callable[[], object]) -> bool:
        time()
        return False

    setattr(Autotuner, "check_disk_cache", check_disk_cache)  # noqa: B010 - a method, to mypy


def take_first_tiles() -> None:
    """Let kernels that tune themselves take the first tiles that run, in this process and nowhere else.

    For a check that times nothing; other tiles are neither compiled nor run. fla keeps what its tuner chose in a cache
    on the disk, by keys in which the number of tokens is missing: the tiles that run first on the check's small input
    would be those of every case measured after it. So nothing is kept, whoever has imported fla already.
    """
    os.environ["FLA_CACHE_RESULTS"] = "0"
    if not is_installed("triton"):
        return
    _keep_no_tiles()
    from triton.runtime.autotuner import Autotuner

    def run_once(call: Callable[[], object], quantiles: Iterable[float]) -> list[float]:
        call()
        return [1.0 for _ in quantiles]

    # A property goes before what instances keep, or are given, of the attribute that it replaces.
    Autotuner.do_bench = property(lambda self: run_once, lambda self, given: None)

    def until_one_runs(times: Callable[[], list[float]], tuning: dict[str, Any]) -> list[float]:
        if tuning.get("runs"):
            return [math.inf] * 3
        found = times()
        tuning["runs"] = math.isfinite(found[0])
        return found

    _in_each_tuning(lambda tuner, times, tuning, args, named: until_one_runs(times, tuning))


def compile_side_by_side(threads: int | None = None) -> None:
    """Let kernels that tune themselves compile all their tiles at once before they time the first, in this process.

    Which tiles are timed, how, and which are chosen stays the tuner's. Tiles that do not compile are tried again by it,
    and refused as they always are. Nothing compiles any more while it times.

    Args:
        threads: How many compile at once; those of the cores that this process may use if not given.
    """
    at_once = min(MOST_THREADS, threads or len(os.sched_getaffinity(0)))
    try:
        from triton import knobs
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
    except ImportError:  # An older Triton, or none: tiles are compiled in their turn.
        return
    if at_once < 2 or knobs.runtime.interpret:
        return

    def compile_all(tuner: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        outside = active_mode.get()
        try:
            with ThreadPoolExecutor(at_once) as pool, AsyncCompileMode(pool, ignore_errors=True):
                for tiles in tuner.prune_configs(named):
                    tuner.fn.run(*args, **{**named, **tiles.all_kwargs(), "warmup": True})
        finally:
            active_mode.set(outside)  # Which it leaves undone where a hook raises.

    def then_time(
        tuner: Any, times: Callable[[], list[float]], tuning: dict[str, Any], args: Any, named: Any
    ) -> list[float]:
        if not tuning.get("compiled"):
            tuning["compiled"] = True
            try:
                compile_all(tuner, args, named)
            except Exception as error:  # Whatever it was, the tuner meets it again, or need not.
                warnings.warn(f"tiles are compiled one by one: {error}", stacklevel=2)
        return times()

    _in_each_tuning(then_time)


def _in_each_tuning(timed: Timed) -> None:
    """Call ``timed`` in place of each timing of tiles, with what does it, and a dict that is one kernel's tuning's."""
    from triton.runtime.autotuner import Autotuner

    run, bench = Autotuner.run, Autotuner._bench
    if run.__module__ == __name__:
        return  # Once a process.

    def begin(self: Any, *args: Any, **named: Any) -> Any:
        self.tuning = {}
        return run(self, *args, **named)

    def time(self: Any, *args: Any, config: Any, **named: Any) -> list[float]:
        return timed(self, lambda: list(bench(self, *args, config=config, **named)), self.tuning, args, named)

    Autotuner.run, Autotuner._bench = begin, time
