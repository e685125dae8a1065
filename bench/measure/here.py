"""A model or a step of somebody's own, timed in this process: no worker, no parity, nothing proven of its kernels.

Shapes: B batch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.cases.case import Case
from bench.cases.jobs import BUDGETS
from bench.measure.intervals import MedianInterval
from bench.measure.memory import MemoryMeter
from bench.measure.steps import DTYPES, step_of, warm_up
from bench.measure.timing import Sampled, sample
from bench.measure.versions import versions
from bench.parity.inputs import fill_zeros
from bench.store.ledgers import Memory
from bench.store.rows import utc_now
from dig.environment import describe_environment
from dig.flops import UncountedError, model_macs
from dig.layers import Backbone
from dig.nvml import Gpu

MARKS = ("in-process", "unverified", "no-reference")
"""Marks of everything measured here. Other things may lie in this process' memory and caches, nobody checked which
kernels ran, and nothing computed the same to compare with."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """What was measured in this process. It is no row of ``python -m bench run``, and mixes with none.

    Attributes:
        name: Of the model, or of the step.
        mode: ``train`` (forward, backward, fused AdamW), ``forward`` (no gradients), or ``step``.
        batch: B.
        dtype: ``bf16`` (autocast) or ``fp32``; empty of a step, which chooses itself.
        device: ``cuda`` or ``cpu``.
        samples_ms: Every timed step, in milliseconds, in order.
        host_ms: Median of the host's time to issue a step.
        stop_reason: Why sampling ended.
        memory: The ledger; on a CPU the peak is of the whole process.
        parameters: Trainable parameters; None of a step.
        flops: Of one step, two a multiply-add; None where they could not be counted.
        marks: Reasons to doubt the times, with `MARKS` always among them.
        environment: Commit, versions and device.
        started_at: ISO 8601, UTC.
    """

    name: str
    mode: str
    batch: int
    dtype: str
    device: str
    samples_ms: tuple[float, ...]
    host_ms: float
    stop_reason: str
    memory: Memory | None
    parameters: int | None = None
    flops: int | None = None
    marks: tuple[str, ...] = MARKS
    environment: Mapping[str, Any] = field(default_factory=dict)
    started_at: str

    @property
    def median_ms(self) -> float:
        """Median milliseconds a step."""
        return median(self.samples_ms)

    @property
    def interval(self) -> MedianInterval:
        """The median with its 95% interval."""
        return MedianInterval.of(self.samples_ms)

    @property
    def fps(self) -> float:
        """Images a second: batch over the median step."""
        return 1000 * self.batch / self.median_ms

    def to_json(self) -> str:
        """One line of JSON, without its newline."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def __str__(self) -> str:
        return (
            f"{self.name} {self.mode} {self.dtype} batch {self.batch} on {self.device}: {self.interval} ms, "
            f"{self.fps:.3g} img/s [{', '.join(self.marks)}]"
        )


def measure_model(model: Backbone, *, mode: str, batch: int, dtype: str | None, execution: str | None) -> Here:
    """Time a copy of a model where it lies, on random inputs, as a case of the benchmark is timed.

    The copy's zeros are filled, as the benchmark does: a fresh adaLN gate of zero would be faster than a trained one.

    Raises:
        ValueError: There is no such mode, dtype or execution; or the execution is a graph's.
    """
    device = next(model.parameters()).device.type
    case = Case(
        model=f"{type(model).__name__}-here/{model.patch_size}",
        resolution=max(model.input_size),
        batch=batch,
        mode=cast(Any, mode),
        execution=cast(Any, execution or "eager"),
        dtype=cast(Any, dtype or ("bf16" if device == "cuda" else "fp32")),
        device=cast(Any, device),
    )
    if case.captures:
        raise ValueError("in this process a model runs eagerly or compiled; a step of dig.capture is a graph")
    meter = _meter(device)
    # Whoever measures goes on with the random numbers that were due.
    with torch.random.fork_rng():
        copied = copy.deepcopy(model).to(DTYPES[case.weights]).requires_grad_(True)
        fill_zeros(copied)
        step = step_of(copied, case)
        meter.built()
        found, memory, started_at = _time(step.run, device, meter, copied, step.optimizer)
    flops = None
    trained = getattr(model, "trained", None)
    if trained is not None:
        try:
            flops = 2 * model_macs(trained.spec) * batch * (3 if mode == "train" else 1)
        except UncountedError:
            flops = None
    return _result(
        found,
        name=trained.spec.name if trained is not None else type(model).__name__,
        mode=mode,
        batch=batch,
        dtype=case.dtype,
        device=device,
        memory=memory,
        parameters=sum(p.numel() for p in copied.parameters() if p.requires_grad),
        flops=flops,
        started_at=started_at,
    )


def measure_step(step: Callable[[], object], *, batch: int, device: str | None) -> Here:
    """Time a function without arguments: one step, whatever it does; called until the median is known well enough."""
    where = device or ("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
    if where not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu; got {where!r}")
    meter = _meter(where)
    meter.built()
    found, memory, started_at = _time(step, where, meter, nn.Module(), None)
    name = getattr(step, "__qualname__", type(step).__name__)
    return _result(
        found, name=name, mode="step", batch=batch, dtype="", device=where, memory=memory, started_at=started_at
    )


def _meter(device: str) -> MemoryMeter:
    return MemoryMeter(device, Gpu.open() if device == "cuda" else None)


def _time(
    run: Callable[[], object],
    device: str,
    meter: MemoryMeter,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[Sampled, Memory, str]:
    started_at = utc_now()
    warm_up(cast(Callable[[], Tensor], run), device)
    meter.start()
    run()
    memory = meter.read(model, optimizer)
    return sample(run, device=device, budget=BUDGETS[cast(Any, device)]), memory, started_at


def _result(found: Sampled, *, device: str, **said: Any) -> Here:
    unsteady = ("unsteady",) if found.warmup == "bound" else ()
    return Here(
        samples_ms=tuple(round(x, 5) for x in found.samples_ms),
        host_ms=found.host_ms,
        stop_reason=found.stop_reason,
        marks=MARKS + unsteady,
        environment={**describe_environment(), **versions(device)},
        device=device,
        **said,
    )
