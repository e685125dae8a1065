"""What fits: the largest batch at a resolution, the largest resolution at a batch, by bisection. No torch here.

The peaks of what fits say where to look first. Each probe is a process of its own that runs the case's step as often as
its memory needs to settle. Bisection assumes that nothing larger fits where a smaller case doesn't. A probe that fails
otherwise than by memory ends the search with its message, for then nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.cases.case import Case
from bench.cases.jobs import Limits, ProbeJob
from bench.run.process import WorkerError
from bench.run.runner import run_job
from dig.nvml import Gpu
from dig.spec import VAE_FACTOR

CONTEXT = 600 << 20
"""About what CUDA takes of a GPU for a process, in bytes."""
MOST_BATCH = 1 << 16
MOST_RESOLUTION = 1 << 14


class CapacityError(RuntimeError):
    """A probe failed otherwise than by memory; the message is the probe's."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One try: the case, whether it fit, and the bytes at its peak (None where it did not fit)."""

    case: Case
    fits: bool
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The largest value that fits (None where the smallest does not), and every probe in order.

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
        answer = run_job(ProbeJob(case=case, limit=limit), limits=Limits(prepare=time_limit, measure=time_limit))
    except WorkerError as error:
        # The kernel's out-of-memory killer is how a host says no; a time limit is not.
        if "SIGKILL" not in str(error):
            raise CapacityError(f"{case.describe()}: {error}") from None
        answer = {"status": "oom"}
    if answer["status"] not in ("ok", "oom"):
        raise CapacityError(f"{case.describe()}: {answer['message']}")
    fits = answer["status"] == "ok"
    return Probe(case=case, fits=fits, peak=(answer["allocator_peak"] or answer["process_peak"]) if fits else None)


def room_on_gpu() -> int | None:
    """Bytes that a process' tensors may take on the GPU now; None where NVML does not say."""
    gpu = Gpu.open()
    free = None if gpu is None else gpu.free()
    return None if free is None else free - CONTEXT


def largest_that_fits(
    peak_of: Callable[[int], int | None], *, most: int, room: int | None = None, power: int = 1
) -> tuple[int, bool]:
    """The largest n from 1 to ``most`` that fits, 0 where none does, and whether ``most`` itself fits.

    Doubles n, or goes at once where the peaks of what fits point to: they grow about linearly. The first that does not
    fit is then not far from the edge, for what the peaks leave out (fragments, a graph's own memory) is little: one is
    taken back, a sixty-fourth, twice that, and so on, until something fits, and the gap between the two is halved.
    About 2 log2(n) tries are needed at most.

    Args:
        peak_of: Tries n; its peak in bytes where it fits, 0 where nobody knows the peak, None where it does not fit.
        most: Where the search ends.
        room: Bytes that there are, as far as they are known.
        power: The peak grows with n to this power.
    """
    fitting: list[tuple[int, int]] = []
    low, high, back = 0, most + 1, 0
    while high - low > 1:
        pointed = None
        if high <= most:
            n = max(high - back, (low + high) // 2) if back else (low + high) // 2
        else:
            pointed = _extrapolated(fitting, room, power)
            # As long as nothing failed, what lies far beyond the tried is no more than a direction.
            n = min(max(pointed or 2 * low, low + 1), most, max(1, 8 * low))
        peak = peak_of(n)
        if peak is not None:
            low, back = n, 0
            fitting.append((n, peak))
        else:
            if high > most:
                back = int(pointed is not None)
            elif back:
                back = max(2 * back, n // 64)
            high = n
    return low, low == most


def _extrapolated(fitting: list[tuple[int, int]], room: int | None, power: int) -> int | None:
    """Where the line through the last two peaks reaches the room; None where it does not."""
    if room is None or len(fitting) < 2:
        return None
    (n, before), (m, peak) = sorted(fitting)[-2:]
    slope = (peak - before) / (m**power - n**power)
    return int((m**power + (room - peak) / slope) ** (1 / power)) if slope > 0 and room > peak else None


def _search(
    case_of: Callable[[int], Case], *, most: int, probe: Callable[[Case], Probe], room: int | None, power: int
) -> tuple[int, bool, list[Probe]]:
    probes: list[Probe] = []

    def peak_of(n: int) -> int | None:
        probes.append(probe(case_of(n)))
        return (probes[-1].peak or 0) if probes[-1].fits else None

    largest, bounded = largest_that_fits(peak_of, most=most, room=room, power=power)
    return largest, bounded, probes


def largest_batch(
    case: Case, probe: Callable[[Case], Probe], *, most: int = MOST_BATCH, room: int | None = None
) -> Capacity:
    """The largest batch of a case's model at its resolution; ``room``: bytes that there are, which spares tries."""
    largest, bounded, probes = _search(lambda n: replace(case, batch=n), most=most, probe=probe, room=room, power=1)
    return Capacity(largest=largest or None, probes=tuple(probes), bounded=bounded)


def largest_resolution(
    case: Case, probe: Callable[[Case], Probe], *, most: int = MOST_RESOLUTION, room: int | None = None
) -> Capacity:
    """The largest side in pixels of a case's model at its batch, in whole patches; ``room`` as above."""
    step = VAE_FACTOR * case.patch
    largest, bounded, probes = _search(
        lambda n: replace(case, resolution=n * step), most=max(1, most // step), probe=probe, room=room, power=2
    )
    return Capacity(largest=largest * step or None, probes=tuple(probes), bounded=bounded)
