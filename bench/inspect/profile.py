"""One step under the profiler: time by operation and by kernel, memory over time, share of the roofline.

The step runs eagerly, whatever the case's execution: only then is each kernel's operation known.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases.case import Case, Device
from bench.cases.jobs import Budget, CeilingJob
from bench.inspect.parts import part_of
from bench.inspect.roofline import MOST_SHARE, Cost, cost_of, kernel_costs
from bench.measure.case import count_flops
from bench.measure.ceiling import measure_ceiling
from bench.measure.steps import build_step, warm_up
from bench.measure.timing import sample
from bench.store.profiles import PARTS, Part, PartName, ProfileRow

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a Chrome trace's events that are work on a GPU."""
COPIED_BYTES: Mapping[Device, int] = {"cuda": 1 << 28, "cpu": 1 << 25}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operation or kernel of a step.

    Attributes:
        name: In full.
        calls: In the step.
        us: Microseconds, all calls together: on the device, or of the operator's own on a CPU.
        cost: The least work of the operations behind it, as far as it is known.
        share: Of the roofline that this work and the time make, 0 to 1 or little above; None where no work is known, or
            its data was in a cache.
    """

    name: str
    calls: int
    us: float
    cost: Cost = field(default_factory=Cost)
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one step did.

    Attributes:
        case: Which.
        operations, kernels: By falling time.
        memory: Seconds since the step's start, and bytes allocated since it.
        flop_rate, byte_rate: The measured ceilings: a large matrix product's, and a large copy's.
        wall_us: The step's length on the host's clock, the profiler's own cost included.
        parts: Products, heart and rest.
        flops: Of the step in full, by `bench.measure.flops`; of the operations whose work is known where its operations
            cannot be counted.
    """

    case: Case
    operations: tuple[Entry, ...]
    kernels: tuple[Entry, ...]
    memory: tuple[tuple[float, int], ...]
    flop_rate: float
    byte_rate: float
    wall_us: float
    parts: tuple[Part, ...] = ()
    flops: float = 0.0

    def row(self, environment: Mapping[str, Any], started_at: str) -> ProfileRow:
        """What is kept of it beside other steps'."""
        return ProfileRow(
            case=self.case,
            started_at=started_at,
            parts=self.parts,
            flops=self.flops,
            bytes=sum(entry.cost.bytes for entry in self.operations),
            flop_rate=self.flop_rate,
            byte_rate=self.byte_rate,
            wall_us=self.wall_us,
            environment=environment,
        )


def copy_rate(device: Device) -> float:
    """Bytes a second, read plus written, of a large copy."""
    source = torch.randint(0, 255, (COPIED_BYTES[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    budget = Budget(settle_s=0.1, settle_max_s=0.1, min_samples=10, least_s=0.0, target_s=0.3)
    return 2e3 * source.nbytes / sample(lambda: target.copy_(source), device=device, budget=budget).interval.median


def profile_case(case: Case, trace: Path) -> Profile:
    """Build a case in this process and profile one step of it.

    Args:
        case: Which.
        trace: Takes the Chrome trace (for chrome://tracing or ui.perfetto.dev).
    """
    rates = measure_ceiling(CeilingJob(device=case.device, dtype=case.dtype)), copy_rate(case.device)
    step = build_step(case)
    warm_up(step.run, case.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device == "cuda" else [])
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        begin = time.perf_counter()
        step.run()
        if case.device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if "ts" in e]
    operations, kernels = read_events(events, device=case.device)
    counted, _ = count_flops(case, step.model)
    return Profile(
        case=case,
        operations=_ranked(operations, rates),
        kernels=_ranked(kernels, rates),
        memory=memory_timeline(events, device=case.device),
        flop_rate=rates[0],
        byte_rate=rates[1],
        wall_us=1e6 * wall,
        parts=read_parts(events, device=case.device),
        flops=float(counted or sum(cost.flops for _, _, cost in operations.values())),
    )


Tally = dict[str, tuple[int, float, Cost]]


def read_events(events: Iterable[Mapping[str, Any]], *, device: Device) -> tuple[Tally, Tally]:
    """Calls, microseconds and least work by operation and by kernel, from a Chrome trace's events.

    On a CPU an operator is its own kernel; its time is its duration less its callees'. Where an operation launches
    several kernels, its work counts for the longest, if that takes most of the time (a GEMM and the sum of its parts),
    or each kernel's share is known (DiG's recurrence). Else no kernel gets any.
    """
    events = list(events)
    found = [e for e in events if e.get("cat") == "cpu_op" and e.get("ph") == "X"]
    launched: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ON_DEVICE:
            launched[event["args"].get("External id")].append(event)
    own = _self_times(found) if device == "cpu" else {}
    operations: Tally = {}
    kernels: Tally = {}
    for op in found:
        ran = launched.pop(op["args"].get("External id"), [])
        us = own[id(op)] if device == "cpu" else sum(e["dur"] for e in ran)
        if us <= 0:
            continue
        cost = cost_of(op["name"], op["args"].get("Input Dims", []), op["args"].get("Input type", []))
        _count(operations, op["name"], us, cost)
        longest = max(ran, key=lambda e: e["dur"], default=None)
        parts = kernel_costs(op["name"], op["args"].get("Input Dims", []), op["args"].get("Input type", []))
        for event in ran:
            does_it = not parts and event is longest and 2 * event["dur"] >= us
            _count(kernels, event["name"], event["dur"], cost if does_it else parts.get(event["name"], Cost()))
    for event in (e for rest in launched.values() for e in rest):
        _count(kernels, event["name"], event["dur"], Cost())
    return operations, (operations if device == "cpu" else kernels)


def read_parts(events: Iterable[Mapping[str, Any]], *, device: Device) -> tuple[Part, ...]:
    """The step's parts, from a Chrome trace's events; on a CPU an operator's own time counts."""
    events = list(events)
    found = [e for e in events if e.get("cat") == "cpu_op" and e.get("ph") == "X"]
    nobody: Mapping[str, Any] = {"name": "", "args": {}}
    pairs: list[tuple[Mapping[str, Any], str, float]]
    if device == "cpu":
        own = _self_times(found)
        pairs = [(op, op["name"], own[id(op)]) for op in found if own[id(op)] > 0]
    else:
        by_id = {op["args"].get("External id"): op for op in found}
        ran = [event for event in events if event.get("cat") in ON_DEVICE]
        pairs = [(by_id.get(event["args"].get("External id"), nobody), event["name"], event["dur"]) for event in ran]
    totals: dict[PartName, tuple[float, int]] = dict.fromkeys(PARTS, (0.0, 0))
    for op, kernel, us in pairs:
        part = part_of(op["name"], kernel, op["args"].get("Input Dims", ()))
        totals[part] = (totals[part][0] + us, totals[part][1] + 1)
    return tuple(Part(name=name, us=us, calls=calls) for name, (us, calls) in totals.items())


def _count(tally: Tally, name: str, us: float, cost: Cost) -> None:
    calls, total, work = tally.get(name, (0, 0.0, Cost()))
    tally[name] = (calls + 1, total + us, work + cost)


def _self_times(operators: list[Mapping[str, Any]]) -> dict[int, float]:
    """Each operator's duration less those of the operators that it called, by `id`; threads apart."""
    own = {id(op): float(op["dur"]) for op in operators}
    open_ops: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for op in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_ops[op.get("tid")]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= op["ts"]:
            stack.pop()
        if stack:
            own[id(stack[-1])] -= op["dur"]
        stack.append(op)
    return own


def memory_timeline(events: Iterable[Mapping[str, Any]], *, device: Device) -> tuple[tuple[float, int], ...]:
    """Seconds and bytes since the first allocation that the trace saw, one point for each allocation and release."""
    kind = 1 if device == "cuda" else 0
    found = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == kind]
    changes = sorted(found, key=lambda e: e["ts"])  # A trace lists them thread by thread: autograd's is not the step's.
    level, points = 0, []
    for event in changes:
        level += event["args"]["Bytes"]
        points.append(((event["ts"] - changes[0]["ts"]) / 1e6, level))
    return tuple(points)


def _ranked(tally: Tally, rates: tuple[float, float]) -> tuple[Entry, ...]:
    entries = []
    for name, (calls, us, cost) in tally.items():
        share = cost.least_us(*rates) / us
        entries.append(
            Entry(name=name, calls=calls, us=us, cost=cost, share=share if 0 < share <= MOST_SHARE else None)
        )
    return tuple(sorted(entries, key=lambda entry: -entry.us))
