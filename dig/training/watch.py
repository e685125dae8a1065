"""What of every step the host has to see, without waiting for the device: whether its loss is a number."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from dig.training.inputs import AHEAD


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to do."""


class NotFiniteLossError(TrainingError):
    """The loss is no number any more: nothing of the state since is worth keeping."""


class StepWatch:
    """Keeps the host near the device, and looks at the sums of every step as the device passes it.

    Args:
        names: Of the sums.
        device: ``cuda`` or ``cpu``.

    Attributes:
        loss: Mean of the first sum over the steps that it is of, as of the last step that was looked at; NaN before.
    """

    def __init__(self, names: Sequence[str], device: str) -> None:
        self._names = names
        self.loss = math.nan
        self._cuda = device == "cuda"
        self._in_flight: deque[tuple[int, int, Tensor, torch.cuda.Event]] = deque()

    def wait(self) -> None:
        """Wait while the host is ahead of the device by more steps than their inputs are worth in memory.

        Raises:
            NotFiniteLossError: A step that the device has passed.
        """
        if len(self._in_flight) > AHEAD:
            self._look()

    def passed(self, step: int, sums: Tensor, summed: int) -> None:
        """Remember a step, which is the ``step``-th and has been given to the device, and its sums, to look at them.

        ``summed`` steps are in the sums.

        Raises:
            NotFiniteLossError: On a CPU, where the step is done.
        """
        if not self._cuda:
            self._check(step, sums, summed)
            return
        held = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        held.copy_(sums, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append((step, summed, held, event))

    def drain(self) -> None:
        """Look at every step so far, waiting for them.

        Raises:
            NotFiniteLossError: One of them.
        """
        while self._in_flight:
            self._look()

    def _look(self) -> None:
        step, summed, held, event = self._in_flight.popleft()
        event.synchronize()
        self._check(step, held, summed)

    def _check(self, step: int, sums: Tensor, summed: int) -> None:
        found = sums.tolist()
        self.loss = found[0] / summed
        values = zip(self._names, found, strict=True)
        if wrong := [name for name, value in values if not math.isfinite(value)]:
            raise NotFiniteLossError(
                f"{', '.join(wrong)}: not finite at step {step}; the checkpoints hold an earlier state. Try a lower "
                "learning rate, warm-up or clipping, in another folder"
            )
