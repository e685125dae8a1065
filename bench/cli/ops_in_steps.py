"""``python -m bench ops prepare``, ``chain``, ``variants``, ``shapes``: kernels judged by the step they are in.

torch comes late.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.cases.case import Case
from bench.cases.case import Mode as Modes
from bench.cases.choices import one_case
from bench.cli.options import Weights, check_appendable, check_patch, numbers, some_of, words
from bench.messages import check_count, check_positive, refuse, say
from dig.environment import gpu_present

Model = Annotated[str, typer.Option(help="Model name, options after colons.")]
Resolution = Annotated[int, typer.Option(help="Image side in pixels.")]
Mode = Annotated[str, typer.Option(help="train or forward.")]
Batch = Annotated[int, typer.Option(help="Images a step.")]
Rounds = Annotated[int, typer.Option(help="Turns a median is taken of, 2 or more.")]
Replays = Annotated[int, typer.Option(help="Steps a turn.")]
Json = Annotated[Path | None, typer.Option("--json", help="Append one JSON line for each measurement to this file.")]

CHAINED = "DiG-S/2:triton:variant=release,DiG-XL/2:triton:variant=release"
SHAPED = "DiG-S/2:triton:variant=release,DiG-S/2:triton:variant=paper"
MOST_UNEVEN = 1.3
"""Times as long as its neighbours let expect, which no step may take."""


def _check(rounds: int, replays: int, json: Path | None) -> None:
    check_count(rounds, "--rounds", least=2)  # One alone has no interval.
    check_count(replays, "--replays")
    check_appendable(json, "--json")


def _graph(model: str, *, resolution: int, mode: str, batch: int, weights: str) -> Case:
    """The case of a model's step as a CUDA graph in bf16."""
    if not gpu_present():
        refuse("no NVIDIA GPU was found; what this times runs on one")
    return one_case(
        model,
        resolution=resolution,
        mode=mode,
        execution="graph",
        batch=batch,
        dtype="bf16",
        device="cuda",
        weights=weights,
    )


def prepare(
    model: Model = "DiG-XL/2:triton:variant=release",
    resolution: Resolution = 1024,
    mode: Mode = "forward",
    batch: Batch = 1,
    weights: Weights = "fp32",
    programs: Annotated[
        str, typer.Option(help="Programs that prepare weights on the side stream; 0: all at once.")
    ] = "0,16,32,64",
    fused: Annotated[str, typer.Option(help="Rows of a share in a GEMM; may be empty.")] = "32",
    rounds: Rounds = 12,
    replays: Replays = 8,
    json: Json = None,
) -> None:
    """Time a step with its weights prepared in different ways beside the GEMMs, all ways in one run.

    Each choice is a CUDA graph of the whole step; the graphs take turns, so that the card's clock is the same for all.
    """
    beside = numbers(programs, "--programs", least=0)
    shares = numbers(fused, "--fused", empty=True)
    _check(rounds, replays, json)
    case = _graph(model, resolution=resolution, mode=mode, batch=batch, weights=weights)
    from bench.ops.prepare import Choice, compare_choices

    choices = [Choice(fused=rows, programs=0) for rows in shares]
    choices += [Choice(fused=0, programs=number) for number in beside]
    compare_choices(case, choices, rounds=rounds, replays=replays, json_file=json)


def chain(
    models: Annotated[
        str | None,
        typer.Option(
            help="Model names, options after colons; separated by commas. Default: DiG-S/2 and DiG-XL/2, both with "
            ":triton:variant=release."
        ),
    ] = None,
    resolutions: Annotated[str, typer.Option(help="Image sides in pixels, separated by commas.")] = "256,512,1024,1792",
    modes: Annotated[str, typer.Option(help="train, forward, or both.")] = "train,forward",
    batch: Batch = 1,
    weights: Weights = "fp32",
    rounds: Rounds = 12,
    replays: Replays = 8,
    json: Json = None,
) -> None:
    """Time steps whose kernels start while the one before them ends, and the same in order, in turns.

    See dig.ops.early_launch. Each is a CUDA graph of the whole step.
    """
    sides = numbers(resolutions, "--resolutions")
    chosen = some_of(modes, "--modes", get_args(Modes))
    _check(rounds, replays, json)
    cases = [
        _graph(model, resolution=side, mode=mode, batch=batch, weights=weights)
        for model, side, mode in itertools.product(words(CHAINED if models is None else models), sides, chosen)
    ]
    if not cases:
        refuse("nothing to time: --models must name something")
    import torch

    from bench.ops.chain import compare_orders

    typer.echo(torch.cuda.get_device_name())
    for case in cases:
        compare_orders(case, rounds=rounds, replays=replays, json_file=json)


def variants(
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="MODULE.NAME=VALUE",
            help="One variant: what is set in it, several constants with semicolons between them. Again for another.",
        ),
    ],
    model: Model = "DiG-XL/2:triton:variant=release",
    resolution: Resolution = 1024,
    mode: Mode = "forward",
    batch: Batch = 1,
    weights: Weights = "fp32",
    rounds: Rounds = 12,
    replays: Replays = 8,
    json: Json = None,
) -> None:
    """Time a step with constants of the code changed, beside the step as it is, all in turns.

    A value is a Python literal; a constant is named in the module that reads it. What a variant computes is compared
    with the step as it is, bit for bit.
    """
    _check(rounds, replays, json)
    from bench.ops.variants import compare_variants, parse_variants

    try:
        ways = parse_variants(settings)
    except ValueError as error:
        refuse(str(error))
    case = _graph(model, resolution=resolution, mode=mode, batch=batch, weights=weights)
    compare_variants(case, ways, rounds=rounds, replays=replays, json_file=json)


def shapes(
    models: Annotated[
        str | None,
        typer.Option(
            help="Model names, options after colons; separated by commas. Default: DiG-S/2 of both variants, on triton."
        ),
    ] = None,
    resolution: Annotated[
        int, typer.Option(help="Image side in pixels; grids and patches have as many tokens, or about so.")
    ] = 256,
    modes: Annotated[str, typer.Option(help="train, forward, or both.")] = "train,forward",
    batches: Annotated[str, typer.Option(help="Images a step, three numbers or more.")] = "1,2,3,8,32,33",
    grids: Annotated[
        str, typer.Option(help="Tokens down and across, beside three squares: 15x17; may be empty.")
    ] = "15x17,8x32,32x8,1x256",
    patches: Annotated[str, typer.Option(help="Patch sides, two or more.")] = "2,4,8",
    weights: Weights = "fp32",
    limit: Annotated[float, typer.Option(help="Times as long as expected that no step may take.")] = MOST_UNEVEN,
    rounds: Rounds = 12,
    replays: Replays = 8,
    json: Json = None,
) -> None:
    """Time a step at awkward shapes beside what their neighbours let expect: batches, grids, patches, in turns.

    A batch is expected from the batches around it, a grid from others of as many tokens or about so, a patch side from
    the others at equal tokens. Each step is a CUDA graph.

    Exit status 1: a step takes longer than --limit times as expected.
    """
    chosen = some_of(modes, "--modes", get_args(Modes))
    images, sides = numbers(batches, "--batches"), numbers(patches, "--patches")
    for side in sides:
        check_patch(side, "--patches")
    if len(set(images)) < 3 or len(set(sides)) < 2:
        refuse("--batches takes three numbers or more, --patches two: each is expected from the others")
    wanted = [_grid(word) for word in words(grids)]
    check_positive(limit, "--limit")
    _check(rounds, replays, json)
    cases = [
        _graph(model, resolution=resolution, mode=mode, batch=1, weights=weights if mode == "forward" else "fp32")
        for model, mode in itertools.product(words(SHAPED if models is None else models), chosen)
    ]
    if not cases:
        refuse("nothing to time: --models must name something")
    import torch

    from bench.ops.shapes import compare_shapes, shapes_of

    typer.echo(torch.cuda.get_device_name())
    found = []
    for case in cases:
        several = shapes_of(case, batches=images, grids=wanted, patches=sides)
        found += compare_shapes(several, rounds=rounds, replays=replays, json_file=json)
    worst = max(found, key=lambda finding: finding.ratio)
    uneven = sum(finding.ratio > limit for finding in found)
    say(
        f"{len(found)} steps, {uneven} above {limit:g} times as expected; most: {worst.ratio:.2f}, "
        f"{worst.shape.case.model} {worst.shape.case.mode}, {worst.shape.name(worst.comparison)}"
    )
    if uneven:
        raise typer.Exit(1)


def _grid(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", word)
    if found is None or not (int(found[1]) and int(found[2])):
        refuse(f"--grids takes tokens down and across, such as 15x17, separated by commas; got {word[:80]!r}")
    return int(found[1]), int(found[2])
