"""``python -m bench scaling``: training one model on more and more GPUs. No torch here.

A command of its own beside ``bench run``: there a case has a GPU, and several GPUs several cases. Here a case has
several GPUs, and what counts is a comparison between cases.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cases.case import Case, Dtype
from bench.cases.choices import choose_device, default_dtype
from bench.cases.jobs import Limits, RankJob
from bench.cases.scaling import (
    BATCH,
    EXECUTIONS,
    MODELS,
    MOST_PROCESSES,
    PARALLEL,
    RESOLUTION,
    SIZE,
    WAYS,
    Axes,
    alone_of,
    budget_of,
    powers_up_to,
    scaling_cases,
    to_measure,
)
from bench.cases.suites import ModelChoice
from bench.cli.options import check_patch, check_sizes, numbers, some_of, words
from bench.cli.waiting import Waiting
from bench.judge.scaling import Point, points
from bench.messages import check_count, check_positive, one_of, refuse, say, visible
from bench.run.gpus import Card, choose_cards, visible_cards
from bench.run.process import WorkerError, expect_compiling
from bench.run.ranks import QUIET, run_ranks
from bench.run.runner import PHASES, Launch, Referee, Sweep, finished_launches
from bench.store.identity import code_hash
from bench.store.ledgers import Rank, Scaling
from bench.store.rows import ResultError, ResultsWriter, Row, read_results, utc_now
from dig.environment import ROOT, describe_environment, gpu_present
from dig.registry import parse_name

GIB = 2**30


def scaling(
    models: Annotated[
        str | None,
        typer.Option(help=f"Families with options, separated by commas. Default on a GPU: {','.join(MODELS['cuda'])}."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Model size. Default: XL on a GPU, S on a CPU.")] = None,
    patch: Annotated[int, typer.Option(help="Patch side: 2, 4 or 8.")] = 2,
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels. Default: 256 on a GPU, 64 on a CPU.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images of one GPU. Default: 32; 2 on a CPU.")] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs to use, by index, separated by commas: 0,1. Default: all.")
    ] = None,
    processes: Annotated[
        str | None,
        typer.Option(
            help="How many GPUs train one model, separated by commas: 1,2,4,8. One is always measured, to compare "
            "with. Default: 1, 2, 4 and so on up to all; 1,2 on a CPU."
        ),
    ] = None,
    parallel: Annotated[
        str, typer.Option(help="ddp (DistributedDataParallel), fsdp (FSDP2, by block), separated by commas.")
    ] = ",".join(PARALLEL),
    sending: Annotated[
        str,
        typer.Option(
            help="How the GPUs send: collectives (NCCL), copies (copy engines, within one host), separated by commas."
        ),
    ] = "collectives",
    executions: Annotated[
        str | None,
        typer.Option(
            help="graph (the whole step as one CUDA graph), eager, separated by commas; compiled too, where "
            "the suite best compiles a family. Default: both; eager on a CPU."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (autocast) or fp32. Default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Path, typer.Option(help="Results file (JSON lines); rows are appended.")] = Path(
        "out/scaling.jsonl"
    ),
    resume: Annotated[
        bool, typer.Option(help="Skip what the results file has; one GPU is measured again beside what is left.")
    ] = False,
    prepare_limit: Annotated[
        float, typer.Option(help="Seconds of a case for building the model and its kernels.")
    ] = 900.0,
    time_limit: Annotated[float, typer.Option(help="Seconds a case may take after that.")] = 300.0,
) -> None:
    """Measure training on 1, 2, 4 and more GPUs of this machine: images a second, efficiency, exposed communication.

    Every GPU has the same number of images. Efficiency is against one GPU in the same run; exposed communication is the
    step's time less that of the same step with nothing sent. A rank that fails ends its case, as a row with the reason.

    Exit status 1: a case could not be measured; its row says why. 2: bad input.
    """
    check_patch(patch)
    check_count(1 if batch is None else batch, "--batch")
    check_count(1 if resolution is None else resolution, "--resolution")
    check_positive(time_limit, "--time-limit")
    check_positive(prepare_limit, "--prepare-limit")
    where = choose_device(device, present=gpu_present())
    try:
        cards = _cards(gpus, device, where)
        counts = _counts(processes, cards, where)
        named = words(",".join(MODELS[where]) if models is None else models)
        of_size = SIZE[where] if size is None else size
        check_sizes([of_size], "--size", [ModelChoice.parse(text, where).family for text in named])
        ways = executions
        if ways is None:
            ways = "eager" if where == "cpu" else ",".join(EXECUTIONS)
        number = default_dtype(where) if dtype is None else dtype
        one_of(number, "--dtype", get_args(Dtype))
        axes = Axes(
            models=named,
            size=of_size,
            patch=patch,
            resolution=RESOLUTION[where] if resolution is None else resolution,
            batch=BATCH[where] if batch is None else batch,
            processes=counts,
            parallel=cast(Any, some_of(parallel, "--parallel", PARALLEL)),
            sending=cast(Any, some_of(sending, "--sending", WAYS)),
            executions=cast(Any, some_of(ways, "--executions", EXECUTIONS)),
            dtype=cast(Any, number),
            device=cast(Any, where),
        )
        cases = scaling_cases(axes)
        if not cases:
            refuse("nothing to measure: --models must name something")
        for case in cases:
            if message := parse_name(case.model)[0].missing_packages(dict(case.options)):
                refuse(message)
        rows = _measure(cases, cards, Limits(prepare=prepare_limit, measure=time_limit), out=out, resume=resume)
    except (ValueError, ResultError) as error:
        refuse(str(error))
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)


def _cards(gpus: str | None, device: str, where: str) -> tuple[Card, ...]:
    if gpus is not None and device == "cpu":
        refuse("--gpus is of GPUs, and --device cpu measures on none; leave one of them out")
    found = visible_cards() if where == "cuda" else []
    if where == "cpu" and gpus is None:
        return ()
    return choose_cards(gpus if gpus is not None else ",".join(str(i) for i in range(len(found))), found)


def _counts(processes: str | None, cards: tuple[Card, ...], where: str) -> list[int]:
    most = len(cards) if where == "cuda" else MOST_PROCESSES
    if processes is None:
        return powers_up_to(len(cards)) if where == "cuda" else [1, 2]
    counts = numbers(processes, "--processes")
    if (largest := max(counts)) > most:
        of = f"{most} GPU{'s' if most > 1 else ''} to use" if where == "cuda" else f"at most {most} on a CPU"
        refuse(f"--processes takes a GPU each, and there {'is' if most == 1 else 'are'} {of}; got {largest}")
    return counts


def _measure(cases: list[Case], cards: tuple[Card, ...], limits: Limits, *, out: Path, resume: bool) -> list[Row]:
    """Measure what is to be measured, print it as a table, and return its rows."""
    os.environ.update(QUIET)  # Of all processes that measure here, so that their rows say it.
    console = Console(stderr=True, soft_wrap=True)
    rows: list[Row] = []
    with ResultsWriter(out) as writer:
        if said := writer.said_of_torn_line:
            console.print(visible(said), style="yellow", markup=False)
        before = read_results(out).rows
        sweep = Sweep(
            cases=tuple(cases),
            done=finished_launches(before) if resume else frozenset(),
            limits=limits,
            budget=budget_of(cases[0].device),
            code=code_hash(ROOT),
            environment={**describe_environment(), **(cards[0].environment if cards else {})},
            card=cards[0] if cards else None,
        )
        left = {launch.case for launch in sweep.remaining}
        todo = to_measure(cases, [case for case in cases if case not in left])
        done = f", {len(cases) - len(left)} done before" if len(left) < len(cases) else ""
        console.print(visible(f"{len(todo)} cases to measure into {out}{done}"), markup=False)
        if any(case.compiles for case in todo):
            expect_compiling()
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interrupt, signal.default_int_handler)
        try:
            with Waiting(console, total=len(todo)) as waiting:
                for row in run_scaling(sweep, todo, cards, on_start=lambda case, doing: _show(waiting, case, doing)):
                    writer.write(row)
                    rows.append(row)
                    waiting.advance()
                    waiting.print(_line(row))
        except KeyboardInterrupt:
            console.print(visible(f"stopped: {len(rows)} of {len(todo)} cases are in {out}; go on with --resume"))
            raise typer.Exit(130) from None
    Console().print(table([point for point in points([*before, *rows]) if point.row.case in set(cases)]))
    say(f"done: {len(rows)} rows in {out}", err=True)
    return rows


def _show(waiting: Waiting, case: Case, doing: str) -> None:
    waiting.show(f"{case.describe()}: {doing}")


def run_scaling(
    sweep: Sweep, cases: list[Case], cards: tuple[Card, ...], *, on_start: Callable[[Case, str], None]
) -> Iterator[Row]:
    """Measure cases one after the other, of one process or more; a failure is a row.

    Args:
        sweep: How.
        cases: Which.
        cards: As many as the largest case has processes; none on a CPU.
        on_start: Told a case, and what is done with it.
    """
    referee, run = Referee(limits=sweep.limits, card=sweep.card), utc_now()
    for case in cases:
        referee.on_phase = lambda doing, case=case: on_start(case, doing)  # type: ignore[misc]
        job = sweep.job(Launch(case=case), sweep.card)
        if case.processes == 1:
            row = referee.measure(job)
            times, peak = row.samples_ms, row.memory.peak if row.memory else None
            uuid = row.environment.get("gpu_uuid")
            ranks = (Rank(median_ms=median(times), peak=peak, gpu_uuid=uuid),) if times else ()
            yield replace(row, placement=None, scaling=Scaling(run=run, ranks=ranks))
            continue
        failed = Row(
            case=case,
            status="error",
            started_at=utc_now(),
            environment=dict(job.environment),
            key=job.key,
            scaling=Scaling(run=run),
        )
        agreed = referee.agreement(alone_of(case))
        if "message" in agreed:
            yield replace(failed, status=agreed["status"], message=f"parity: {agreed['message']}")
            continue
        on_start(case, f"starting {case.processes} processes")
        patience = sweep.limits.prepare + sweep.limits.measure
        try:
            row = run_ranks(
                RankJob(job=job, run=run, patience=patience),
                cards=cards,
                limits=sweep.limits,
                on_phase=lambda phase, case=case: on_start(case, PHASES[phase]),  # type: ignore[misc]
            )
        except WorkerError as error:
            row = replace(failed, status=error.status, message=str(error))
        referee.wait_for_memory()
        if row.checks is not None:
            checks = replace(
                row.checks,
                reference=agreed.get("reference"),
                reference_error=agreed.get("error"),
                reference_bound=agreed.get("bound"),
                gradients_off=agreed.get("gradients_off"),
                gradient_draws=agreed.get("draws"),
            )
            row = replace(row, checks=checks)
        yield row


def _line(row: Row) -> str:
    if row.median_ms is None:
        return f"{row.case.describe()}: {row.status}: {row.message}"
    peak = row.memory.peak if row.memory else None
    memory = f", {peak / GIB:.2f} GiB a process at most" if peak else ""
    marks = f" [{', '.join(row.marks)}]" if row.marks else ""
    return f"{row.case.describe()}: {row.median_ms:.4g} ms, {row.fps:.4g} img/s{memory}{marks}"


def table(found: list[Point]) -> Table:
    """Every point for people."""
    title = "training on several devices; efficiency against one, of the same run"
    shown = Table(title=title)
    for heading in ("model", "way", "devices", "images/s", "step, ms", "efficiency", "exposed, ms", "GiB a device"):
        shown.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    for point in found:
        row, case = point.row, point.row.case
        options = ", ".join(value for _, value in case.options)
        way = f"{case.together}, {case.way}" if case.parallel else case.way
        peak = row.memory.peak if row.memory else None
        cells = (
            f"{case.model} ({options})",
            way,
            str(case.processes),
            row.status if row.fps is None else f"{row.fps:.4g}",
            "" if point.step_ms is None else str(point.step_ms),
            "" if point.efficiency is None else str(point.efficiency),
            "" if point.exposed_ms is None else str(point.exposed_ms),
            f"{peak / GIB:.2f}" if peak else "",
        )
        shown.add_row(*(Text(visible(text)) for text in cells))
    return shown
