"""What runs in each of the processes that train one model together: the step of one process, over all of them.

`dig.training.parallel` wraps the model, as `dig train` does. Rank 0 decides how many steps are run; the others follow.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bench.cases.case import Case
from bench.cases.jobs import Budget, Phase, RankJob
from bench.measure.case import count_flops, fits_in_l2, prepare, stay_near, timing_of
from bench.measure.clocks import Watch
from bench.measure.failures import failed_row, failure
from bench.measure.memory import MemoryMeter
from bench.measure.profiler import kernel_names
from bench.measure.steps import (
    WARMUP_STEPS,
    Given,
    Step,
    build_model,
    capture,
    capture_stream,
    compile_parts,
    given_to,
    loss_of,
    training_step,
)
from bench.measure.timing import Sampled, follow, sample
from bench.measure.versions import versions
from bench.parity.error import ParityError, relative_error
from bench.parity.inputs import SEED
from bench.parity.kernels import check_kernels, doubts
from bench.store.ledgers import Checks, Memory, Rank, Scaling
from bench.store.rows import Mark, Row, utc_now
from dig.launched import place_in_job
from dig.layers import Backbone
from dig.nvml import Gpu
from dig.registry import parse_name
from dig.training.parallel import Parallel, Ranks, joined, wrap
from dig.training.shares import whole

GRADIENT_BOUND = {"bf16": 5e-2, "fp32": 1e-3}
"""Largest relative error of the mean gradient. A rank's own gradient has about 0.5, the sum of two ranks' has 1."""
LEAST_STEPS = 5
"""Least steps of a block. Ranks begin one a fraction of a millisecond apart: its first step waits for the last rank."""
SENDING = {"collectives": "nccl", "copies": "memcpy ptop"}
"""How ranks send → what the name of all that sends contains, in small letters."""


def measure_rank(job: RankJob, tell: Callable[[Phase], None], answer: Callable[[Row], None]) -> None:
    """Measure a case as one of its ranks.

    Args:
        job: Which case. The rank, and where the others are, is in the environment, as torchrun sets it.
        tell: Called with what is done next.
        answer: Called with this rank's row, once all ranks are done; or at once, where this one failed.
    """
    case, started_at = job.case, utc_now()
    environment = {**job.job.environment, **versions(case.device)}

    def failed(error: Exception) -> Row:
        traceback.print_exc()
        return failed_row(job.job, *failure(error), started_at=started_at, environment=environment)

    answered = False
    try:
        place = place_in_job()[2]
        gpu = Gpu.open(place=place) if case.device == "cuda" else None
        if cpus := stay_near(gpu):
            environment = {**environment, "near_cpus": cpus}
        if gpu is not None:
            environment = {**environment, **gpu.describe()}
        watch = Watch(gpu)  # Before CUDA starts here.
        if case.device == "cuda":
            torch.cuda.set_device(place)  # The meter starts CUDA, on the GPU that is then the current one.
        meter = MemoryMeter(case.device, gpu)
        with joined(case.device, hang_seconds=job.patience) as ranks:
            try:
                row = _measure(job, ranks, _Kept(started_at, environment, watch, meter), tell)
                ranks.gather(None)  # All of them are done.
            except Exception as error:
                row = failed(error)
            # Before the group is taken down, which waits where others wait for this one, or a graph has sent over it.
            answer(row)
            answered = True
    except Exception as error:
        if not answered:
            answer(failed(error))


class _Kept(NamedTuple):
    """What is known of a rank before it meets the others."""

    started_at: str
    environment: Mapping[str, Any]
    watch: Watch
    meter: MemoryMeter


def _measure(job: RankJob, ranks: Ranks, kept: _Kept, tell: Callable[[Phase], None]) -> Row:
    case, budget = job.case, job.job.budget
    watch, meter, environment = kept.watch, kept.meter, kept.environment
    # A step that is not captured stays where it will be timed: DistributedDataParallel keeps to its first stream.
    stream = capture_stream(case.device) if case.captures else contextlib.nullcontext()
    tell("building")
    model = build_model(case)
    given = given_to(model, case, seed=SEED + ranks.rank)
    if case.compiles:
        compile_parts(model, scope=case.scope, max_autotune=case.max_autotune)
    tell("compiling")
    with _label_kept(model, given), stream:
        due = _projections(model, loss_of(model.train(), case, given))
        ranks.mean_(due)
        parallel = wrap(
            model,
            cast(Any, case.parallel),
            dtype=cast(Any, case.dtype),
            captured=case.captures,
            sending=cast(Any, case.sending),
        )
        loss = loss_of(parallel.network, case, given)
        found = [_projections(model, loss)]
        if case.captures:
            found.append(_replayed(model, loss, max(WARMUP_STEPS, parallel.warmup)))
    bound = GRADIENT_BOUND[case.dtype]
    errors = [relative_error(each, due) for each in found]
    # The first that is beyond it, NaN too; else the largest.
    error = next((each for each in errors if not each <= bound), max(errors))
    if not error <= bound:
        raise ParityError(f"its gradient is off the mean of the ranks' own by {error:.2g}; {bound:g} is allowed")
    step = training_step(model, parallel.network, case, given)
    meter.built()
    _warm_up(step, case, max(WARMUP_STEPS, parallel.warmup if case.captures else 0))
    tell("measuring")
    run, memory = prepare(step, case, meter)
    if parallel.windows is not None:
        memory = _and_windows(memory, parallel.windows.uncounted)
    timed = _in_step(run, ranks, budget, case.device, watch)
    # On a CPU the profiler, beside gloo's threads, has been seen to end a rank with a damaged heap (PyTorch 2.13).
    names = kernel_names(run, case.device) if case.device == "cuda" else set()
    kernels = _check_names(case, names)
    del run
    silent_ms = _silent(step, parallel, ranks, case, budget)
    if parallel.windows is not None:
        parallel.windows.check(ranks.gather)
    marks: list[Mark] = watch.marks() if case.device == "cuda" else []
    if timed.warmup == "bound":
        marks.append("unsteady")
    # The parity check compared a model of one process; what was compared here is the gradient.
    marks += [*doubts(case, names), "small-parity", "not-rechecked"]
    if fits_in_l2(case, memory.allocator_peak):
        marks.append("l2-warm")
    flops, uncounted = count_flops(case, model)
    backend = str(dist.distributed_c10d._get_default_group()._get_backend(ranks.device).name())
    return Row(
        case=case,
        status="ok",
        started_at=kept.started_at,
        samples_ms=tuple(round(x, 5) for x in timed.samples_ms),
        memory=memory,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=flops,
        message=uncounted,
        matmul_ceiling=job.job.matmul_ceiling,
        implementations=model.implementations,
        stop_reason=timed.stop_reason,
        environment=environment,
        launch=job.job.launch,
        key=job.job.key,
        marks=tuple(marks),
        timing=timing_of(case, timed),
        clocks=watch.clocks() if case.device == "cuda" else None,
        checks=Checks(inputs=step.inputs, tokens=model.grid[0] * model.grid[1], kernels=kernels),
        look=parse_name(case.model)[0].look,
        scaling=Scaling(
            run=job.run,
            backend=backend,
            ranks=(Rank(median_ms=median(timed.samples_ms), peak=memory.peak, gpu_uuid=environment.get("gpu_uuid")),),
            silent_ms=silent_ms,
            gradient_error=error,
            gradient_bound=bound,
        ),
    )


def _and_windows(memory: Memory, nbytes: int) -> Memory:
    """The ledger with what peers read, as far as the allocator did not count it."""
    counted = {name: getattr(memory, name) for name in ("resident", "allocator_peak", "reserved_peak")}
    return replace(memory, **{name: value + nbytes for name, value in counted.items() if value is not None})


def _warm_up(step: Step, case: Case, steps: int) -> None:
    with capture_stream(case.device) if case.captures else contextlib.nullcontext():
        for _ in range(steps):
            step.run()


@contextlib.contextmanager
def _label_kept(model: Backbone, given: Given) -> Iterator[None]:
    """Only labels that dropping changes nothing of, within: few models draw anything else in training."""
    y = given.tensors[3]
    before = y.clone()
    y.fill_(model.null_label)
    try:
        yield
    finally:
        y.copy_(before)


def _projections(model: Backbone, loss: Callable[[], Tensor]) -> Tensor:
    """Every gradient of a loss, each on a random direction that is the same on all ranks: one number a parameter."""
    torch.manual_seed(SEED)
    loss().backward()
    found = _projected([parameter.grad for parameter in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found


def _projected(gradients: Sequence[Tensor | None]) -> Tensor:
    found = []
    for number, share in enumerate(gradients):
        if share is None:
            continue
        gradient = whole(share).float()
        generator = torch.Generator(gradient.device).manual_seed(number)
        direction = torch.randn(gradient.shape, generator=generator, device=gradient.device)
        found.append((gradient * direction).sum())
    return torch.stack(found)


def _replayed(model: Backbone, loss: Callable[[], Tensor], warmup: int) -> Tensor:
    """`_projections` of gradients that a CUDA graph of the loss' passes leaves when it is replayed."""

    def passes() -> Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value

    for _ in range(warmup):
        passes()
    replay, _ = capture(passes)
    for _ in range(3):
        replay()
    found = _projected([parameter.grad for parameter in model.parameters()])
    model.zero_grad(set_to_none=True)
    return found


def _in_step(
    run: Callable[[], object], ranks: Ranks, budget: Budget, device: str, watch: Callable[[], None] | None = None
) -> Sampled:
    """`sample` on rank 0; on the others, the same steps."""
    if not ranks.leads:
        return follow(run, device=device, hear=lambda: ranks.from_leader(None), watch=watch)
    return sample(run, device=device, budget=budget, watch=watch, fewest=LEAST_STEPS, announce=ranks.from_leader)


def _check_names(case: Case, names: set[str]) -> tuple[str, ...]:
    """The kernels of the case's implementation, and one that sends.

    Raises:
        ParityError: They did not run.
    """
    if not names:
        return ()
    sending = sorted(name for name in names if SENDING[case.sending] in name.lower())
    if case.device == "cuda" and not sending:
        raise ParityError(f"nothing in the timed step sends: nothing's name has {SENDING[case.sending]!r} in it")
    return (*check_kernels(case, names), *(name[:200] for name in sending))


def _silent(step: Step, parallel: Parallel, ranks: Ranks, case: Case, budget: Budget) -> tuple[float, ...]:
    """The same step with nothing sent, timed on all ranks at a time; empty where PyTorch has no way to leave it out.

    What the ranks hold afterwards is of no use any more.
    """
    if isinstance(parallel.model, FSDPModule) and not _keep_to_itself(parallel.model, ranks.rank):
        return ()
    quiet = contextlib.nullcontext() if isinstance(parallel.model, FSDPModule) else parallel.accumulating(last=False)
    words = SENDING.values()
    with quiet:
        _warm_up(step, case, WARMUP_STEPS)
        run: Callable[[], object] = capture(step.run)[0] if case.captures else step.run
        if case.device == "cuda" and any(
            word in name.lower() for name in kernel_names(run, case.device) for word in words
        ):
            raise ParityError("the step that should send nothing does")
        return tuple(round(x, 5) for x in _in_step(run, ranks, budget, case.device).samples_ms)


class _Own:
    """The interface that FSDP2 has for collectives of one's own.

    Args:
        rank: Of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _OwnCopies(_Own):
    """Replaces an all-gather: copies this rank's shard to where the others' would be, and so writes as much."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        shares = output_tensor.view(-1, input_tensor.numel())
        # This rank's own shard lies in its place already.
        for others in (shares[: self._rank], shares[self._rank + 1 :]):
            others.copy_(input_tensor.view(1, -1))


class _OwnShare(_Own):
    """Replaces a reduce-scatter: takes this rank's shard of its own gradients."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.view(-1, output_tensor.numel())[self._rank].view_as(output_tensor))


def _keep_to_itself(model: FSDPModule, rank: int) -> bool:
    """Let a sharded model send nothing from now on; whether PyTorch can."""
    parts = [part for part in cast(torch.nn.Module, model).modules() if isinstance(part, FSDPModule)]
    if not all(hasattr(part, "set_custom_all_gather") and hasattr(part, "set_custom_reduce_scatter") for part in parts):
        return False
    for part in parts:
        part.set_custom_all_gather(cast(Any, _OwnCopies(rank)))
        part.set_custom_reduce_scatter(cast(Any, _OwnShare(rank)))
    return True
