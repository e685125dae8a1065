"""``python -m bench ops compare``: did an operation get faster? By the regression gate's verdicts. No torch here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from bench.cases.case import Dtype, Mode
from bench.cases.choices import choose_device, default_dtype
from bench.cli.gate import (
    Base,
    Launches,
    LeastEffect,
    Noise,
    Out,
    RegressionGate,
    Seconds,
    Summary,
    TimeLimit,
    check_base,
    conclude,
    make_plan,
)
from bench.cli.options import some_of
from bench.messages import check_count, one_of, refuse
from bench.ops.rows import BOTH, FORWARD_ONLY, IMPLEMENTATIONS, OpCase
from bench.ops.side import OpSide


def compare(
    op: Annotated[
        str | None,
        typer.Option(
            help=f"Operations, separated by commas: {', '.join(IMPLEMENTATIONS)}. Default: all that run there."
        ),
    ] = None,
    base: Base = "main",
    model: Annotated[str, typer.Option(help="The DiG whose sizes they have.")] = "DiG-S/2",
    resolution: Annotated[int, typer.Option(help="Image side in pixels.")] = 1792,
    batch: Annotated[int, typer.Option(help="Images.")] = 1,
    mode: Annotated[str, typer.Option(help="train (forward and backward pass), forward, or both.")] = "train",
    implementation: Annotated[
        str | None, typer.Option(help="triton or reference. Default: triton on a GPU, reference on a CPU.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32. Default: bf16 on a GPU, fp32 on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    launches: Launches = 6,
    least_effect: LeastEffect = "2%",
    noise: Noise = None,
    seconds: Seconds = 480.0,
    time_limit: TimeLimit = 120.0,
    out: Out = Path("out/ops"),
    summary: Summary = None,
    seed: Annotated[int, typer.Option(help="Of the order of launches.")] = 0,
) -> None:
    """Measure operations of the working tree and its base in turns, and say whether any got slower or faster.

    The base's dig is measured by the working tree's harness, each launch in a process of its own, judged as bench
    regression judges steps. Exit status 0: nothing got slower; 1: something did; 3: nothing measured, or inconclusive;
    2: bad input.
    """
    check_base(base)
    check_count(resolution, "--resolution")
    check_count(batch, "--batch")
    where = choose_device(device)
    way = ("triton" if where == "cuda" else "reference") if implementation is None else implementation
    one_of(way, "--implementation", BOTH)
    number = default_dtype(where) if dtype is None else dtype
    one_of(number, "--dtype", get_args(Dtype))
    modes = some_of(mode, "--mode", get_args(Mode))
    named = some_of(op, "--op", IMPLEMENTATIONS) if op is not None else None
    pairs = list(itertools.product(named or IMPLEMENTATIONS, modes))
    if named is None:
        # All means all that there are.
        pairs = [(o, m) for o, m in pairs if way in IMPLEMENTATIONS[o] and not (m == "train" and o in FORWARD_ONLY)]
    try:
        cases = [
            OpCase(
                op=name,
                implementation=way,
                model=model,
                resolution=resolution,
                batch=batch,
                mode=cast(Any, one),
                dtype=cast(Any, number),
                device=cast(Any, where),
            )
            for name, one in pairs
        ]
    except ValueError as error:
        refuse(str(error))
    plan = make_plan(
        cases,
        launches=launches,
        least_effect=least_effect,
        noise=noise,
        seconds=seconds,
        time_limit=time_limit,
        seed=seed,
    )

    def judge(scratch: Path, folder: Path, console: Console) -> tuple[int, str]:
        return RegressionGate(plan, scratch, folder, console, side=OpSide).run(base)

    conclude(judge, out=out, summary=summary)
