"""The memory of a case: torch's allocator, and the process as the driver or the kernel sees it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from bench.results import Memory


def _nvml_used(device: int = 0) -> tuple[int | None, int]:
    """Bytes that NVML ascribes to this process (None where it hides process ids), and bytes used on the device."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(device)
        used = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory), used
        return None, used
    finally:
        pynvml.nvmlShutdown()


def _reset_peak_resident() -> None:
    """Forget the process's peak resident set, so that the next reading is of what follows (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # The peak then includes the imports: a larger figure, never a smaller one.


def _peak_resident() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


class MemoryMeter:
    """Follows one case from before its model is built. Create it first, `start` it after warm-up, `read` it last.

    On a GPU the figures are the allocator's. Nothing is given back to the driver while steps run, so that what NVML
    reads at the end is the peak.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = _nvml_used()[1] if device == "cuda" else 0
        self.resident: int | None = None

    def built(self) -> None:
        """Note what model and inputs take, before the first step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.resident = torch.cuda.memory_allocated()

    def start(self) -> None:
        """Forget the peaks so far: kernels that tune themselves in the first steps allocate scratch of their own."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak_resident()

    def read(self, model: nn.Module) -> Memory:
        """The ledger of everything since `start`."""
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        if self.device == "cpu":
            return Memory(parameters=parameters, process_peak=_peak_resident(), process_source="vm-hwm")
        torch.cuda.synchronize()
        process, used = _nvml_used()
        return Memory(
            parameters=parameters,
            resident=self.resident,
            allocator_peak=torch.cuda.max_memory_allocated(),
            reserved_peak=torch.cuda.max_memory_reserved(),
            process_peak=process if process is not None else max(0, used - self.before),
            process_source="nvml-process" if process is not None else "nvml-device-delta",
        )
