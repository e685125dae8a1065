"""The commands of ``python -m bench``: run here; the others in modules of their own, in order below."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from bench.cases import suites as case_lists
from bench.cases.case import COMPILED, SCOPES, Case, Dtype, Execution, Mode, Weights
from bench.cases.choices import choose_device, default_dtype, default_execution, default_resolution
from bench.cases.jobs import Limits
from bench.cli import helps, helps_ops
from bench.cli.capacity import capacity
from bench.cli.compare import compare, export
from bench.cli.coverage import coverage
from bench.cli.dry_run import tell_sweep
from bench.cli.first_step import first_step
from bench.cli.kernels import kernels
from bench.cli.list import list_models
from bench.cli.ops import ops
from bench.cli.options import check_patch, check_sizes, numbers, some_of, words
from bench.cli.profile import profile
from bench.cli.regression import regression
from bench.cli.sampling import sampling
from bench.cli.scaling import scaling
from bench.cli.waiting import Waiting
from bench.messages import OneLineGroup, check_count, check_positive, one_of, refuse, visible
from bench.run.ahead import build_ahead
from bench.run.gpus import Card, choose_cards, visible_cards
from bench.run.lanes import ALONE, SPREAD, Alone, Plan, Spread, comparison, run_on_cards
from bench.run.process import expect_compiling
from bench.run.runner import Findings, Sweep, finished_launches, run_sweep
from bench.store.identity import code_hash
from bench.store.rows import ResultError, ResultsWriter, Row, read_results
from dig.command_line import root
from dig.environment import ROOT, describe_environment, gpu_present
from dig.helping import add_help
from dig.registry import parse_name

app = typer.Typer(
    cls=OneLineGroup,
    add_completion=False,
    no_args_is_help=True,
)
app.callback(help="Measure speed and memory of DiG, DiT, Flash-DiT and DiS against resolution and model size.")(root)
GIB = 2**30
MOST_LAUNCHES = 10_000
MOST_AHEAD = 256
AXES = (
    "models", "sizes", "patch", "resolutions", "modes", "batch", "executions", "compile_scope", "max_autotune", "dtype",
    "weights",
)  # fmt: skip
"""Options of a run that a suite has values of its own for."""


def _default_models(device: str) -> list[str]:
    return list(case_lists.COMPARED if device == "cuda" else case_lists.ON_CPU)


def run(
    ctx: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A fixed set of cases instead of axes: paper (both figures, GPU), best (every family at its best, "
            "compiled and in graphs, GPU), cpu (both figures in small) or auto: paper or cpu."
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Families with options, separated by commas: DiG, DiG:fla, DiG:fla:variant=release, "
            "Flash-DiT:sdpa-cudnn, or your own by import path: my_package.my_module:MyFamily. "
            "Default: DiG on this project's kernels and every model of the paper on its fastest published ones (GPU), "
            "or every model on its reference implementation (CPU)."
        ),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Model sizes, separated by commas.")] = "S",
    patch: Annotated[int, typer.Option(help="Patch side: 2, 4 or 8.")] = 2,
    resolutions: Annotated[
        str | None,
        typer.Option(
            "--resolutions",
            "--resolution",
            help="Image sides in pixels, separated by commas. Default: 1024 on a GPU, 128 on a CPU.",
        ),
    ] = None,
    modes: Annotated[str, typer.Option(help="train (forward, backward, AdamW), forward, or both.")] = "train,forward",
    executions: Annotated[
        str | None,
        typer.Option(
            help="eager, compile (torch.compile), graph (one CUDA graph), compiled-graph (both), separated by commas. "
            "Default: graph on a GPU, eager on a CPU."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (autocast) or fp32. Default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Path, typer.Option(help="Results file (JSON lines); rows are appended.")] = Path(
        "out/results.jsonl"
    ),
    resume: Annotated[bool, typer.Option(help="Skip what the results file has already.")] = False,
    compile_scope: Annotated[
        str, typer.Option(help="What one compilation covers: block (one for all blocks of a kind, seconds) or model.")
    ] = "block",
    max_autotune: Annotated[
        bool, typer.Option("--max-autotune", help="Let Inductor time tiles and libraries for each product; minutes.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="fp32 (autocast), bf16 (a forward pass of a model that was cast), or both.")
    ] = "fp32",
    ahead: Annotated[
        int,
        typer.Option(
            "--build-ahead",
            help="Compare models with their references, and build kernels of compiled cases, so many side by side "
            "before any is measured; 0: each in its turn.",
        ),
    ] = 0,
    prepare_limit: Annotated[
        float,
        typer.Option(
            help="Seconds of a case for building the model, and for building and tuning its kernels: fla tunes for "
            "minutes the first time."
        ),
    ] = 900.0,
    time_limit: Annotated[float, typer.Option(help="Seconds a case may take after that.")] = 300.0,
    launches: Annotated[
        int, typer.Option(help="Process launches a case, in rounds of random order; bench compare needs five.")
    ] = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be measured, with estimates of memory and time, and end."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress, no line a case: only warnings, errors and the last line.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="GPUs to spread the cases over, a case a GPU at a time, by index, separated by commas: 0,1. "
            "Default: the first one alone."
        ),
    ] = None,
    alone: Annotated[
        str,
        typer.Option(
            help="Of several GPUs, what is measured while the others rest: eager (cases that the host launches step by "
            "step: eager, compile) or none. What ran beside another is marked."
        ),
    ] = "eager",
    spread: Annotated[
        str,
        typer.Option(
            help="What stays on one of several GPUs: comparisons (all models of a size, resolution, batch and mode) or "
            "cases."
        ),
    ] = "comparisons",
) -> None:
    """Measure cases and append a row for each to the results file.

    A case that runs out of memory, takes too long or fails becomes a row with its status. Ctrl-C ends the run with
    what was measured; --resume goes on from there, and leaves alone what was measured with the same code, versions and
    kind of card.

    A launch whose clock was held down is measured once more when all others are done, for half a minute in all.
    """
    if suite is not None:
        _refuse_axes(ctx, suite)
    check_count(batch, "--batch")
    check_patch(patch)
    one_of(compile_scope, "--compile-scope", SCOPES)
    check_count(launches, "--launches", most=MOST_LAUNCHES)
    check_positive(time_limit, "--time-limit")
    check_positive(prepare_limit, "--prepare-limit")
    check_count(ahead, "--build-ahead", least=0, most=MOST_AHEAD)
    one_of(alone, "--alone", ALONE)
    one_of(spread, "--spread", SPREAD)
    where = choose_device(device, present=gpu_present())
    try:
        if gpus is not None and device == "cpu":
            refuse("--gpus is of GPUs, and --device cpu measures on none; leave one of them out")
        cards = () if gpus is None else choose_cards(gpus, visible_cards() if where == "cuda" else [])
        if suite is not None:
            one_of(suite, "--suite", ("auto", *case_lists.SUITES))
            name = ("paper" if where == "cuda" else "cpu") if suite == "auto" else suite
            selected = case_lists.suite(name)
            if where == "cpu" and any(case.device == "cuda" for case in selected):
                refuse(f"the suite {name} needs an NVIDIA GPU; use --suite cpu")
        else:
            named = words(models) if models is not None else _default_models(where)
            of_sizes = words(sizes)
            check_sizes(of_sizes, "--sizes", [case_lists.ModelChoice.parse(text, where).family for text in named])
            ways = default_execution(where) if executions is None else executions
            number = default_dtype(where) if dtype is None else dtype
            one_of(number, "--dtype", get_args(Dtype))
            if not set(words(ways)) & set(COMPILED) and "compile_scope" in _typed(ctx):
                refuse(f"--compile-scope is of compiled executions; these are {ways}: add {' or '.join(COMPILED)}")
            selected = case_lists.sweep(
                named,
                sizes=of_sizes,
                patch=patch,
                resolutions=[default_resolution(where)]
                if resolutions is None
                else numbers(resolutions, "--resolutions"),
                modes=cast(Any, some_of(modes, "--modes", get_args(Mode))),
                executions=cast(Any, some_of(ways, "--executions", get_args(Execution))),
                scope=cast(Any, compile_scope),
                max_autotune=max_autotune,
                batch=batch,
                dtype=cast(Any, number),
                weights=cast(Any, some_of(weights, "--weights", get_args(Weights))),
                device=cast(Any, where),
            )
            if not quiet and "train" in words(modes) and words(weights) == ["bf16"]:
                said = "training steps are left out: bf16 weights are of forward passes; --weights fp32,bf16 has both"
                Console(stderr=True, soft_wrap=True).print(said, markup=False)
        # What stands twice, by two names perhaps (DiG and DiG:reference), is measured once.
        selected = case_lists.tuned_last(case_lists.without_repeats(selected))
        if not selected:
            refuse("nothing to measure: every axis needs at least one value")
        if models is not None:
            _require_packages(selected)
        limits = Limits(prepare=prepare_limit, measure=time_limit)
        if dry_run:
            tell_sweep(selected, out=out, resume=resume, launches=launches, limits=limits)
            return
        where_to: dict[str, Any] = {"cards": cards, "alone": alone, "spread": spread}
        _run(selected, out=out, resume=resume, limits=limits, launches=launches, ahead=ahead, quiet=quiet, **where_to)
    except (ValueError, ResultError) as error:
        refuse(str(error))


def _typed(ctx: typer.Context) -> list[str]:
    """The axes that the command line names."""
    return [name for name in AXES if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def _refuse_axes(ctx: typer.Context, suite: str) -> None:
    """Refuse options that say what a suite says already; it would be measured as if they were not there."""
    if typed := _typed(ctx):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        refuse(f"{given}: --suite {suite[:80]} has cases of its own, and axes belong to a run without --suite")


def _require_packages(selected: list[Case]) -> None:
    """Refuse a run that names a model whose package is missing; a suite records it as a row instead."""
    for case in selected:
        if message := parse_name(case.model)[0].missing_packages(dict(case.options)):
            refuse(message)


def _run(
    selected: list[Case],
    *,
    out: Path,
    resume: bool,
    limits: Limits,
    launches: int,
    ahead: int,
    quiet: bool,
    cards: tuple[Card, ...],
    alone: Alone,
    spread: Spread,
) -> None:
    loud = Console(stderr=True, soft_wrap=True)
    console = Console(stderr=True, soft_wrap=True, quiet=True) if quiet else loud
    with ResultsWriter(out) as writer:
        if said := writer.said_of_torn_line:
            loud.print(visible(said), style="yellow", markup=False)
        before = read_results(out).rows if resume else ()
        sweep = Sweep(
            cases=tuple(selected),
            launches=launches,
            done=finished_launches(before),
            limits=limits,
            code=code_hash(ROOT),
            environment={**describe_environment(), **(cards[0].environment if cards else {})},
            card=cards[0] if cards else None,
        )
        skipped = len(selected) * launches - len(sweep.remaining)
        done = f", {skipped} done before" if skipped else ""
        console.print(visible(f"{len(sweep.remaining)} cases to measure into {out}{done}"), markup=False)
        if len(cards) > 1:
            _tell_idle(sweep, cards, spread, loud)
        if any(launch.case.compiles for launch in sweep.remaining):
            expect_compiling()
        measured = rows_written = 0
        # SIGINT too: a shell that starts the harness in the background has it ignored.
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interrupt, signal.default_int_handler)
        try:
            with Waiting(console, total=len(sweep.remaining)) as waiting:
                findings = Findings()
                if ahead:
                    went = build_ahead(
                        dict.fromkeys(launch.case for launch in sweep.remaining),
                        at_once=ahead,
                        limits=limits,
                        on_start=lambda case, doing: waiting.show(f"{case.describe()}: {doing}"),
                        cards=cards,
                        findings=findings,
                    )
                    sweep = replace(sweep, built=frozenset(case for case, status in went.items() if status == "ok"))
                    waiting.begin()

                def tell(case: Case, doing: str) -> None:
                    waiting.show(f"{case.describe()}: {doing}")

                if len(cards) > 1:
                    plan = Plan(sweep=sweep, cards=cards, alone=alone, spread=spread, before=before, findings=findings)
                    rows = run_on_cards(plan, writer, on_start=tell)
                else:
                    rows = run_sweep(sweep, writer, on_start=tell, findings=findings)
                for row in rows:
                    rows_written += 1
                    if "measured-again" not in row.marks:
                        measured += 1
                        waiting.advance()
                    if quiet and row.status != "ok":
                        loud.print(visible(_line(row)), markup=False, highlight=False)
                    waiting.print(_line(row))
        except KeyboardInterrupt:
            said = f"stopped: {measured} of {len(sweep.remaining)} cases are in {out}; go on with --resume"
            loud.print(visible(said), markup=False)
            sys.exit(130)
    loud.print(visible(f"done: {rows_written} rows in {out}"), markup=False)


def _tell_idle(sweep: Sweep, cards: tuple[Card, ...], spread: Spread, console: Console) -> None:
    """Say so, where there is less to spread than there are GPUs."""
    apart = len({comparison(launch.case, spread) for launch in sweep.remaining})
    if 0 < apart < len(cards):
        hint = "; --spread cases uses more" if spread == "comparisons" else ""
        console.print(f"{apart} of {len(cards)} GPUs will be used: no {spread[:-1]} is spread over several{hint}")


def _line(row: Row) -> str:
    """One measured row for people."""
    if row.median_ms is None:
        return f"{row.case.describe()}: {row.status}: {row.message}"
    peak = row.memory.peak if row.memory else None
    memory = f"{peak / GIB:.2f} GiB" if peak else "memory unknown"
    marks = f" [{', '.join(row.marks)}]" if row.marks else ""
    share = f", {row.ceiling_share:.0%} of the matmul ceiling" if row.ceiling_share else ""
    speed = f"{row.median_ms:.3g} ms (n={len(row.samples_ms)}), {row.fps:.3g} img/s"
    where = f" on GPU {row.placement.gpu}" if row.placement is not None else ""
    return f"{row.case.describe()}{where}: {speed}, {memory}{share}{marks}"


for command in (
    run,
    list_models,
    sampling,
    scaling,
    compare,
    export,
    regression,
    kernels,
    profile,
    capacity,
    first_step,
    coverage,
):
    app.command("list" if command is list_models else None)(command)
app.add_typer(ops, name="ops")
add_help(app, helps.HELPS, helps.FIRST)
add_help(ops, helps_ops.HELPS, helps_ops.FIRST)
