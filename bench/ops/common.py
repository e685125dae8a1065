"""What the benchmarks of single operations share: input sets, graphs, times, rows.

A step is captured several times in one CUDA graph, so that launches don't count, and a sample is one replay divided by
that number. "cold" steps take turns among input sets that together exceed the L2 cache several times, as in a model,
whose layers touch other memory in between; "hot" steps share one set.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.store.files import append_line
from dig.graphs import on_capture_stream, record

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("forward", "forward+backward")

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Times:
    """How a case is timed, and where its row goes.

    Attributes:
        rate: Bytes a microsecond of a large copy (`copy_rate`), which stands beside every case.
        samples: Replays a median is taken of.
        kernels: Whether each kernel is timed too, by torch.profiler.
        json: File that takes a line for each case, or None.
    """

    rate: float
    samples: int = 50
    kernels: bool = False
    json: Path | None = None


def make_step(
    function: Callable[..., Any], mode: str, arguments: Sequence[Tensor | None], gradients: Sequence[Tensor]
) -> Step:
    """One forward pass, or one with its backward pass, on these arguments; gradients are those of the outputs."""
    leaves = [x for x in arguments if x is not None]
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(*arguments)

        return forward

    def both() -> object:
        outputs = function(*arguments)
        return torch.autograd.grad([outputs] if isinstance(outputs, Tensor) else outputs, leaves, gradients)

    return both


def set_count(size: int, most: int = 64) -> int:
    """Input sets of ``size`` bytes each that together take four times the L2 cache, within reason."""
    return max(2, min(most, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // size)))


def capture(steps: list[Step]) -> torch.cuda.CUDAGraph:
    """All steps in one graph, after enough runs outside it to have compiled everything."""

    def run() -> None:
        for step in steps:
            step()

    with on_capture_stream(torch.device("cuda")):
        for _ in range(2):
            run()
    graph, _ = record(run)
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, steps: int, samples: int) -> list[float]:
    """Microseconds a step, one number a replay."""
    times = []
    for index in range(samples + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 5:
            times.append(start.elapsed_time(end) * 1e3 / steps)
    return times


def kernel_times(step: Step, repeats: int = 20) -> dict[str, tuple[float, float]]:
    """Name of each kernel → (mean microseconds of a launch, launches a step), from torch.profiler."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (event.self_device_time_total / event.count, event.count / repeats)
        for event in profile.key_averages()
        if str(event.device_type).endswith("CUDA") and event.self_device_time_total > 0
    }


def copy_rate() -> float:
    """Bytes a microsecond, read plus written, of a large copy on this card."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    graph = capture([lambda: target.copy_(source)])
    return 2 * source.nbytes / statistics.median(replay_times(graph, 1, 20))


def measure(case: dict[str, Any], make_steps: Callable[[], list[Step]], *, size: int, times: Times) -> dict[str, Any]:
    """Time one case.

    Args:
        case: What the row says of it.
        make_steps: Makes its cold steps, each on an input set of its own.
        size: Bytes that a step must move.
        times: How.

    Returns:
        The row. A missing package and a full memory are a row too.
    """
    try:
        steps = make_steps()
        samples = {
            name: replay_times(capture(chosen), len(chosen), times.samples)
            for name, chosen in (("cold", steps), ("hot", steps[:1] * len(steps)))
        }
        kernels = kernel_times(steps[0]) if times.kernels else {}
    except (ImportError, torch.OutOfMemoryError) as error:
        return case | {"status": type(error).__name__, "message": str(error)}
    row = case | {f"{name}_us": statistics.median(taken) for name, taken in samples.items()}
    row |= {
        "bytes": size,
        "gb_per_s": size / row["cold_us"] / 1e3,
        "copy_gb_per_s": times.rate / 1e3,
        "kernels": kernels,
    }
    return row | {"device": torch.cuda.get_device_name(), "status": "ok", "samples_us": samples}


def report(row: dict[str, Any], start: str, path: Path | None) -> None:
    """Print a row as one line beginning with ``start``, and one for each kernel; append it to a file, where given."""
    if path is not None:
        append_line(path, json.dumps(row))
    if row["status"] != "ok":
        print(f"{start} {row['status']}: {row['message']}", flush=True)
        return
    share = row["gb_per_s"] / row["copy_gb_per_s"]
    print(
        f"{start} cold {row['cold_us']:8.1f} µs   hot {row['hot_us']:8.1f} µs   "
        f"{row['gb_per_s']:6.0f} GB/s ({share:4.0%} of a copy's)",
        flush=True,
    )
    for name, (microseconds, launches) in sorted(row["kernels"].items(), key=lambda item: -item[1][0] * item[1][1]):
        print(f"    {microseconds:8.1f} µs x {launches:g}  {name[:100]}", flush=True)


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Let a name of a module mean something else."""
    saved: Any = module.__dict__[name]
    module.__dict__[name] = value
    try:
        yield
    finally:
        module.__dict__[name] = saved


def use_tiles(module: ModuleType, tiles: object) -> AbstractContextManager[None]:
    """Let every call of a module's ``tiles_for`` give these tile choices."""
    return replaced(module, "tiles_for", lambda *_: tiles)
