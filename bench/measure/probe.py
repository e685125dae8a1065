"""Whether a case fits: its memory ledger, with nothing timed."""

from __future__ import annotations

import dataclasses
import os
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.cases.jobs import ProbeJob
from bench.measure.case import prepare
from bench.measure.failures import failure
from bench.measure.memory import MemoryMeter
from bench.measure.steps import build_step, warm_up
from dig.nvml import Gpu


def probe(job: ProbeJob) -> dict[str, Any]:
    """Run a step as often as its memory needs to settle; the ledger, or ``status`` and ``message``."""
    try:
        if job.limit is not None:
            _limit_memory(job.case.device, job.limit)
        gpu = Gpu.open() if job.case.device == "cuda" else None
        meter = MemoryMeter(job.case.device, gpu)
        step = build_step(job.case)
        meter.built()
        warm_up(step.run, job.case.device)
        _, memory = prepare(step, job.case, meter)
    except Exception as error:
        traceback.print_exc()
        status, message = failure(error)
        return {"status": status, "message": message}
    return {"status": "ok", **dataclasses.asdict(memory)}


def _limit_memory(device: str, limit: int) -> None:
    """Let this process take so many bytes: of the device through torch's allocator, of the host's address space."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
        return
    import resource

    # What is mapped already, code and libraries, is not the case's.
    mapped = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limit, mapped + limit))
