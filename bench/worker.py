"""What runs in the process of one case: build, warm up, measure, answer with a row."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import traceback
from collections.abc import Mapping
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.flops import step_flops
from bench.jobs import Budget, CaseJob, CeilingJob
from bench.memory import MemoryMeter
from bench.models import missing_packages, parse_name
from bench.results import Case, Row, utc_now
from bench.steps import build_step, capture, capture_stream, warm_up
from bench.timing import sample
from dig.packages import MissingPackageError

CEILING_SIDE = {"cuda": 8192, "cpu": 1024}
_PR_SET_PDEATHSIG = 1


def measure_ceiling(job: CeilingJob) -> float:
    """FLOP/s of a square matrix product on random data: what a model's share is taken of."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job.dtype]
    side = CEILING_SIDE[job.device]
    a, b = torch.randn(2, side, side, device=job.device).to(dtype).unbind(0)
    times, _ = sample(lambda: a @ b, device=job.device, budget=Budget(settle_s=0.2, min_samples=10, target_s=0.3))
    return 2 * side**3 / (sorted(times)[len(times) // 2] / 1000)


def _versions(case: Case) -> dict[str, Any]:
    """What only a process with torch knows."""
    versions: dict[str, Any] = {"torch": torch.__version__, "float32_matmul": torch.get_float32_matmul_precision()}
    if case.device == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        versions["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    else:
        versions |= {"threads": torch.get_num_threads()}
    return versions


def measure_case(job: CaseJob) -> Row:
    """Build and measure one case in this process. Never raises for what a case can do wrong: that is a row."""
    case, started_at = job.case, utc_now()
    environment = {**job.environment, **_versions(case)}

    def failed(status: Any, message: str) -> Row:
        return Row(case=case, status=status, started_at=started_at, message=message, environment=environment)

    missing = missing_packages(parse_name(case.model)[0], dict(case.options))
    if missing:
        return failed("unsupported", missing)
    try:
        return _measure(job, started_at, environment)
    except MissingPackageError as error:
        return failed("unsupported", str(error))
    except torch.OutOfMemoryError as error:
        return failed("oom", str(error).split("\n")[0])
    except MemoryError as error:
        return failed("oom", str(error) or "out of host memory")
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        # cuDNN, cuBLAS and the CPU allocator report a full memory as a plain RuntimeError.
        full = any(word in text.lower() for word in ("out of memory", "can't allocate memory", "alloc_failed"))
        traceback.print_exc()
        return failed("oom" if full else "error", text)


def _measure(job: CaseJob, started_at: str, environment: Mapping[str, Any]) -> Row:
    case = job.case
    clock = [time.perf_counter()]
    meter = MemoryMeter(case.device)
    step = build_step(case)
    meter.built()
    clock.append(time.perf_counter())

    warm_up(step.run, case.device)
    meter.start()
    with capture_stream(case.device):
        result = step.run()
    run: Any = step.run
    if case.execution == "graph":
        del result  # A live result would keep its memory beside that of the graph's.
        run, result = capture(step.run)
        run()
    memory = meter.read(step.model)
    if not torch.isfinite(result).all():
        raise FloatingPointError("the step's result is not finite")
    clock.append(time.perf_counter())

    samples, stop_reason = sample(run, device=case.device, budget=job.budget)
    clock.append(time.perf_counter())
    start, warmup, measure = (after - before for before, after in pairwise(clock))
    return Row(
        case=case,
        status="ok",
        started_at=started_at,
        samples_ms=tuple(round(x, 5) for x in samples),
        memory=memory,
        parameters=sum(p.numel() for p in step.model.parameters() if p.requires_grad),
        flops=step_flops(step.model, batch=case.batch, mode=case.mode),
        matmul_ceiling=job.matmul_ceiling,
        implementations=step.model.implementations,
        stop_reason=stop_reason,
        seconds={"start": round(start, 3), "warmup": round(warmup, 3), "measure": round(measure, 3)},
        environment=environment,
    )


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that forked it is gone, so that no orphan holds the GPU."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # Not Linux: the harness's own clean-up is all there is.


def worker_main(connection: Connection, job: CaseJob | CeilingJob, errors: str) -> None:
    """Entry of the worker process.

    Args:
        connection: Takes the one answer: a row as JSON, or a float.
        job: What to do.
        errors: Path of a file that takes what the process prints to stderr, for the message of a crash.
    """
    os.setsid()  # A group of its own, so that a time limit ends it together with its children.
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the harness's to handle.
    try:
        with open(errors, "ab", buffering=0) as stderr:
            os.dup2(stderr.fileno(), 2)
    except FileNotFoundError:
        return  # The harness was interrupted while this process started, and has removed the folder: nobody waits.
    answer = measure_case(job).to_json() if isinstance(job, CaseJob) else measure_ceiling(job)
    connection.send(answer)
    connection.close()
