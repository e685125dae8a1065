"""One step's kernels in the order in which they ran, with the gaps between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases.case import Case
from bench.inspect.kernels import step_of
from bench.inspect.profile import ON_DEVICE
from bench.measure.profiler import short_name

STEPS = 3
"""Traced; the last is shown, for the first waits for the profiler."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One kernel's, copy's or memset's time on the device.

    Attributes:
        name: As `bench.measure.profiler.short_name` gives it.
        stream: On which it ran.
        start_us: Since the step's first kernel began.
        us: How long it took.
        gap_us: From the end of all that began before it; negative where something of that still ran.
    """

    name: str
    stream: int
    start_us: float
    us: float
    gap_us: float


def spans_of(events: Iterable[Mapping[str, Any]], *, steps: int) -> list[Span]:
    """The last of so many equal steps, from a Chrome trace's events."""
    found = sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    if steps < 1 or len(found) % steps:
        raise ValueError(f"{len(found)} kernels are not {steps} equal steps; the profiler lost some, run it again")
    spans: list[Span] = []
    last = found[len(found) - len(found) // steps :]
    end = last[0]["ts"] if last else 0.0
    for event in last:
        spans.append(
            Span(
                name=short_name(event["name"]),
                stream=int(event["args"].get("stream", 0)),
                start_us=event["ts"] - last[0]["ts"],
                us=event["dur"],
                gap_us=event["ts"] - end,
            )
        )
        end = max(end, event["ts"] + event["dur"])
    return spans


def timeline_of_case(case: Case) -> list[Span]:
    """Build a case in this process, on a GPU, and trace its step."""
    run = step_of(case)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return spans_of(json.loads(trace.read_text())["traceEvents"], steps=STEPS)
