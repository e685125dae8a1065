"""The kernels of a step, by torch's profiler (CUPTI on a GPU).

The time of a kernel launched early (`dig.ops.early_launch`) counts from when its CTAs were placed, waiting included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One kernel's part of a step.

    Attributes:
        name: As compiled, cut at its arguments.
        calls: Launches a step.
        us: Microseconds a step, all launches together.
    """

    name: str
    calls: float
    us: float


def short_name(name: str) -> str:
    """A kernel's name without return type, namespace noise and arguments."""
    name = re.sub(r"^void |^std::enable_if<.*?>::type |\(anonymous namespace\)::", "", name).partition("(")[0]
    return name if len(name) <= 100 else name[:60] + " … " + name[-37:]


def kernel_names(run: Callable[[], object], device: str) -> set[str]:
    """Full names of the kernels (``cuda``) or operators (``cpu``) of one call; empty where CUPTI sees nothing."""
    return {key for key, _, _ in _profile(run, steps=1, device=device)}


def _profile(run: Callable[[], object], *, steps: int, device: str) -> list[tuple[str, int, float]]:
    """Name, calls and microseconds of everything that ran, all steps together."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    averages: list[Any] = list(profiler.key_averages())
    times = [(x.self_device_time_total if device == "cuda" else x.self_cpu_time_total) for x in averages]
    return [(x.key, x.count, us) for x, us in zip(averages, times, strict=True) if us > 0]


def profile_kernels(run: Callable[[], object], *, steps: int, device: str) -> list[KernelTime]:
    """Profile ``steps`` calls of a warmed-up step.

    Args:
        run: One step.
        steps: How many to average over.
        device: ``cuda``: kernels by device time; ``cpu``: operators by their own time.

    Returns:
        By falling time.
    """
    events: dict[str, list[float]] = {}
    for name, count, us in _profile(run, steps=steps, device=device):
        total = events.setdefault(short_name(name), [0.0, 0.0])
        total[0] += count / steps
        total[1] += us / steps
    found = [KernelTime(name=name, calls=calls, us=us) for name, (calls, us) in events.items()]
    return sorted(found, key=lambda kernel: kernel.us, reverse=True)
