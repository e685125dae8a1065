"""What ranks that copy check of models in training: FSDP's shards, DistributedDataParallel's buckets, and graphs."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
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
from dig.training.parallel import copying
from dig.training.parallel.copying import CopyAllReduce, use_copies
from dig.training.shares import local
from tests.dig.copying_ranks import Job
from tests.helpers import example, randomize

STEPS = 4
WIDTH = 48


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
