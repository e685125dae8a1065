"""A GPU followed through one case: clocks, throttling, other processes. `dig.nvml` asks the driver. No torch here."""

from __future__ import annotations

from collections import Counter
from statistics import median

from bench.store.ledgers import Clocks
from bench.store.rows import Mark
from dig.nvml import Gpu, Reading

FOREIGN_BYTES = 1 << 30
"""Used before a process starts, where process ids are hidden: above this, somebody else is on the card."""


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
        """The most other processes seen on the card; None where NVML hides processes, this one included."""
        counts = [r.processes for r in self.readings if r.processes]
        if self._before:
            return max([self._before, *(count - 1 for count in counts)])
        return max(counts) - 1 if counts else None

    def clocks(self) -> Clocks | None:
        """A summary of the readings; None where there are none."""
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
