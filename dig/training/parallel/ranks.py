"""The processes of a job: who they are, how they find each other, and what they say to each other on the host.

Gradients go over NCCL, or gloo on a CPU. What the hosts agree on (whether to stop, what is the same on all) goes over a
gloo group of its own, so that it never waits for a GPU.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dig.graphs import graphs_end_here
from dig.launched import from_environment, launched, place_in_job
from dig.messages import describe

HANG_SECONDS = 600.0
"""How long a job may stand still, unless it is told: longer than any kernel takes to compile, or a grid to draw."""
AFTER = 60.0
"""Seconds that PyTorch's own time-outs come after that: the message of `dig.training.parallel.watching` says more."""
MEETING_SECONDS = 0.05
"""Between two looks whether all ranks have come."""
START_SECONDS = 300.0
"""How long ranks wait for each other at the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """This process among those of its job. Made by `joined`.

    Attributes:
        rank: Of this process, from 0.
        world_size: How many there are.
        device: Where this one computes.
        store: What all processes read and write, with a connection of this process' own.
        control: A gloo group of all, for what the hosts agree on.
        saving: Another one, for what a thread that writes checkpoints agrees on meanwhile.
        hang_seconds: How long the job may stand still.
    """

    rank: int
    world_size: int
    device: torch.device
    store: Store
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    hang_seconds: float
    _meetings: Iterator[int] = field(default_factory=itertools.count)

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once, and speaks for all."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any rank; all ranks must ask."""
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank; all ranks must give."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_leader(self, value: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def meet(self) -> None:
        """Return once every rank has come here, however long that takes: that some are gone, the watch sees."""
        key = f"meeting/{next(self._meetings)}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world_size:
            time.sleep(MEETING_SECONDS)

    def mean_(self, values: Tensor) -> None:
        """Make a small tensor, on any device, its mean over the ranks: the same bits on all of them."""
        held = values.detach().cpu()
        dist.all_reduce(held, group=self.control)
        values.copy_(held / self.world_size)


class Votes:
    """What ranks ask of the job as they train, agreed on without a wait: what is asked at one step counts at the next.

    So all of them stop or save after the same step, whichever of them got the signal.

    Args:
        ranks: All of which vote once a step.
        count: Flags of a vote.
    """

    def __init__(self, ranks: Ranks, count: int) -> None:
        self._ranks = ranks
        self._count = count
        self._pending: tuple[Tensor, Any] | None = None

    def cast(self, *flags: bool) -> list[bool]:
        """Vote; what the vote before came to: none of it at the first."""
        decided = self._decided()
        votes = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        self._pending = votes, work
        return decided

    def _decided(self) -> list[bool]:
        if self._pending is None:
            return [False] * self._count
        votes, work = self._pending
        self._pending = None
        work.wait()
        return [bool(vote) for vote in votes.tolist()]

    def end(self) -> None:
        """Wait for the last vote, so that none is under way any more."""
        self._decided()


@contextmanager
def joined(device: str, *, hang_seconds: float = HANG_SECONDS, trains: bool = True) -> Iterator[Ranks]:
    """Make this process one of its job, for as long as the block lasts.

    A process that no launcher started is a job of its own.

    Args:
        device: ``cuda``, of which each process takes the GPU of its rank on the machine, or ``cpu``.
        hang_seconds: After how long a collective that not all ranks come to is an error.
        trains: Whether the ranks exchange what is on their GPUs, over NCCL.

    Raises:
        ValueError: There is no GPU for this process, or no other process answers.
    """
    rank, world_size, local_rank = place_in_job()
    where = torch.device("cpu")
    if device == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"rank {rank} has no GPU of its own: this machine has {count}; start as many processes as there are "
                "GPUs (torchrun --nproc-per-node)"
            )
        where = torch.device("cuda", local_rank)
        # Before anything else touches CUDA: "cuda" is this process' GPU from here on.
        torch.cuda.set_device(where)
    store = _find_store(rank, world_size)
    over_nccl = device == "cuda" and trains
    if over_nccl:
        # Else an exchange's few CTAs queue behind each kernel's thousands, and hardly run beside them.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    timeout = timedelta(seconds=hang_seconds + AFTER)
    with _connecting(rank):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if over_nccl else "gloo",
            store=PrefixStore("groups", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=where if over_nccl else None,
        )
    try:
        with _connecting(rank):
            control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        assert control is not None
        assert saving is not None
        # Before the group ends, which waits for the graphs that send over it.
        with graphs_end_here():
            yield Ranks(
                rank=rank,
                world_size=world_size,
                device=where,
                # A connection of its own: a group that waits for others on this one would keep the watch waiting.
                store=cast(Any, PrefixStore("job", store)).clone(),
                control=control,
                saving=saving,
                hang_seconds=hang_seconds,
            )
    finally:
        dist.destroy_process_group()


@contextmanager
def _connecting(rank: int) -> Iterator[None]:
    """Say in one line that ranks don't reach each other, though they have found the job's store."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise ValueError(
            f"rank {rank} found the job's store, but did not connect to the other ranks ({describe(error)[:200]}); "
            "start all of them anew, at a port of their own (torchrun --master-port)"
        ) from None


def _find_store(rank: int, world_size: int) -> Store:
    """What the processes of a job meet at: torchrun's own, or one for a process alone."""
    if not launched():
        # Port 0: whichever is free, for nobody else has to find it.
        return dist.TCPStore("localhost", 0, world_size=1, is_master=True)  # type: ignore[attr-defined]
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=START_SECONDS)))
    except (dist.DistError, ValueError, OSError, RuntimeError) as error:
        reason = describe(error)[:200]
        raise ValueError(
            f"rank {rank} does not find the others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"({reason}); start all of them with torchrun"
        ) from None
    # torchrun --max-restarts keeps its store: processes that it starts anew would find each other where those of the
    # attempt before were, which are gone.
    attempt = from_environment("TORCHELASTIC_RESTART_COUNT", 0)
    return cast(Store, PrefixStore(f"attempt-{attempt}", store))
