"""How far and how fast a run trains: steps and time since the last line of its log, and the figures of a line."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dig.ceiling import gpu_ceiling
from dig.flops import UncountedError, model_macs
from dig.memory import GIB
from dig.training.config import TrainConfig

logger = logging.getLogger(__name__)

TRAINING_FLOPS_PER_MAC = 6
"""Two FLOPs a multiply-add, and a backward pass of twice the forward's."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run has come.

    Attributes:
        step: Steps that lie behind.
        loss: Mean loss since the last line of the log, as far as the device has come; NaN before the first step.
        images_per_second: Of the steps of the last line of the log; NaN before the first.
    """

    step: int
    loss: float = math.nan
    images_per_second: float = math.nan


class Meter:
    """Counts steps and their time.

    Args:
        config: The run. On a GPU, its matmul ceiling is measured now: before random states are restored, for the
            operands are random too.
        devices: GPUs that a step is shared out among.

    Attributes:
        seconds: Time in training steps so far, over all of the run's processes.
        pending: Steps since the last line.
    """

    def __init__(self, config: TrainConfig, devices: int = 1) -> None:
        self._config = config
        self._devices = devices
        self._macs = _macs(config)
        self.seconds = 0.0
        self.pending = 0
        self._pending_timed = 0  # those of them whose time was taken
        self._pending_seconds = 0.0
        self._clock: float | None = None
        self._ceiling = None
        if config.device == "cuda":
            self._ceiling = gpu_ceiling(config.dtype)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it; `load` takes it back."""
        return {
            "seconds": self.seconds,
            "pending": self.pending,
            "pending_timed": self._pending_timed,
            "pending_seconds": self._pending_seconds,
        }

    def load(self, about: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.seconds = about["seconds"]
        self.pending = about["pending"]
        self._pending_timed = about["pending_timed"]
        self._pending_seconds = about["pending_seconds"]

    def begin(self) -> None:
        """A process begins: its first step, which compiles kernels and captures the graph, takes no time."""
        self._clock = None

    def stepped(self) -> None:
        """A step has been given to the device."""
        if self._clock is None:
            self._clock = self._now()
        else:
            self._pending_timed += 1

    def account(self) -> None:
        """Count the time since the last call, or `skip`, as training."""
        if self._clock is not None:
            now = self._now()
            self.seconds += now - self._clock
            self._pending_seconds += now - self._clock
            self._clock = now

    def skip(self) -> None:
        """Count none of the time since `account`: what was done was no training."""
        if self._clock is not None:
            self._clock = time.perf_counter()

    def figures(self) -> dict[str, float | None]:
        """Of the steps since the last line: images a second, share of the ceiling, memory, and all seconds."""
        rate = self._pending_timed * self._config.batch / self._pending_seconds if self._pending_timed else None
        share = None
        if rate and self._ceiling and self._macs:
            share = TRAINING_FLOPS_PER_MAC * self._macs * rate / (self._ceiling * self._devices)
        memory = torch.cuda.max_memory_allocated() / GIB if self._config.device == "cuda" else None
        return {"images_per_second": rate, "ceiling_share": share, "memory_gib": memory, "seconds": self.seconds}

    def begin_line(self) -> None:
        """The line has been written; the steps after it are the next one's."""
        self.pending, self._pending_timed, self._pending_seconds = 0, 0, 0.0

    def _now(self) -> float:
        """The time when the device has done what it was given, in seconds."""
        if self._config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _macs(config: TrainConfig) -> int | None:
    """Multiply-adds of the model for one image; None, with a warning, where they can't be counted."""
    try:
        return model_macs(config.model)
    except UncountedError as error:
        logger.warning("the log has no share of the ceiling: %s", error)
        return None
