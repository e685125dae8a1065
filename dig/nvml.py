"""The GPU as its driver sees it, through NVML: memory, processes, clocks. No torch, no CUDA, no root.

Every question has None for an answer where the driver does not tell: containers hide process ids, and some
virtual machines hide clocks. Nothing here ever changes the card's settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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


def count_gpus() -> int:
    """How many GPUs the driver knows, whatever this process may see; 0 without a driver."""
    try:
        import pynvml
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except (pynvml.NVMLError, OSError):
        return 0


def _visible(place: int) -> str:
    """What `Gpu.open` calls a GPU that this process sees; empty where it sees fewer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(place)
    names = visible.split(",")
    return names[place].strip() if place < len(names) else ""


class Gpu:
    """A GPU: the one that this process computes on, or one that is named."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def open(cls, device: str | None = None, *, place: int = 0) -> Gpu | None:
        """The GPU, or None where there is no driver, no card, or a MIG slice (whose clocks are its card's).

        Args:
            device: A UUID (``GPU-...``) or a number of NVML's; if not given, one of ``CUDA_VISIBLE_DEVICES``.
            place: Which of those: the first, or of several processes that see all alike another one.
        """
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            name = device or _visible(place)
            if name.startswith("GPU-"):
                return cls(pynvml.nvmlDeviceGetHandleByUUID(name.encode()))
            return cls(pynvml.nvmlDeviceGetHandleByIndex(int(name))) if name.isdecimal() else None
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

    def is_divided(self) -> bool:
        """Whether the card is split into MIG slices."""
        import pynvml

        mode = _quietly(pynvml.nvmlDeviceGetMigMode, self._handle)
        return mode is not None and mode[0] == 1

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
