"""What fits: the largest batch at a resolution, the largest resolution at a batch, by bisection. No torch here.

Each probe is a process of its own that runs the case's step as often as its memory needs to settle. Bisection takes for
granted that what does not fit does not fit larger either; a probe that fails in another way than by memory ends the
search with its message, for then nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.jobs import ProbeJob
from bench.models import VAE_FACTOR
from bench.results import Case
from bench.runner import WorkerError, run_job

MOST_BATCH = 1 << 16
MOST_RESOLUTION = 1 << 14


class CapacityError(RuntimeError):
    """A probe failed otherwise than by memory; the message is its."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One try: the case, whether it fit, and the bytes at its peak (None where it did not fit)."""

    case: Case
    fits: bool
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The largest value that fits, None where not even the smallest does, and every probe in order.

    ``bounded``: the search's upper end fits, so that the true answer may be larger.
    """

    largest: int | None
    probes: tuple[Probe, ...]
    bounded: bool = False


def probe_case(case: Case, *, limit: int | None, time_limit: float) -> Probe:
    """Try a case in a process of its own, which may take ``limit`` bytes.

    Raises:
        CapacityError: It failed otherwise than by memory.
    """
    try:
        answer = run_job(ProbeJob(case=case, limit=limit), time_limit=time_limit)
    except WorkerError as error:
        # The kernel's out-of-memory killer is how a host says no; a time limit is not.
        if "SIGKILL" not in str(error):
            raise CapacityError(f"{case.describe()}: {error}") from None
        answer = {"status": "oom"}
    if answer["status"] not in ("ok", "oom"):
        raise CapacityError(f"{case.describe()}: {answer['message']}")
    fits = answer["status"] == "ok"
    return Probe(case=case, fits=fits, peak=(answer["allocator_peak"] or answer["process_peak"]) if fits else None)


def largest_that_fits(fits: Callable[[int], bool], *, most: int) -> tuple[int, bool]:
    """The largest n from 1 to ``most`` that fits, 0 where none does, and whether ``most`` itself fits.

    Doubles until something does not fit, then halves the gap: about 2 log2(n) tries, few of them far too large.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    if low == most:
        return most, True
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, low == most


def _search(
    case_of: Callable[[int], Case], *, most: int, probe: Callable[[Case], Probe]
) -> tuple[int, bool, list[Probe]]:
    probes: list[Probe] = []

    def fits(n: int) -> bool:
        probes.append(probe(case_of(n)))
        return probes[-1].fits

    largest, bounded = largest_that_fits(fits, most=most)
    return largest, bounded, probes


def largest_batch(case: Case, probe: Callable[[Case], Probe], *, most: int = MOST_BATCH) -> Capacity:
    """The largest batch of a case's model at its resolution."""
    largest, bounded, probes = _search(lambda n: replace(case, batch=n), most=most, probe=probe)
    return Capacity(largest=largest or None, probes=tuple(probes), bounded=bounded)


def largest_resolution(case: Case, probe: Callable[[Case], Probe], *, most: int = MOST_RESOLUTION) -> Capacity:
    """The largest side in pixels of a case's model at its batch, in whole patches."""
    step = VAE_FACTOR * case.patch
    largest, bounded, probes = _search(
        lambda n: replace(case, resolution=n * step), most=max(1, most // step), probe=probe
    )
    return Capacity(largest=largest * step or None, probes=tuple(probes), bounded=bounded)
