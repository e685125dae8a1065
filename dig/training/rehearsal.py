"""A few steps of a run of which nothing stays: what a step takes, before anybody waits for 400,000 of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dig.memory import peak_memory
from dig.training.config import TrainConfig
from dig.training.data import DataSet
from dig.training.data.loader import check_workers
from dig.training.inputs import InputStream
from dig.training.needs import check_training
from dig.training.step import build_step, use_deterministic_algorithms

STEPS, SECONDS = 5, 10.0
"""Steps after the first, or fewer where they take longer together."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a few steps took.

    Attributes:
        first: Seconds of the first step, which compiles kernels and captures the graph.
        seconds: Of a step after it, on average; None where the run has only one.
        trained: Numbers that are trained.
        memory: Bytes at most: of a GPU allocated, of a host resident in the whole process.
    """

    first: float
    seconds: float | None
    memory: int
    trained: int


def rehearse(
    config: TrainConfig, dataset: DataSet, *, workers: int | None = None, first: Mapping[str, Tensor] | None = None
) -> Rehearsal:
    """Do the first steps of a run, from its first weights, and write nothing.

    Args:
        config: The run.
        dataset: What it is trained on.
        workers: Processes that read the data.
        first: State dict of its first weights, where they are those of a file.

    Raises:
        TooLargeError: It needs more memory than there is.
        CaptureError: The step can't be captured, in execution graph.
    """
    check_workers(workers)
    check_training(config)
    if config.deterministic:
        use_deterministic_algorithms()
    cuda = config.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = build_step(config, first)
    stream = InputStream(config, dataset, step.loss, null_label=step.model.null_label, first_step=0, workers=workers)

    def timed() -> float:
        started = time.perf_counter()
        step.run(next(stream), config.learning_rate_at(0))
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    try:
        slow = timed()
        following: list[float] = []
        while len(following) < min(STEPS, config.steps - 1) and sum(following) < SECONDS:
            following.append(timed())
    finally:
        stream.close()
    seconds = sum(following) / len(following) if following else None
    trained = sum(parameter.numel() for parameter in step.parameters)
    return Rehearsal(first=slow, trained=trained, seconds=seconds, memory=peak_memory(config.device))
