"""What runs in the process of one case: build, warm up, measure, answer with a row."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.cases.jobs import Budget, CaseJob, Phase
from bench.measure.build import compile_in
from bench.measure.clocks import Watch
from bench.measure.failures import failed_row, failure
from bench.measure.flops import step_flops
from bench.measure.memory import MemoryMeter
from bench.measure.profiler import kernel_names
from bench.measure.recheck import look_before, recheck
from bench.measure.steps import Step, build_step, capture, capture_stream, warm_up
from bench.measure.timing import Sampled, sample
from bench.measure.tuners import compile_side_by_side
from bench.measure.versions import versions
from bench.parity.kernels import check_kernels, doubts
from bench.parity.operation import check_operation
from bench.parity.replay import check_replay
from bench.store.ledgers import Checks, Memory, Timing
from bench.store.rows import Mark, Row, utc_now
from dig.flops import UncountedError
from dig.layers import Backbone
from dig.nvml import Gpu
from dig.registry import parse_name
from dig.spec import ModelSpec

EAGER = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, least_s=0.0, target_s=0.1, max_samples=20)
"""How long the step is timed in the execution that is not the case's."""
LEAST_CPUS = 4
"""Fewest CPUs to keep to. A step's launches, those of its backward pass and the clock's readings have a thread each."""


def stay_near(gpu: Gpu | None) -> int | None:
    """Run on the CPUs nearest to the GPU from now on; how many they are, None where nothing had to change.

    On a host of several sockets a process may start far from its GPU and stay there. Every launch, and all that the GPU
    reads of the host's memory, then crosses between the sockets: in that process, and not in the next. Too few CPUs
    would be worse. To be called before CUDA starts.
    """
    near = None if gpu is None else gpu.near_cpus()
    if not near:
        return None
    allowed = os.sched_getaffinity(0)
    chosen = near & allowed
    if chosen == allowed or len(chosen) < LEAST_CPUS:
        return None
    os.sched_setaffinity(0, chosen)
    return len(chosen)


def measure_case(job: CaseJob, tell: Callable[[Phase], None] = lambda phase: None) -> Row:
    """Build and measure one case in this process. A case that fails is a row; nothing is raised for it.

    Args:
        job: What to measure.
        tell: Called with what is done next.
    """
    case, started_at = job.case, utc_now()
    environment = {**job.environment, **versions(case.device)}
    failed = partial(failed_row, job, started_at=started_at, environment=environment)
    if missing := parse_name(case.model)[0].missing_packages(dict(case.options)):
        return failed("unsupported", missing)
    try:
        return _measure(job, started_at, environment, tell)
    except Exception as error:
        traceback.print_exc()
        return failed(*failure(error))


def _measure(job: CaseJob, started_at: str, environment: Mapping[str, Any], tell: Callable[[Phase], None]) -> Row:
    case = job.case
    clock = [time.perf_counter()]
    gpu = Gpu.open() if case.device == "cuda" else None
    if cpus := stay_near(gpu):
        environment = {**environment, "near_cpus": cpus}
    watch = Watch(gpu)  # Before CUDA starts here: what is on the card now is somebody else's.
    meter = MemoryMeter(case.device, gpu)
    tell("building")
    if job.built:
        compile_in(1)
    step = build_step(case)
    meter.built()
    clock.append(time.perf_counter())

    # Kernels are built in the first step: by Triton and its tuners, by Inductor, by FlashAttention 4.
    tell("compiling")
    if case.device == "cuda":
        compile_side_by_side()
    before = look_before(case, step)
    warm_up(step.run, case.device)
    clock.append(time.perf_counter())
    tell("measuring")
    # Before the graph is captured, which may leave no memory for a step beside it.
    with capture_stream(case.device):
        eager = sample(step.run, device=case.device, budget=EAGER) if case.captures else None
    run, memory = prepare(step, case, meter)
    clock.append(time.perf_counter())

    flush = _l2_flush(case.device)
    found = sample(run, device=case.device, budget=job.budget, watch=watch, flush=flush)
    clock.append(time.perf_counter())

    names = kernel_names(run, case.device)
    # No names at all: CUPTI is not allowed here, and the row says that nobody checked.
    checks = Checks(
        inputs=step.inputs,
        tokens=step.model.grid[0] * step.model.grid[1],
        kernels=check_kernels(case, names) if names else (),
    )
    marks: list[Mark] = watch.marks() if case.device == "cuda" else []
    if found.warmup == "bound":
        marks.append("unsteady")
    marks += doubts(case, names)
    if flush is None and fits_in_l2(case, memory.allocator_peak):
        marks.append("l2-warm")
    graph_ms = _graph_ms(step.run) if case.device == "cuda" and case.execution == "eager" else None
    flops, uncounted = count_flops(case, step.model)
    start, compiling, warmup, measure = (after - before for before, after in pairwise(clock))
    model, implementations = step.model, step.model.implementations
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tell("checking")
    try:
        error = recheck(case, step, run, before)
    except torch.OutOfMemoryError:
        error = None
    if error is None or before is None:
        marks.append("not-rechecked")
    checks = replace(checks, recheck_error=error)
    # What was timed goes first: the operation's own reference may need the room.
    del step, run, before
    release(case.device)
    alone = check_operation(case, model)
    if alone is None:
        marks.append("small-parity")
    else:
        checks = replace(checks, operation_error=alone.error, operation_bound=alone.bound)
    return Row(
        case=case,
        status="ok",
        started_at=started_at,
        samples_ms=tuple(round(x, 5) for x in found.samples_ms),
        memory=memory,
        parameters=parameters,
        flops=flops,
        message=uncounted,
        matmul_ceiling=job.matmul_ceiling,
        implementations=implementations,
        stop_reason=found.stop_reason,
        seconds={
            "start": round(start, 3),
            "compile": round(compiling, 3),
            "warmup": round(warmup, 3),
            "measure": round(measure, 3),
        },
        environment=environment,
        launch=job.launch,
        key=job.key,
        marks=tuple(marks),
        timing=timing_of(case, found, eager=eager, graph_ms=graph_ms, flushed=flush is not None),
        clocks=watch.clocks() if case.device == "cuda" else None,
        checks=checks,
        look=parse_name(case.model)[0].look,
    )


def count_flops(case: Case, model: Backbone) -> tuple[int | None, str]:
    """FLOPs of the step, or why nobody counted them; the times are good without."""
    spec = ModelSpec(
        name=case.model,
        options=dict(case.options),
        input_size=model.input_size,
        in_channels=model.in_channels,
        num_classes=model.num_classes,
        source=case.source,
    )
    try:
        return step_flops(spec, batch=case.batch, mode=case.mode), ""
    except UncountedError as error:
        return None, str(error)


def prepare(step: Step, case: Case, meter: MemoryMeter) -> tuple[Callable[[], Tensor], Memory]:
    """The memory pass, one step (captured where the case is a graph): returns what to time, and the ledger.

    Raises:
        FloatingPointError: The step's result is not finite.
        ParityError: The graph's result is another than that of the step launched eagerly.
    """
    meter.start()
    with capture_stream(case.device):
        result = step.run()
    run = step.run
    eager: Tensor | None = None
    if case.captures:
        eager = result.float().cpu()
        del result  # A live result would keep its memory beside that of the graph's.
        replay, written = capture(step.run)

        def run() -> Tensor:
            replay()
            return written

        result = run()
    memory = meter.read(step.model, step.optimizer)
    if not torch.isfinite(result).all():
        raise FloatingPointError("the step's result is not finite")
    if eager is not None and case.mode == "forward":
        check_replay(eager, result)
    return run, memory


def _l2_flush(device: str) -> Callable[[], object] | None:
    """The write that clears the L2 cache before a step, of whatever case; None on a CPU, or where memory lacks.

    Not of small cases alone: wherever the line is drawn, it falls between two models of some comparison.
    """
    if device == "cpu":
        return None
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return torch.empty(2 * cache, dtype=torch.int8, device="cuda").zero_
    except torch.OutOfMemoryError:
        return None


def fits_in_l2(case: Case, working_set: int | None) -> bool:
    """Whether a step's data may stay in the L2 cache until the next."""
    if case.device == "cpu":
        return False
    return working_set is None or working_set <= 2 * torch.cuda.get_device_properties(0).L2_cache_size


def release(device: str) -> None:
    """Give back what nobody holds any more, graphs' memory included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _graph_ms(run: Callable[[], Tensor]) -> float | None:
    """The step replayed as a graph; None where it cannot be captured, or does not fit twice."""
    try:
        replay, _ = capture(run)
        replay()
        return sample(replay, device="cuda", budget=EAGER).interval.median
    except RuntimeError:  # torch.OutOfMemoryError is one
        return None


def timing_of(
    case: Case,
    found: Sampled,
    *,
    eager: Sampled | None = None,
    graph_ms: float | None = None,
    flushed: bool = False,
) -> Timing:
    """How a case was sampled, with what is known of its step in the other execution."""
    interval = found.interval
    eager_ms = interval.median if case.execution == "eager" else (eager.interval.median if eager else None)
    graph_ms = interval.median if case.captures else graph_ms
    share = None if eager_ms is None or graph_ms is None else max(0.0, 1 - graph_ms / eager_ms)
    return Timing(
        warmup=found.warmup,
        warmup_steps=found.warmup_steps,
        ci_low=interval.low,
        ci_high=interval.high,
        host_ms=found.host_ms,
        eager_ms=eager_ms,
        graph_ms=graph_ms,
        launch_share=share,
        l2_flushed=flushed,
    )
