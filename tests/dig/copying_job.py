"""Ranks that send by copies, for the tests: ``python -m tests.dig.copying_job FOLDER DEVICE`` is one of them.

On the CPU their windows are files that all of them map, and they meet over gloo; on GPUs they are the real ones. What
each check finds is in ``rank-N.json`` in the folder, by name: an error's text, or None.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dig import raster_gradients
from dig.gradient_places import Places
from dig.graphs import on_capture_stream, record
from dig.model import DiG, DiGConfig
from dig.training.parallel import Ranks, copying, joined, mesh_of_all
from dig.training.parallel.copying import CopyAllReduce, CopyGather, CopyReduce, average, use_copies
from dig.training.parallel.reach import can_copy
from dig.training.parallel.windows import SymmetricWindow, Window, Windows
from dig.training.shares import local
from tests.dig.parallel_job import free_port
from tests.helpers import example, randomize

STEPS = 4
WIDTH = 48


class FileWindow:
    """A window of the CPU."""

    uncounted = 0
    _numbers = itertools.count()

    def __init__(self, folder: Path, nbytes: int, group: dist.ProcessGroup) -> None:
        number = next(self._numbers)  # The same on all ranks, as they make the same windows.
        self._paths = [folder / f"window-{number}-{rank}" for rank in range(group.size())]
        self._nbytes, self._group = nbytes, group
        with self._paths[group.rank()].open("wb") as file:
            file.truncate(nbytes)
        dist.barrier(group)

    def of(self, rank: int) -> Tensor:
        return torch.from_file(str(self._paths[rank]), shared=True, size=self._nbytes, dtype=torch.uint8)

    def meet(self) -> None:
        dist.barrier(self._group)


class Job:
    """This rank, its windows, and what it checks."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.ranks, self.device, self.folder = ranks, ranks.device, folder
        self.mesh = mesh_of_all(self.device.type)
        self.group: dist.ProcessGroup = self.mesh.get_group()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def window(self, nbytes: int, device: torch.device) -> Window:
        if self.cuda:
            return SymmetricWindow.new(nbytes, device, self.group)
        return FileWindow(self.folder, nbytes, self.group)

    def windows(self) -> Windows:
        return Windows(self.group, self.window)

    def tensor(self, *values: float) -> Tensor:
        return torch.tensor(values, device=self.device)

    def stagger(self, turn: int) -> None:
        """Let another rank be late at each turn: one that didn't wait for it would read or write too early."""
        if turn % self.ranks.world_size == self.ranks.rank:
            if self.cuda:
                torch.cuda._sleep(20_000_000)
            else:
                time.sleep(0.02)


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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fall(torch.relu(self.rise(x)))


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, WIDTH), *[Block() for _ in range(4)], nn.Linear(WIDTH, 5)).to(device)


def batches(job: Job, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * number + job.ranks.rank)
    x, y = torch.randn(16, 7, generator=generator), torch.randn(16, 5, generator=generator)
    return x.to(job.device), y.to(job.device)


def sharded(job: Job, *, bf16: bool, reshard: bool, adding: bool) -> nn.Module:
    model = network(job.device)
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        if isinstance(block, Block):
            fully_shard(block, mesh=job.mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=job.mesh, mp_policy=policy, reshard_after_forward=None)
    for part in model.modules():
        if adding and isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
    return model


def steps_of(job: Job, model: Any, part: Callable[[bool], None]) -> tuple[list[float], list[Tensor]]:
    """Losses of some steps of two parts each, and this rank's share of the last gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        for half in range(2):
            part(half == 1)
            x, y = batches(job, 2 * step + half)
            job.stagger(step)
            loss = (model(x).float() - y).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, [local(parameter.grad).clone() for parameter in model.parameters()]


def shards(job: Job) -> None:
    """FSDP's own collectives and these: the same losses, and for sums of two ranks the same bits."""
    for bf16, reshard, adding in itertools.product((False, True), repeat=3):
        found = []
        for copies in (False, True):
            model: Any = sharded(job, bf16=bf16, reshard=reshard, adding=adding)
            windows = use_copies(model, job.group, job.windows()) if copies else None

            def part(last: bool, model: Any = model) -> None:
                model.set_is_last_backward(last)
                model.set_requires_gradient_sync(last)

            found.append(steps_of(job, model, part))
            # Of the root and of the blocks, two at a time are gathered, and one is reduced.
            assert windows is None or 2 <= windows.count <= 6, windows.count
        (due, due_gradients), (losses, gradients) = found
        exact = adding and job.ranks.world_size == 2
        torch.testing.assert_close(losses, due, rtol=0 if exact else 1e-4, atol=0)
        for one, other in zip(gradients, due_gradients, strict=True):
            bound = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(one, other, **bound)


def buckets(job: Job) -> None:
    """DistributedDataParallel's own averages and these, in several buckets; gradients are the same on all ranks."""
    found = []
    for copies in (False, True):
        with on_capture_stream(job.device):
            wrapped = DistributedDataParallel(
                network(job.device),
                device_ids=[job.device.index] if job.cuda else None,
                gradient_as_bucket_view=True,
                bucket_cap_mb=0.05,
            )
            hook = CopyAllReduce(wrapped, job.windows()) if copies else None
            copying.PIECE = 20_000  # The first pass' one bucket has 56,693.

            def part(last: bool, wrapped: Any = wrapped) -> None:
                wrapped.require_backward_grad_sync = last

            found.append(steps_of(job, wrapped, part))
        if hook is not None:
            assert [lent.nbytes for lent in hook.windows._lent] == [4 * copying.PIECE]
        if hook is not None and job.cuda:
            assert hook._laid
            assert len(hook._shared) > 1, hook._shared
            assert None not in hook._shared.values()
    (due, due_gradients), (losses, gradients) = found
    torch.testing.assert_close(losses, due, rtol=1e-4, atol=0)
    for one, other in zip(gradients, due_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    everyone: list[Any] = [None] * job.ranks.world_size
    dist.all_gather_object(everyone, [one.cpu() for one in gradients], group=job.ranks.control)
    for theirs in everyone:
        assert all(torch.equal(one, other) for one, other in zip(everyone[0], theirs, strict=True))


def graphs(job: Job) -> None:
    """Steps as CUDA graphs, replayed on other inputs, leave the gradients that eager steps leave."""
    for kind in ("fsdp", "ddp"):
        found = []
        for copies, captured in ((False, False), (True, False), (True, True)):
            with on_capture_stream(job.device):
                model: Any
                if kind == "fsdp":
                    model = sharded(job, bf16=True, reshard=not captured, adding=False)
                    if copies:
                        use_copies(model, job.group)
                else:
                    model = DistributedDataParallel(
                        network(job.device),
                        device_ids=[job.device.index],
                        gradient_as_bucket_view=True,
                        bucket_cap_mb=0.05,
                    )
                    if copies:
                        CopyAllReduce(model)
                x, y = batches(job, 0)

                def passes(model: Any = model, x: Tensor = x, y: Tensor = y) -> None:
                    model.zero_grad(set_to_none=True)
                    (model(x).float() - y).square().mean().backward()

                for _ in range(11):
                    passes()
            replay: Any = record(passes, device=job.device)[0].replay if captured else passes
            gradients = []
            for number in range(1, 4):
                for static, values in zip((x, y), batches(job, number), strict=True):
                    static.copy_(values)
                job.stagger(number)
                with on_capture_stream(job.device):
                    replay()
                gradients.append([local(parameter.grad).clone() for parameter in model.parameters()])
            found.append(gradients)
        for name, gradients in zip(("eager", "captured"), found[1:], strict=True):
            for ours, theirs in zip(gradients, found[0], strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(
                        one, other, rtol=1e-3, atol=1e-4, msg=lambda text, at=(kind, name): f"{at}: {text}"
                    )


def places(job: Job) -> None:
    """DiG's gradients are written into the buckets, and are those that are copied there, to the bit.

    On GPUs in a graph, three blocks of DiG-S; on the CPU the blocks are told to hand on as they do there.
    """
    if not job.cuda:
        importlib.import_module("tests.ops.conftest")  # The interpreter, made to work as a GPU.
    small: dict[str, Any] = {"input_size": (32, 32), "width": 384, "heads": 6} if job.cuda else {}
    sizes = {"input_size": (6, 10), "depth": 3, "width": 64, "heads": 1, **small}
    found = []
    for lent in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if not job.cuda:
                patch.setattr(raster_gradients, "gathers", lambda: True)
            if not lent:
                patch.setattr(raster_gradients, "places_here", lambda: None)
            with on_capture_stream(job.device):
                torch.manual_seed(0)
                model = randomize(DiG(DiGConfig(num_classes=3, backend="triton", **sizes))).eval().to(job.device)
                wrapped = DistributedDataParallel(
                    model,
                    device_ids=[job.device.index] if job.cuda else None,
                    gradient_as_bucket_view=True,
                    bucket_cap_mb=4 if job.cuda else 0.1,
                )
                hook = CopyAllReduce(wrapped, job.windows())
            torch.manual_seed(1 + job.ranks.rank)
            inputs = example(model, 2)
            taken: list[tuple[Tensor, int]] = []
            take = Places.take

            def noted(given: Places, parameter: Tensor, node: Any, taken: Any = taken, take: Any = take) -> Any:
                place = take(given, parameter, node)
                if place is not None:
                    taken.append((parameter, place.data_ptr()))
                return place

            patch.setattr(Places, "take", noted)

            def passes(wrapped: Any = wrapped, inputs: tuple[Tensor, ...] = inputs) -> None:
                wrapped.zero_grad(set_to_none=True)
                with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.cuda):
                    output = wrapped(*inputs)
                output.float().square().mean().backward()

            with on_capture_stream(job.device):
                for _ in range(11 if job.cuda else 2):
                    passes()
            taken.clear()
            replay: Any = record(passes, device=job.device)[0].replay if job.cuda else passes
            for turn in range(2):
                inputs[0].mul_(2)
                job.stagger(turn)
                with on_capture_stream(job.device):
                    replay()
                found.append([parameter.grad.clone() for parameter in model.parameters()])
            once = 5 * len(model.blocks)
            assert len(taken) == (0 if not lent else once if job.cuda else 2 * once), len(taken)
            buckets = {id(parameter): place.view.data_ptr() for parameter, place in hook.places._places.items()}
            for parameter, at in taken:
                assert parameter.grad.data_ptr() == at == buckets[id(parameter)]
    for due, gradients in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(due, gradients, strict=True))


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


CHECKS = (gathers, reductions, sums_in_order, averages, shards, buckets, places, ways)
GPU_CHECKS = (*CHECKS, graphs, captures_refused)


def run(folder: Path, device: str, ranks: int, seconds: float) -> list[dict[str, str | None]]:
    """Start the ranks, and wait for what each of them finds."""
    folder.mkdir(parents=True)
    port, started = free_port(), []
    for rank in range(ranks):
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(one) for name, one in places.items()}}
        words = [sys.executable, "-m", "tests.dig.copying_job", str(folder), device]
        started.append(subprocess.Popen(words, env=environment))
    deadline = time.monotonic() + seconds
    try:
        for process in started:
            process.wait(timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        pass  # What was found until then says which check never ended.
    finally:
        for process in started:
            process.kill()
    found = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in found]


def main(folder: Path, device: str) -> None:
    found: dict[str, str | None] = {}
    with joined(device, hang_seconds=60) as ranks:
        job = Job(folder, ranks)
        for check in GPU_CHECKS if device == "cuda" else CHECKS:
            try:
                check(job)
                found[check.__name__] = None
            except Exception:  # Whatever it is: it is what the check found, and the test of that name fails of it.
                found[check.__name__] = traceback.format_exc()
                print(f"rank {ranks.rank}, {check.__name__}: {found[check.__name__]}", flush=True)
            (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
            if any(ranks.gather(found[check.__name__])):
                break  # Ranks may stand at different places now.
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
