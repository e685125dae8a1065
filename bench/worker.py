"""What runs in the process of one case: build, warm up, measure, answer with a row."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.flops import step_flops
from bench.gate import check_against_reference, check_kernels, check_replay, doubts, tune_without_timing
from bench.jobs import Budget, CaseJob, CeilingJob, GateJob, Job, ProbeJob
from bench.kernels import kernel_names
from bench.ledgers import Checks, Memory, Timing
from bench.lifeline import die_with_parent, end_with_parent, give_way
from bench.memory import MemoryMeter
from bench.nvml import Watch
from bench.results import Case, Mark, Row, Status, utc_now
from bench.steps import Step, build_step, capture, capture_stream, warm_up
from bench.timing import Sampled, sample
from dig.ceiling import large_product
from dig.flops import UncountedError
from dig.layers import Backbone
from dig.nvml import Gpu
from dig.packages import MissingPackageError
from dig.registry import ModelSpec, load_source, parse_name

EAGER = Budget(settle_s=0.0, settle_max_s=0.0, min_samples=3, least_s=0.0, target_s=0.1, max_samples=20)
"""How long the step is timed in the execution that is not the case's."""
LEAST_CPUS = 4
"""A step's launches, its backward pass' and the readings of the card's clock have a thread each."""


def measure_ceiling(job: CeilingJob) -> float:
    """FLOP/s of a square matrix product on random data: what a model's share is taken of."""
    run, flops = large_product(job.device, job.dtype)
    budget = Budget(settle_s=0.2, settle_max_s=0.2, min_samples=10, target_s=0.3)
    found = sample(run, device=job.device, budget=budget)
    return flops / (found.interval.median / 1000)


def _versions(case: Case) -> dict[str, Any]:
    """What only a process with torch knows."""
    versions: dict[str, Any] = {"torch": torch.__version__, "float32_matmul": torch.get_float32_matmul_precision()}
    if case.device == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        versions["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    else:
        versions |= {"threads": torch.get_num_threads()}
    return versions


def stay_near(gpu: Gpu | None) -> int | None:
    """Run on the CPUs nearest to the GPU from now on; how many they are, None where nothing had to change.

    On a host of several sockets a process may start far from its GPU and stay there: every launch and every word that
    the GPU fetches from the host's memory would cross between the sockets, in that process and not in the next. Too few
    CPUs would be worse. To be called before CUDA starts.
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


def measure_case(job: CaseJob) -> Row:
    """Build and measure one case in this process. Never raises for what a case can do wrong: that is a row."""
    case, started_at = job.case, utc_now()
    environment = {**job.environment, **_versions(case)}

    def failed(status: Status, message: str) -> Row:
        return Row(
            case=case,
            status=status,
            started_at=started_at,
            message=message,
            environment=environment,
            launch=job.launch,
            key=job.key,
        )

    if missing := parse_name(case.model)[0].missing_packages(dict(case.options)):
        return failed("unsupported", missing)
    try:
        return _measure(job, started_at, environment)
    except Exception as error:
        traceback.print_exc()
        return failed(*failure(error))


def _measure(job: CaseJob, started_at: str, environment: Mapping[str, Any]) -> Row:
    case = job.case
    clock = [time.perf_counter()]
    gpu = Gpu.open() if case.device == "cuda" else None
    if cpus := stay_near(gpu):
        environment = {**environment, "near_cpus": cpus}
    watch = Watch(gpu)  # Before CUDA starts here: what is on the card now is somebody else's.
    meter = MemoryMeter(case.device, gpu)
    step = build_step(case)
    meter.built()
    clock.append(time.perf_counter())

    warm_up(step.run, case.device)
    # Before the graph is captured, which may leave no memory for a step beside it.
    with capture_stream(case.device):
        eager = sample(step.run, device=case.device, budget=EAGER) if case.execution == "graph" else None
    run, memory = _prepare(step, case, meter)
    clock.append(time.perf_counter())

    flush = _l2_flush(memory.allocator_peak) if case.device == "cuda" else None
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
    graph_ms = _graph_ms(step.run) if case.device == "cuda" and case.execution == "eager" else None
    flops, uncounted = _flops(case, step.model)
    start, warmup, measure = (after - before for before, after in pairwise(clock))
    return Row(
        case=case,
        status="ok",
        started_at=started_at,
        samples_ms=tuple(round(x, 5) for x in found.samples_ms),
        memory=memory,
        parameters=sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        flops=flops,
        message=uncounted,
        matmul_ceiling=job.matmul_ceiling,
        implementations=step.model.implementations,
        stop_reason=found.stop_reason,
        seconds={"start": round(start, 3), "warmup": round(warmup, 3), "measure": round(measure, 3)},
        environment=environment,
        launch=job.launch,
        key=job.key,
        marks=tuple(marks),
        timing=_timing(case, found, eager=eager, graph_ms=graph_ms, flushed=flush is not None),
        clocks=watch.clocks() if case.device == "cuda" else None,
        checks=checks,
        look=parse_name(case.model)[0].look,
    )


def _flops(case: Case, model: Backbone) -> tuple[int | None, str]:
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


def _prepare(step: Step, case: Case, meter: MemoryMeter) -> tuple[Callable[[], object], Memory]:
    """The memory pass: one step, captured where the case is a graph; what to time, and the ledger.

    Raises:
        FloatingPointError: The step's result is not finite.
        GateError: The graph's result is another than that of the step launched eagerly.
    """
    meter.start()
    with capture_stream(case.device):
        result = step.run()
    run: Callable[[], object] = step.run
    eager: Tensor | None = None
    if case.execution == "graph":
        eager = result.float().cpu()
        del result  # A live result would keep its memory beside that of the graph's.
        run, result = capture(step.run)
        run()
    memory = meter.read(step.model, step.optimizer)
    if not torch.isfinite(result).all():
        raise FloatingPointError("the step's result is not finite")
    if eager is not None and case.mode == "forward":
        check_replay(eager, result)
    return run, memory


def _l2_flush(working_set: int | None) -> Callable[[], object] | None:
    """What overwrites the L2 cache, for a case whose data would stay in it from one step to the next; else None."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    if working_set is None or working_set > 2 * cache:
        return None
    return torch.empty(2 * cache, dtype=torch.int8, device="cuda").zero_


def _graph_ms(run: Callable[[], Tensor]) -> float | None:
    """The step replayed as a graph; None where it cannot be captured, or does not fit twice."""
    try:
        replay, _ = capture(run)
        replay()
        return sample(replay, device="cuda", budget=EAGER).interval.median
    except RuntimeError:  # torch.OutOfMemoryError is one
        return None


def _timing(case: Case, found: Sampled, *, eager: Sampled | None, graph_ms: float | None, flushed: bool) -> Timing:
    interval = found.interval
    eager_ms = interval.median if case.execution == "eager" else (eager.interval.median if eager else None)
    graph_ms = interval.median if case.execution == "graph" else graph_ms
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


def agree(job: GateJob) -> dict[str, Any]:
    """The gate's comparison on a small input; ``{}`` where the case's model is the reference itself.

    Nothing is raised for what a model can do wrong: ``status`` and ``message`` say it.
    """
    tune_without_timing()
    try:
        found = check_against_reference(job.case)
    except Exception as error:
        traceback.print_exc()
        status, message = failure(error)
        return {"status": status, "message": message}
    return {} if found is None else dataclasses.asdict(found)


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
        _, memory = _prepare(step, job.case, meter)
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


_FULL = (
    "out of memory", "can't allocate memory", "alloc_failed",
    # More than any address: torch's words, and NumPy's.
    "size calculation overflow", "integer multiplication overflow", "array is too big", "maximum allowed dimension",
)  # fmt: skip


def failure(error: BaseException) -> tuple[Status, str]:
    """A row's status and message for what a case raised."""
    if isinstance(error, MissingPackageError):
        return "unsupported", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "oom", str(error).split("\n")[0]
    if isinstance(error, MemoryError):
        return "oom", str(error) or "out of host memory"
    text = f"{type(error).__name__}: {error}"
    # cuDNN, cuBLAS and the CPU allocator report a full memory as a plain RuntimeError.
    return "oom" if any(words in text.lower() for words in _FULL) else "error", text


def _answer(job: Job) -> Any:
    if not isinstance(job, CeilingJob):
        load_source(job.case.source)
    if isinstance(job, CaseJob):
        return measure_case(job).to_json()
    if isinstance(job, GateJob):
        return agree(job)
    return probe(job) if isinstance(job, ProbeJob) else measure_ceiling(job)


def worker_main(connection: Connection, job: Job, errors: str) -> None:
    """Entry of the worker process.

    Args:
        connection: Takes the one answer; `bench.jobs` says what it is.
        job: What to do.
        errors: Path of a file that takes what the process prints to stderr, for the message of a crash.
    """
    end_with_parent()  # In a group of its own, which a time limit ends too.
    die_with_parent()
    give_way()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the harness's to handle.
    try:
        with open(errors, "ab", buffering=0) as stderr:
            os.dup2(stderr.fileno(), 2)
    except FileNotFoundError:
        return  # The harness was interrupted while this process started, and has removed the folder: nobody waits.
    connection.send(_answer(job))
    connection.close()
