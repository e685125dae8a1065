"""``python -m bench kernels``. torch is imported only once the input is known to be good."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cases.case import Case
from bench.cases.choices import one_case
from bench.cli.fitting import fitting
from bench.cli.options import CompileScope, Weights
from bench.messages import check_count, refuse


def kernels(
    model: Annotated[str, typer.Option(help="Model name, options after colons: DiG-S/2:triton.")],
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels. Default: 1024 on a GPU, 128 on a CPU.")
    ] = None,
    mode: Annotated[str, typer.Option(help="train or forward.")] = "train",
    execution: Annotated[str | None, typer.Option(help="eager, graph or compile; default as for run.")] = None,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 1,
    compile_scope: CompileScope = "block",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default as for run.")] = None,
    weights: Weights = "fp32",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    top: Annotated[int, typer.Option(help="Rows to print.")] = 25,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="One step's kernels as they ran, with the gaps between them; GPU.")
    ] = False,
) -> None:
    """Print where a step's device time goes, kernel by kernel (operator by operator on a CPU)."""
    case = one_case(
        model,
        resolution=resolution,
        mode=mode,
        execution=execution,
        batch=batch,
        dtype=dtype,
        device=device,
        scope=compile_scope,
        weights=weights,
    )
    check_count(top, "--top")
    if in_order and case.device != "cuda":
        refuse("--in-order shows what ran on a GPU's streams; leave it out on a CPU, or use --device cuda")
    with fitting(case):
        _print_in_order(case, top) if in_order else _print_by_time(case, top)


def _table(title: str, *headings: str) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(title=Text(title))
    for heading in headings:
        first = heading == headings[0]
        table.add_column(heading, justify=cast(Any, "left" if first else "right"), no_wrap=not first)
    return table


def _print_by_time(case: Case, top: int) -> None:
    from bench.inspect.kernels import kernels_of_case

    found = kernels_of_case(case)
    total = sum(kernel.us for kernel in found)
    table = _table(f"{case.describe()}: {total / 1000:.3f} ms", "kernel", "calls", "us a step", "share")
    for kernel in found[:top]:
        table.add_row(Text(kernel.name), f"{kernel.calls:g}", f"{kernel.us:,.1f}", f"{kernel.us / total:.1%}")
    rest = found[top:]
    if rest:
        us = sum(kernel.us for kernel in rest)
        table.add_row(f"{len(rest)} others", f"{sum(k.calls for k in rest):g}", f"{us:,.1f}", f"{us / total:.1%}")
    Console().print(table)


def _print_in_order(case: Case, top: int) -> None:
    from bench.inspect.timeline import timeline_of_case

    try:
        spans = timeline_of_case(case)
    except ValueError as error:
        refuse(str(error))
    length = max((span.start_us + span.us for span in spans), default=0.0)
    title = f"{case.describe()}: {len(spans)} kernels in {length / 1000:.3f} ms"
    table = _table(title, "kernel", "stream", "begins, us", "takes, us", "gap before, us")
    for span in spans[:top]:
        numbers = (f"{x:,.1f}" for x in (span.start_us, span.us, span.gap_us))
        table.add_row(Text(span.name), str(span.stream), *numbers)
    if len(spans) > top:
        table.add_row(f"{len(spans) - top} later")
    Console().print(table)
