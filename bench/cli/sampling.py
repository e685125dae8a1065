"""``python -m bench sampling``: how many samples a second models make, in turns on one device. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cases.case import CAPTURED, COMPILED, SCOPES, Dtype, Execution, Weights
from bench.cases.choices import choose_device, default_dtype, default_execution
from bench.cases.suites import ModelChoice
from bench.cli.options import check_patch, check_sizes, numbers, words
from bench.cli.waiting import Waiting
from bench.messages import check_count, check_positive, one_of, refuse, visible
from bench.sampling.rows import MOST_CFG, RowsWriter, SamplingCase, SamplingRow, compare
from bench.sampling.run import measure
from bench.store.lines import ResultError
from dig.environment import describe_environment
from dig.spec import check_resolution

MOST_REPEATS = 10_000
DEFAULT_MODELS = {"cuda": "DiG:triton:variant=release,Flash-DiT:sdpa-cudnn", "cpu": "DiG:variant=release,Flash-DiT"}
SAMPLERS = ("ddpm", "ddim", "dpm-solver++")
"""Those of models that predict noise; random weights can't tell, but Euler's steps are no step of these models'."""


def default_batch(resolution: int) -> int:
    """Samples at once: 32 at 256 pixels down to 4 at 1024, powers of two, the same for every model."""
    return int(max(1, 2 ** round(5 - 1.5 * math.log2(resolution / 256))))


def _cases(
    models: str, size: str, patch: int, resolutions: str, batch: int | None, setting: dict[str, Any]
) -> list[list[SamplingCase]]:
    """A group for each resolution, a case in it for each model. Raises ValueError on what can't be measured."""
    ways = [_way(text, setting) for text in words(models)]
    sides = numbers(resolutions, "--resolutions")
    if not ways:
        raise ValueError("nothing to measure: --models must name something")
    check_patch(patch)
    # What stands twice would only take turns with itself.
    ways = list({(choice.family.name, choice.options, *how.values()): (choice, how) for choice, how in ways}.values())
    for choice, _ in ways:
        options = dict(choice.options)
        choice.family.require_device(options, setting["device"])
        if message := choice.family.missing_packages(options):
            raise ValueError(message)
    check_sizes([size], "--size", [choice.family for choice, _ in ways])
    groups = []
    for resolution in sides:
        check_resolution(resolution, patch)
        groups.append(
            [
                SamplingCase(
                    model=choice.model(size, patch),
                    options=choice.options,
                    source=choice.source,
                    resolution=resolution,
                    batch=batch or default_batch(resolution),
                    **setting | how,
                )
                for choice, how in ways
            ]
        )
    return groups


def _way(text: str, setting: dict[str, Any]) -> tuple[ModelChoice, dict[str, Any]]:
    """A model, and how it runs: ``Flash-DiT:sdpa-cudnn@compiled-graph``, or as all do where it says nothing.

    Raises:
        ValueError: No such model, or an execution that this device has not.
    """
    name, mark, word = text.partition("@")
    execution = word if mark else setting["execution"]
    one_of(execution, f"execution of --models {name}" if mark else "--execution", get_args(Execution))
    if setting["device"] == "cpu" and execution in CAPTURED:
        raise ValueError(f"execution {execution} is a CUDA graph and needs an NVIDIA GPU; use eager")
    scope = setting["scope"] if execution in COMPILED else ""
    return ModelChoice.parse(name, setting["device"]), {"execution": execution, "scope": scope}


def sampling(
    models: Annotated[
        str | None,
        typer.Option(
            help="Families with options, separated by commas; the last is the peer that the others are compared with. "
            "An execution may follow a family: Flash-DiT:sdpa-cudnn@compiled-graph. "
            f"Default on a GPU: {DEFAULT_MODELS['cuda']}."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Model size: S, B, L or XL. Default: XL on a GPU, S on a CPU.")
    ] = None,
    patch: Annotated[int, typer.Option(help="Patch side: 2, 4 or 8.")] = 2,
    resolutions: Annotated[
        str | None,
        typer.Option(help="Image sides in pixels, separated by commas. Default: 256,1024 on a GPU, 64 on a CPU."),
    ] = None,
    sampler: Annotated[str, typer.Option(help=f"{', '.join(SAMPLERS)}.")] = "ddim",
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 50,
    cfg: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.5,
    cfg_channels: Annotated[str, typer.Option(help="Which noise channels are guided: three or all.")] = "three",
    batch: Annotated[
        int | None, typer.Option(help="Samples at once. Default: 32 at 256 pixels down to 4 at 1024; 4 on a CPU.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed batches of each model.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (autocast) or fp32. Default: bf16 on a GPU, fp32 on a CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    execution: Annotated[
        str | None,
        typer.Option(
            help="eager, compile (torch.compile), graph (all steps as one CUDA graph) or compiled-graph (both), of "
            "models that name none themselves. Default: graph on a GPU."
        ),
    ] = None,
    compile_scope: Annotated[str, typer.Option(help="What one compilation covers: block or model.")] = "block",
    weights: Annotated[str, typer.Option(help="fp32 (autocast) or bf16 (the model is cast).")] = "fp32",
    time_limit: Annotated[
        float, typer.Option(help="Seconds that a model may take to get ready, and for a batch.")
    ] = 300.0,
    out: Annotated[Path, typer.Option(help="File of rows (JSON lines); rows are appended.")] = Path(
        "out/sampling.jsonl"
    ),
) -> None:
    """Measure how many samples a second models make, from noise to latents; a VAE's decoding is not in it.

    Weights are random, their zeros filled; a batch's time is from drawing its noise until its latents are in the
    host's memory. One batch before the timed ones compiles, captures and warms up. Models take turns, batch by batch.

    Exit status 1: a model could not be measured; its row says why. 2: bad input.
    """
    try:
        where = choose_device(device)
        setting: dict[str, Any] = {
            "sampler": sampler,
            "steps": steps,
            "cfg": cfg,
            "cfg_channels": cfg_channels,
            "dtype": default_dtype(where) if dtype is None else dtype,
            "device": where,
            "execution": default_execution(where) if execution is None else execution,
            "scope": compile_scope,
            "weights": weights,
        }
        one_of(sampler, "--sampler", SAMPLERS)
        one_of(cfg_channels, "--cfg-channels", ("three", "all"))
        one_of(setting["dtype"], "--dtype", get_args(Dtype))
        one_of(compile_scope, "--compile-scope", SCOPES)
        one_of(weights, "--weights", get_args(Weights))
        check_count(steps, "--steps")
        check_count(repeats, "--repeats", most=MOST_REPEATS)
        check_count(1 if batch is None else batch, "--batch")
        check_positive(time_limit, "--time-limit")
        if not abs(cfg) <= MOST_CFG:
            raise ValueError(f"--cfg must be a number up to {MOST_CFG:g}; got {cfg:g}")
        if where == "cpu":
            size, resolutions, batch = (
                "S" if size is None else size,
                "64" if resolutions is None else resolutions,
                4 if batch is None else batch,
            )
        sides = "256,1024" if resolutions is None else resolutions
        size = "XL" if size is None else size
        named = DEFAULT_MODELS[where] if models is None else models
        groups = _cases(named, size, patch, sides, batch, setting)
    except ValueError as error:
        refuse(str(error))
    console = Console(stderr=True, soft_wrap=True)
    rows = []
    try:
        # Opened before anything is measured that could not be kept.
        with RowsWriter(out) as writer:
            if said := writer.said_of_torn_line:
                console.print(visible(said), style="yellow", markup=False)
            with Waiting(console, total=sum(map(len, groups))) as waiting:
                for row in measure(
                    groups,
                    repeats=repeats,
                    time_limit=time_limit,
                    environment=describe_environment(),
                    on_step=waiting.show,
                ):
                    writer.write(row)
                    rows.append(row)
                    waiting.advance()
    except ResultError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        console.print(visible(f"interrupted; {len(rows)} rows are in {out}"), markup=False)
        raise typer.Exit(130) from None
    Console().print(_table(rows))
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)


def _table(rows: list[SamplingRow]) -> Table:
    case = rows[0].case
    table = Table(title=f"{case.sampler}, {case.steps} steps, guidance {case.cfg:g}; latents, without decoding")
    for heading in ("model", "pixels", "at once", "samples/s", "peak GiB", "of the peer's speed"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for entry in compare(rows):
        row = entry.row
        memory = "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.2f}"
        speed = row.status if row.speed is None else str(row.speed)
        ratio = "peer" if entry.peer is None else "" if entry.ratio is None else str(entry.ratio)
        table.add_row(
            Text(visible(row.case.label)), str(row.case.resolution), str(row.case.batch), speed, memory, ratio
        )
        if row.message:
            table.add_row(Text(f"  {visible(row.message[:120])}"))
    return table
