"""What ``--dry-run`` prints: what would be done, and what it takes by a short measurement. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from dig.memory import in_bytes
from dig.messages import one_line
from dig.progress import duration, number

if TYPE_CHECKING:
    from torch import Tensor

    from dig.sampling.runner import BatchSampler
    from dig.training.config import TrainConfig
    from dig.training.data import DataSet

NOTHING = "dry run: nothing was written"


def tell(**facts: str) -> None:
    """Print facts, a line each, on stdout."""
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' ')}: {one_line(value)}")


def rehearse_training(
    config: TrainConfig, dataset: DataSet, *, done: int, workers: int | None, first: Mapping[str, Tensor] | None
) -> None:
    """Print what a run would be, and measure a few steps of it.

    Args:
        config: The run.
        dataset: Its data, open.
        done: Steps that lie behind.
        workers: Processes that read the data.
        first: State dict of its first weights, where they are those of a file.
    """
    from dig.training.needs import count_parameters, training_needs
    from dig.training.rehearsal import rehearse

    parameters = count_parameters(config.model)
    steps = config.steps - done
    needs = training_needs(config)
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    passes = config.steps * config.batch / len(dataset)
    tell(
        model=config.model.describe(),
        parameters=f"{parameters:,}",
        data=f"{dataset.describe()}; {number(passes)} passes",
        steps=f"{config.steps:,}" + (f", {done:,} of them done" if done else ""),
        batch=f"{config.batch}{parts}",
        device=f"{config.device}, {config.dtype}, execution {config.execution} ({config.execution_reason})",
        **{
            "memory_at_least" if config.device == "cuda" else "memory_estimated": f"{in_bytes(sum(needs.values()))}: "
            + ", ".join(f"{name} {in_bytes(bytes_)}" for name, bytes_ in needs.items() if bytes_)
        },
        # Weights, their average and two moments.
        a_checkpoint=f"{in_bytes(16 * parameters)}, {config.keep} of them kept",
    )
    if steps <= 0:
        tell(time="none: the run is finished")
        typer.echo(NOTHING)
        return
    # What is above stays where the measurement fails or is interrupted.
    taken = rehearse(config, dataset, workers=workers, first=first)
    where = "the GPU's" if config.device == "cuda" else "the whole process"
    tell(trained=f"{taken.trained:,} numbers", memory_measured=f"{in_bytes(taken.memory)} ({where})")
    if taken.seconds is None:
        tell(time=f"the one step took {duration(taken.first)}")
    else:
        tell(
            time=f"{taken.seconds:.3g} s a step, {number(config.batch / taken.seconds)} images/s: "
            f"{duration(steps * taken.seconds)} for {steps:,} steps, without grids, checkpoints and the first step "
            f"({taken.first:.3g} s)"
        )
    typer.echo(NOTHING)


def rehearse_sampling(runner: BatchSampler, *, model: str, parameters: int, device: str) -> None:
    """Print what would be sampled, and measure one step of it.

    Args:
        runner: Samples by index.
        model: In words.
        parameters: How many it has.
        device: Where it runs.
    """
    from dig.memory import peak_memory

    plan = runner.plan
    M = plan.model_batch
    batches = -(-(plan.first + plan.count) // M) - plan.first // M
    guidance = f", guidance {plan.cfg_scale:g}" if plan.cfg_scale != 1 else ""
    tell(
        model=model,
        parameters=f"{parameters:,}",
        samples=f"{plan.count:,} of {len(set(plan.classes)):,} classes, from index {plan.first:,} on",
        sampler=f"{plan.sampler}, {runner.steps} steps{guidance}",
        batch=f"{M} at once, {batches:,} batches",
        device=f"{device}, {plan.precision}",
    )
    runner.one_step()
    started = time.perf_counter()
    runner.one_step()
    seconds = time.perf_counter() - started
    tell(
        memory_measured=f"{in_bytes(peak_memory(device))} ({'the GPU' if device == 'cuda' else 'the whole process'})",
        time=f"{seconds:.3g} s a step, eagerly: {duration(seconds * runner.steps * batches)} for all, without decoding",
    )
    typer.echo(NOTHING)
