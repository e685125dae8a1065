"""What ``python -m bench scaling`` measures: training on more and more GPUs. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from bench.cases.case import CAPTURED, Case, Device, Dtype, Execution, Parallel, Sending
from bench.cases.jobs import BUDGETS, Budget
from bench.cases.suites import best_way, sweep

MODELS: dict[str, tuple[str, ...]] = {
    "cuda": ("DiG:triton:variant=release", "Flash-DiT:sdpa-cudnn"),
    "cpu": ("DiG", "Flash-DiT"),
}
SIZE, RESOLUTION, BATCH = {"cuda": "XL", "cpu": "S"}, {"cuda": 256, "cpu": 64}, {"cuda": 32, "cpu": 2}
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp")
WAYS: tuple[Sending, ...] = ("collectives", "copies")
EXECUTIONS: tuple[Execution, ...] = ("graph", "eager")
MOST_PROCESSES = 64
BUDGET_ON_GPU = Budget(settle_max_s=2.0, least_s=1.0, target_s=3.0)
"""Longer than of other cases: what communication adds is a difference of two steps' times."""


def budget_of(device: Device) -> Budget:
    """How long each of these cases is sampled, the one on one GPU too."""
    return BUDGET_ON_GPU if device == "cuda" else BUDGETS[device]


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4 and so on, and no more than there are."""
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What is combined.

    Attributes:
        models: Families with options, as ``--models`` has them.
        size: Of the models.
        patch: Of the models.
        resolution: In pixels.
        batch: Images of one process.
        processes: How many, each; what one does is always measured, for the others are compared with it.
        parallel: ``ddp``, ``fsdp``.
        sending: ``collectives``, ``copies``.
        executions: ``graph``, ``eager``; a family is compiled as well where that is its best way (`best_way`).
        dtype: ``bf16`` or ``fp32``.
        device: ``cuda`` or ``cpu``.
    """

    models: Sequence[str]
    size: str
    patch: int
    resolution: int
    batch: int
    processes: Sequence[int]
    parallel: Sequence[Parallel]
    sending: Sequence[Sending]
    executions: Sequence[Execution]
    dtype: Dtype
    device: Device


def scaling_cases(axes: Axes) -> list[Case]:
    """Model by model and way by way: one process, then more by each kind.

    Raises:
        ValueError: Something cannot be measured; the message says what to write instead.
    """
    cases: list[Case] = []
    for text in axes.models:
        for execution in axes.executions:
            (plain,) = sweep(
                (text,),
                sizes=(axes.size,),
                patch=axes.patch,
                resolutions=(axes.resolution,),
                executions=(execution,),
                batch=axes.batch,
                dtype=axes.dtype,
                device=axes.device,
            )
            alone = _at_its_best(plain)
            several = [count for count in axes.processes if count > 1]
            cases.append(alone)
            ways = [(kind, sending) for kind in axes.parallel for sending in axes.sending]
            cases += [replace(alone, processes=n, parallel=k, sending=s) for n in several for k, s in ways]
    return list(dict.fromkeys(cases))


def _at_its_best(case: Case) -> Case:
    """A case as `best_way` says of its model, launched where it is: with or without compilation."""
    found = best_way(case) if case.device == "cuda" else None
    if found is None or not found.compiles:
        return case
    execution = "compiled-graph" if case.execution in CAPTURED else "compile"
    return replace(case, execution=cast(Any, execution), scope=found.scope)


def alone_of(case: Case) -> Case:
    """The case of one process that a case is compared with."""
    return replace(case, processes=1, parallel="", sending="")


def to_measure(cases: Iterable[Case], done: Iterable[Case]) -> list[Case]:
    """What is left: cases that are not done, and the case of one process of each, in this run too: they compare."""
    have, wanted = set(done), list(cases)
    left = [case for case in wanted if case not in have]
    needed = {alone_of(case) for case in left}
    return [case for case in wanted if case in needed or case not in have]
