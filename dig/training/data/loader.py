"""Batches of a data set, in the order of the steps, read ahead by worker processes where that pays."""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dig.launched import from_environment
from dig.memory import check_memory
from dig.training.data.base import DataError, DataSet
from dig.training.data.files import shown
from dig.training.data.order import DataOrder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step sees on one rank.

    Attributes:
        step: Which step, 0 being the first.
        x: (B, C, H, W) float32, pixels in [-1, 1] or scaled latents.
        y: (B,) int64 labels.
        unreadable: File name → reason, of the files among them that another one replaces.
    """

    step: int
    x: Tensor
    y: Tensor
    unreadable: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from where a copy to the GPU can run beside its work."""
        return replace(self, x=self.x.pin_memory(), y=self.y.pin_memory())


def read_batch(dataset: DataSet, order: DataOrder, step: int) -> Batch:
    """The batch of a step: a pure function of its arguments and of the files."""
    selection = order.select(step)
    mirrored = selection.mirrored & np.bool_(dataset.mirror)
    samples = dataset.fetch(selection.indices, mirrored)
    return Batch(step=step, x=samples.x, y=samples.y, unreadable=dict(samples.unreadable))


class _Steps(Dataset[Any]):
    """Steps as items, so that a worker reads a whole batch and how many workers there are changes nothing."""

    def __init__(self, dataset: DataSet, order: DataOrder) -> None:
        self.dataset = dataset
        self.order = order

    def __getitem__(self, step: int) -> Batch | DataError:
        # As a value: an exception from a worker would arrive with its message buried in a traceback.
        try:
            return read_batch(self.dataset, self.order, step)
        except DataError as error:
            return error


class _StepsFrom(Sampler[int]):
    """``first``, ``first + 1`` and so on without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""They reach every process of a terminal, job or service; the main one alone answers, and may want more batches."""
MAX_WORKERS = 128
ORPHAN_INTERVAL = 0.5
"""Seconds after which a worker sees that it has no parent any more."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _StartWorker:
    """What a worker does first: leave signals to its parent, and end with it, however that ends.

    Attributes:
        parent: The process that it works for.
        bound: Whether the parent's thread lives as long as the parent: Linux then ends the worker at once.
    """

    parent: int
    bound: bool

    def __call__(self, _worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.bound and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # And anywhere, and for a parent that was gone before: a worker that waits to hand on a batch would wait for
        # ever, because its siblings hold the other end of its pipe.
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(ORPHAN_INTERVAL)
        os._exit(1)


def check_workers(workers: int | None) -> None:
    """Raise ValueError unless so many processes may read the data; None stands for the default."""
    if workers is not None and not 0 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be 0 to {MAX_WORKERS}; got {workers}")


def default_workers(dataset: DataSet) -> int:
    """No worker for data in RAM; else one for each processor that this process may use, 8 at most.

    Ranks of one machine share its processors.
    """
    processors = len(os.sched_getaffinity(0)) // max(1, from_environment("LOCAL_WORLD_SIZE", 1))
    return 0 if dataset.in_memory else max(1, min(8, processors))


class Loader:
    """An endless iterator over `Batch`, from any step on.

    Its whole state is `step`: a loader made with ``first_step=step`` goes on with the same batches, bit for bit,
    whatever the number of workers. The global random generators are neither read nor moved on.

    Args:
        dataset: What to read.
        order: Which samples each step takes; its length must be the data set's.
        first_step: The first step to deliver.
        workers: Processes that read ahead, 0 to read in this one. Default: see `default_workers`.
        prefetch: Batches that each worker reads ahead.
        pin_memory: Whether batches come in page-locked memory. Default: where CUDA is there.

    Attributes:
        step: The step that is delivered next.
        unreadable: File name → reason, of every file so far that another one replaces. Each is logged once.
    """

    def __init__(
        self,
        dataset: DataSet,
        order: DataOrder,
        *,
        first_step: int = 0,
        workers: int | None = None,
        prefetch: int = 2,
        pin_memory: bool | None = None,
    ) -> None:
        if order.length != len(dataset):
            raise ValueError(f"the order is for {order.length} samples, but {dataset.name} holds {len(dataset)}")
        if first_step < 0:
            raise ValueError(f"first_step must not be negative; got {first_step}")
        workers = default_workers(dataset) if workers is None else workers
        check_workers(workers)
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1; got {prefetch}")
        one = 4 * order.batch_size * math.prod(dataset.sample_shape)
        needs = {"a batch": one, f"those that {workers} workers read ahead": one * workers * prefetch}
        check_memory(needs, device="cpu", advice="choose a smaller --batch, or fewer --workers")
        self.step = first_step
        self.unreadable: dict[str, str] = {}
        loader: DataLoader[Any] = DataLoader(
            _Steps(dataset, order),
            batch_size=None,
            sampler=_StepsFrom(first_step),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            worker_init_fn=_StartWorker(os.getpid(), threading.current_thread() is threading.main_thread()),
            # DataLoader draws a seed for its workers; without this, from the global generator, which a resumed run
            # would then find in another state.
            generator=torch.Generator(),
        )
        # Workers inherit the mask: one that a signal reaches before it ignores them would end the run. Here it waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        before = signal.getsignal(signal.SIGCHLD)
        try:
            self._batches: Iterator[Batch | DataError] | None = iter(loader)
        finally:
            # PyTorch's handler raises wherever the main thread is when a worker dies, in the middle of a step, say. The
            # iterator sees it too, and raises where a batch is asked for.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise ValueError("this loader is closed")
        try:
            batch = next(self._batches)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A worker that is killed while it hands over a batch ends the connection that the tensors come by.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that reads data was killed, for want of memory perhaps; try fewer --workers"
            ) from None
        if isinstance(batch, DataError):
            self.close()
            raise batch
        for name, reason in batch.unreadable.items():
            if name not in self.unreadable:
                self.unreadable[name] = reason
                logger.warning("cannot read %s (%s); another image replaces it", shown(name), reason)
        self.step = batch.step + 1
        return batch

    def kill(self) -> None:
        """End the workers at once; who waits for a batch of theirs gets a `DataError`."""
        for worker in getattr(self._batches, "_workers", ()):
            worker.kill()

    def close(self) -> None:
        """End the workers and wait for them; closing twice does no harm."""
        batches, self._batches = self._batches, None
        # DataLoader's iterator has no public way to end; its own clean-up calls this one.
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        # It ends with SIGTERM those that don't end by themselves, which they ignore.
        for worker in getattr(batches, "_workers", ()):
            if worker.is_alive():
                worker.kill()
                worker.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
