"""The GPU as its driver sees it, through NVML: memory, processes, clocks. No torch, no CUDA, no root.

Every question has None for an answer where the driver does not tell: containers hide process ids, and some
virtual machines hide clocks. Nothing here ever changes the card's settings.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from bench.ledgers import Clocks
from bench.results import Mark

T = TypeVar("T")

POWER_CAP = "sw-power-cap"
# Bits of NVML's clock event reasons that mean the clock is held down. Idle and clocks that the user set are none.
THROTTLE_BITS = {
    0x04: POWER_CAP,
    0x08: "hw-slowdown",
    0x20: "sw-thermal",
    0x40: "hw-thermal",
    0x80: "hw-power-brake",
}
WORD = 64
"""CPUs in a word of NVML's masks."""
FOREIGN_BYTES = 1 << 30
"""Used before a process starts, where process ids are hidden: above this, somebody else is on the card."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One look: clock (MHz), temperature (Celsius), power (W), reasons for a low clock, processes on the card."""

    sm_mhz: int | None = None
    temperature: int | None = None
    power: float | None = None
    reasons: tuple[str, ...] = ()
    processes: int | None = None


def _quietly(question: Callable[..., T], *arguments: Any) -> T | None:
    import pynvml

    try:
        return question(*arguments)
    except (pynvml.NVMLError, AttributeError, UnicodeDecodeError):
        return None


class Gpu:
    """The GPU that CUDA calls device 0 in this process's environment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def open(cls) -> Gpu | None:
        """The GPU, or None where there is no driver, no card, or a MIG slice (whose clocks are its card's)."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            if first.startswith("GPU-"):
                return cls(pynvml.nvmlDeviceGetHandleByUUID(first.encode()))
            return cls(pynvml.nvmlDeviceGetHandleByIndex(int(first))) if first.isdecimal() else None
        except (pynvml.NVMLError, OSError):
            return None

    def describe(self) -> dict[str, Any]:
        """Name, UUID and driver; what the card was set to: its power limit in watts, and whether memory is checked."""
        import pynvml

        watts = _quietly(pynvml.nvmlDeviceGetEnforcedPowerLimit, self._handle)
        checked = _quietly(pynvml.nvmlDeviceGetEccMode, self._handle)
        return {
            "gpu_name": _quietly(pynvml.nvmlDeviceGetName, self._handle),
            "gpu_uuid": _quietly(pynvml.nvmlDeviceGetUUID, self._handle),
            "driver": _quietly(pynvml.nvmlSystemGetDriverVersion),
            "gpu_power_limit": None if watts is None else watts / 1000,
            "gpu_ecc": None if checked is None else bool(checked[0]),
        }

    def _memory(self) -> Any:
        import pynvml

        return _quietly(pynvml.nvmlDeviceGetMemoryInfo, self._handle)

    def used(self) -> int | None:
        """Bytes in use on the device, all processes together."""
        info = self._memory()
        return None if info is None else int(info.used)

    def free(self) -> int | None:
        """Bytes that nobody uses."""
        info = self._memory()
        return None if info is None else int(info.free)

    def processes(self) -> dict[int, int] | None:
        """Process id → bytes (0 where NVML does not say), as NVML numbers them; None where it refuses."""
        import pynvml

        found = _quietly(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        return None if found is None else {int(p.pid): int(p.usedGpuMemory or 0) for p in found}

    def own_bytes(self) -> int | None:
        """Bytes that NVML ascribes to this process; None where it hides process ids."""
        return (self.processes() or {}).get(os.getpid()) or None

    def near_cpus(self) -> frozenset[int] | None:
        """The CPUs of the host that are nearest to the GPU, those of its NUMA node."""
        import pynvml

        words = -(-(os.cpu_count() or 1) // WORD)
        mask = _quietly(pynvml.nvmlDeviceGetCpuAffinity, self._handle, words)
        if mask is None:
            return None
        return frozenset(WORD * i + bit for i, word in enumerate(mask) for bit in range(WORD) if word >> bit & 1)

    def read(self) -> Reading:
        """Look once; some tens of microseconds."""
        import pynvml

        # One call by two names: newer drivers know the first, older ones only the second.
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        asked = (_quietly(ask, self._handle) for name in names if (ask := getattr(pynvml, name, None)) is not None)
        bits = next((bits for bits in asked if bits is not None), 0)
        power = _quietly(pynvml.nvmlDeviceGetPowerUsage, self._handle)
        processes = self.processes()
        return Reading(
            sm_mhz=_quietly(pynvml.nvmlDeviceGetClockInfo, self._handle, pynvml.NVML_CLOCK_SM),
            temperature=_quietly(pynvml.nvmlDeviceGetTemperature, self._handle, pynvml.NVML_TEMPERATURE_GPU),
            power=None if power is None else power / 1000,
            reasons=tuple(name for bit, name in THROTTLE_BITS.items() if bits & bit),
            processes=None if processes is None else len(processes),
        )


class Watch:
    """Follows a GPU through one case. Create it before CUDA starts in this process; call it with steps in flight.

    Args:
        gpu: The GPU, or None: nothing is known then, and the case is marked so.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self.readings: list[Reading] = []
        self.foreign_bytes = gpu.used() if gpu is not None else None
        before = gpu.processes() if gpu is not None else None
        self._before = None if before is None else len(before)

    def __call__(self) -> None:
        """Take a reading."""
        if self._gpu is not None:
            self.readings.append(self._gpu.read())

    def others(self) -> int | None:
        """Other processes on the card, at most; None where NVML hides them: it lists not even this process then."""
        counts = [r.processes for r in self.readings if r.processes]
        if self._before:
            return max([self._before, *(count - 1 for count in counts)])
        return max(counts) - 1 if counts else None

    def clocks(self) -> Clocks | None:
        """What the readings add up to; None where there are none."""
        if not self.readings:
            return None
        mhz = [r.sm_mhz for r in self.readings if r.sm_mhz is not None]
        reasons = Counter(reason for r in self.readings for reason in r.reasons)
        return Clocks(
            readings=len(self.readings),
            sm_mhz_min=min(mhz, default=None),
            sm_mhz_median=round(median(mhz)) if mhz else None,
            sm_mhz_max=max(mhz, default=None),
            temperature_max=max((r.temperature for r in self.readings if r.temperature is not None), default=None),
            power_max=max((r.power for r in self.readings if r.power is not None), default=None),
            throttled={name: round(count / len(self.readings), 3) for name, count in sorted(reasons.items())},
            others=self.others(),
            foreign_bytes=self.foreign_bytes,
        )

    def marks(self) -> list[Mark]:
        """``unwatched``; or ``throttled`` (in at least half of the readings) and ``shared-gpu``, where they apply."""
        if not self.readings:
            return ["unwatched"]
        throttled = sum(bool(r.reasons) for r in self.readings)
        others = self.others()
        shared = others > 0 if others is not None else (self.foreign_bytes or 0) > FOREIGN_BYTES
        marks: list[Mark] = ["throttled"] if 2 * throttled >= len(self.readings) else []
        return [*marks, "shared-gpu"] if shared else marks
