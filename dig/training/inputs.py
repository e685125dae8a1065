"""What one step of training sees: samples, timesteps, noise and labels, all a function of the seed and the step.

Every sample of a run has a number, ``step * batch + place``. Its timestep, noise and whether its label is dropped
are drawn from the seed and that number alone, so neither a resumed run nor another way to cut the batch changes them.

Shapes: A parts of a step's batch, B samples of a part, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from dig.diffusion import Loss, training_noise
from dig.training.config import TrainConfig
from dig.training.data import Batch, DataOrder, DataSet, Loader
from dig.training.data.draws import draw_uniform

AHEAD = 2
"""Steps whose inputs are made while the device is at an earlier one."""
STOP_INTERVAL = 0.5
"""Seconds that data may be waited for before the run looks whether it is to stop."""
CLOSE_SECONDS = 5
"""Seconds that the data of a step may still take when nobody wants them any more."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What one step reads.

    Attributes:
        x: (A, B, C, H, W) fp32 data.
        y: (A, B) int64 labels; dropped ones are the null label.
        t: (A, B), int64 steps (hybrid loss) or fp32 times (flow matching).
        noise: (A, B, C, H, W) standard normal.
    """

    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> StepInputs:
        """A copy on the device, which need not be complete when this returns."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> StepInputs:
        """A copy in page-locked memory, from where copying to the GPU can run beside its work."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


# So that a captured step takes them as they are.
register_dataclass(StepInputs)


def step_inputs(config: TrainConfig, loss: Loss, batch: Batch, null_label: int, rank: int = 0) -> StepInputs:
    """The inputs of the batch's step, on the CPU; ``null_label`` is the model's, ``rank`` that of a batch's part."""
    first = batch.step * config.batch + rank * len(batch.y)
    numbers = np.arange(first, first + len(batch.y), dtype=np.int64)
    t = loss.times(torch.from_numpy(draw_uniform(config.seed, "time", numbers)))
    dropped = torch.from_numpy(draw_uniform(config.seed, "label", numbers) < config.label_dropout)
    noise = training_noise(config.seed, numbers.tolist(), config.data.shape)
    parts = (config.accumulate, len(batch.y) // config.accumulate)
    return StepInputs(
        x=batch.x.unflatten(0, parts),
        y=torch.where(dropped, null_label, batch.y).unflatten(0, parts),
        t=t.unflatten(0, parts),
        noise=noise.unflatten(0, parts),
    )


class InputStream:
    """An endless iterator over the inputs of a run's steps, from any step on, made ahead in a thread.

    Args:
        config: The run.
        dataset: What it reads.
        loss: Maps uniform numbers to timesteps.
        null_label: The model's, which stands for a dropped label.
        first_step: The first step to deliver.
        workers: Processes that read the data, as in `Loader`.
        order: Which samples each step takes; None for all of them, in this process.

    Attributes:
        loader: Counts the files that could not be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: DataSet,
        loss: Loss,
        *,
        null_label: int,
        first_step: int,
        workers: int | None = None,
        order: DataOrder | None = None,
    ) -> None:
        self._config = config
        self._loss = loss
        self._null_label = null_label
        if order is None:
            order = DataOrder(length=len(dataset), batch_size=config.batch, seed=config.seed)
        self._rank = order.rank
        # Pinned here, once everything is in place; the loader's own pinning would be a second copy.
        self.loader = Loader(dataset, order, first_step=first_step, workers=workers, pin_memory=False)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[StepInputs]] = deque()

    def _make(self) -> StepInputs:
        inputs = step_inputs(self._config, self._loss, next(self.loader), self._null_label, self._rank)
        return inputs.pin_memory() if self._config.device == "cuda" else inputs

    def __iter__(self) -> Iterator[StepInputs]:
        return self

    def __next__(self) -> StepInputs:
        inputs = self.take(lambda: False)
        assert inputs is not None
        return inputs

    def take(self, stop: Callable[[], bool]) -> StepInputs | None:
        """The next step's inputs; None if ``stop`` says so while they are waited for, as on a disk that hangs."""
        while len(self._waiting) <= AHEAD:
            self._waiting.append(self._thread.submit(self._make))
        while True:
            try:
                inputs = self._waiting[0].result(timeout=STOP_INTERVAL)
            except TimeoutError:
                # The future's own, if what was waited for raised it.
                if self._waiting[0].done():
                    raise
                if stop():
                    return None
                continue
            self._waiting.popleft()
            return inputs

    def close(self) -> None:
        """End the thread and the loader's processes."""
        pending = [future for future in self._waiting if not future.cancel()]
        if wait(pending, timeout=CLOSE_SECONDS).not_done:
            # On a disk that hangs, what a worker waits for may never come; without it the thread gets an error.
            self.loader.kill()
        self._thread.shutdown(wait=not wait(pending, timeout=2 * CLOSE_SECONDS).not_done)
        self.loader.close()
