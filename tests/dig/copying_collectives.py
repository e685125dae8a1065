"""What ranks that copy check of single collectives: gathers, reductions and averages, and when they can copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dig.graphs import record
from dig.training.parallel.copying import CopyGather, CopyReduce, average
from dig.training.parallel.reach import can_copy
from tests.dig.copying_ranks import Job


def gathers(job: Job) -> None:
    """Two at a time, again and again: what is gathered is whole for as long as it is held."""
    windows = job.windows()
    gather = CopyGather(windows)
    for turn in range(6):
        _gather_two(job, gather, turn)  # which holds nothing any more afterwards
    assert windows.count == 2, windows.count


def _gather_two(job: Job, gather: CopyGather, turn: int) -> None:
    share, ranks = 1001, job.ranks.world_size
    outputs, dues = [], []
    for pair in range(2):
        value = 100 * turn + 10 * pair
        output = gather.allocate((share * ranks,), dtype=torch.float32, device=job.device)
        output.fill_(-1)
        mine = output.narrow(0, share * job.ranks.rank, share)
        mine.fill_(value + job.ranks.rank)
        outputs.append((output, mine))
        dues.append(torch.arange(ranks, device=job.device).repeat_interleave(share).float() + value)
    for output, mine in outputs:
        job.stagger(turn)
        gather(output, mine, job.group)
    for (output, _), due in zip(outputs, dues, strict=True):
        assert torch.equal(output, due), (turn, output, due)


def reductions(job: Job) -> None:
    """As the group's own backend reduces; whole numbers, so that no sum is rounded."""
    windows = job.windows()
    reduce = CopyReduce(windows)
    share, ranks = 777, job.ranks.world_size
    for turn in range(6):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            given = reduce.allocate((share * ranks,), dtype=torch.float32, device=job.device)
            values = torch.arange(share * ranks, device=job.device).float()
            given.copy_(values * (job.ranks.rank + 1) + turn)
            output = reduce.allocate((share,), dtype=torch.float32, device=job.device)
            assert windows.behind(output) is None
            job.stagger(turn)
            reduce(output, given, job.group, op)
            total = sum((values * (rank + 1) + turn for rank in range(ranks)), torch.zeros_like(values))
            if op == dist.ReduceOp.AVG:
                total /= ranks
            due = total.view(ranks, -1)[job.ranks.rank]
            assert torch.equal(output, due), (turn, op, output, due)
            del given, output
    assert windows.count == 1, windows.count
    # An input of a place that no window has: copied to one first.
    output = torch.empty(share, device=job.device)
    reduce(output, values, job.group, dist.ReduceOp.AVG)
    assert torch.equal(output, values.view(ranks, -1)[job.ranks.rank])
    with pytest.raises(ValueError, match="add up or average"):
        reduce(output, values, job.group, dist.ReduceOp.MAX)


def sums_in_order(job: Job) -> None:
    """Of every rank's part the same sum, in the ranks' order, whichever rank adds it up."""
    windows = job.windows()
    reduce = CopyReduce(windows)
    ranks = job.ranks.world_size
    generator = torch.Generator().manual_seed(job.ranks.rank)
    mine = torch.randn(512, generator=generator).to(job.device)
    given = reduce.allocate((512 * ranks,), dtype=torch.float32, device=job.device)
    given.view(ranks, -1).copy_(mine.expand(ranks, -1))
    output = reduce.allocate((512,), dtype=torch.float32, device=job.device)
    reduce(output, given, job.group, dist.ReduceOp.SUM)
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, (mine.cpu(), output.cpu()), group=job.ranks.control)
    due = found[0][0].clone()
    for part, _ in found[1:]:
        due += part
    for _, total in found:
        assert torch.equal(total, due)


def averages(job: Job) -> None:
    """In place, of sizes that do not divide, smaller than the number of ranks among them."""
    ranks, windows = job.ranks.world_size, job.windows()
    for turn, size in enumerate((1, 31, 33, 5000)):
        own = windows.lend(size, dtype=torch.float32, device=job.device)
        for again in range(3):
            own.copy_(torch.arange(size, device=job.device) * (1 + job.ranks.rank) * ranks + again)
            job.stagger(turn + again)
            average(windows, own)
            due = torch.arange(size, device=job.device).float() * (ranks * (ranks + 1) // 2) + again
            assert torch.equal(own, due), (size, own, due)


def captures_refused(job: Job) -> None:
    """A window that a capture would need is refused, and the process goes on."""
    windows = job.windows()

    def ask() -> None:
        windows.lend(1 << 20, dtype=torch.uint8, device=job.device)

    with pytest.raises(RuntimeError, match=r"hosts have to meet|captur"):
        record(ask, device=job.device)
    gathers(job)


def ways(job: Job) -> None:
    """Whether the ranks can copy is the same on all of them."""
    reason = can_copy(job.group, job.device)
    assert (reason is None) == job.cuda, reason
