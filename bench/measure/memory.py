"""The memory of a case: torch's allocator, and the process as the driver or the kernel sees it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.store.ledgers import Memory
from dig.nvml import Gpu


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

    def __init__(self, device: str, gpu: Gpu | None = None) -> None:
        self.device = device
        self._gpu = gpu
        self._before = gpu.used() if gpu is not None else None
        self.resident: int | None = None
        self.context: int | None = None
        if device == "cuda":
            torch.zeros(1, device=device)
            torch.cuda.synchronize()
            taken, _ = self._process()
            self.context = None if taken is None else max(0, taken - torch.cuda.memory_reserved())

    def _process(self) -> tuple[int | None, str | None]:
        """Bytes of this process on the device, and where the figure is from."""
        if self._gpu is None:
            return None, None
        own = self._gpu.own_bytes()
        if own is not None:
            return own, "nvml-process"
        used = self._gpu.used()
        if used is None or self._before is None:
            return None, None
        return max(0, used - self._before), "nvml-device-delta"

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

    def read(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Memory:
        """The ledger of everything since `start`; the last step's gradients are still there."""
        parameters = _bytes(model.parameters())
        gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
        states = [] if optimizer is None else [x for state in optimizer.state.values() for x in state.values()]
        kept = _bytes(x for x in states if isinstance(x, Tensor))
        if self.device == "cpu":
            return Memory(
                parameters=parameters,
                gradients=gradients,
                optimizer=kept,
                process_peak=_peak_resident(),
                process_source="vm-hwm",
            )
        torch.cuda.synchronize()
        process, source = self._process()
        peak = torch.cuda.max_memory_allocated()
        return Memory(
            parameters=parameters,
            gradients=gradients,
            optimizer=kept,
            resident=self.resident,
            activations=None if self.resident is None else max(0, peak - self.resident - kept),
            allocator_peak=peak,
            reserved_peak=torch.cuda.max_memory_reserved(),
            context=self.context,
            process_peak=process,
            process_source=source,
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    # Of a tensor that ranks share, what lies here.
    here = (x.to_local() if hasattr(x, "to_local") else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in here)
