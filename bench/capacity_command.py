"""``python -m bench capacity``. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.capacity import (
    MOST_BATCH,
    MOST_RESOLUTION,
    Capacity,
    CapacityError,
    Probe,
    largest_batch,
    largest_resolution,
    probe_case,
    room_on_gpu,
)
from bench.choices import one_case
from bench.messages import refuse
from bench.results import Case
from dig.environment import describe_environment

GIB = 2**30


def capacity(
    model: Annotated[str, typer.Option(help="Model name, options after colons: DiG-XL/2, DiG-XL/2:triton.")],
    mode: Annotated[str, typer.Option(help="train or forward.")] = "train",
    resolution: Annotated[int, typer.Option(help="Image side in pixels at which the largest batch is sought.")] = 256,
    batch: Annotated[int, typer.Option(help="Images a step at which the largest resolution is sought.")] = 1,
    execution: Annotated[str | None, typer.Option(help="eager, graph or compile; default as for run.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default as for run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    limit: Annotated[float | None, typer.Option(help="GiB a process may take; default: all there are.")] = None,
    most_batch: Annotated[int, typer.Option(help="Largest batch to try.")] = MOST_BATCH,
    most_resolution: Annotated[int, typer.Option(help="Largest side to try, in pixels.")] = MOST_RESOLUTION,
    time_limit: Annotated[float, typer.Option(help="Seconds a probe may take.")] = 300.0,
    out: Annotated[
        Path | None, typer.Option(help="Append every probe to this file, with the machine, one JSON object a line.")
    ] = None,
) -> None:
    """Find by bisection the largest batch at a resolution, and the largest resolution at a batch, that fit in memory.

    Exit status 0: both were found; 3: a probe failed otherwise than by memory; 2: bad input.
    """
    console = Console(soft_wrap=True)
    if limit is not None and not limit > 0:
        refuse(f"--limit must be positive; got {limit:g}")
    if min(most_batch, most_resolution, batch) < 1 or not time_limit > 0:
        refuse("--batch, --most-batch, --most-resolution and --time-limit must be positive")
    case = one_case(
        model, resolution=resolution, mode=mode, execution=execution, batch=batch, dtype=dtype, device=device
    )
    if case.device == "cpu" and limit is None:
        refuse("on a CPU say how much memory there is to fill: --limit GIB; filling all of the host's would stop it")

    allowed = None if limit is None else int(limit * GIB)
    where = {"limit": allowed, "environment": describe_environment()}

    def probe(tried: Case) -> Probe:
        found = probe_case(tried, limit=allowed, time_limit=time_limit)
        peak = f"fits, peak {found.peak / GIB:.2f} GiB" if found.peak else ("fits" if found.fits else "does not fit")
        console.print(f"  {tried.resolution}px batch {tried.batch}: {peak}", highlight=False)
        if out is not None:
            described = {**asdict(tried), "options": dict(tried.options)}
            _append(out, {"case": described, "fits": found.fits, "peak": found.peak, **where})
        return found

    room = room_on_gpu() if allowed is None else allowed
    searches: list[tuple[str, Callable[[], Capacity]]] = [
        (f"largest batch at {resolution}px", lambda: largest_batch(case, probe, most=most_batch, room=room)),
        (
            f"largest resolution at batch {batch}",
            lambda: largest_resolution(case, probe, most=most_resolution, room=room),
        ),
    ]
    console.print(case.describe(), highlight=False)
    answers = []
    try:
        for words, search in searches:
            found = search()
            mark = " or more (the largest that was tried)" if found.bounded else ""
            answers.append(
                f"{words}: {found.largest}{mark}" if found.largest else f"{words}: not even the smallest fits"
            )
    except CapacityError as error:
        console.print(f"stopped: {error}", markup=False, highlight=False)
        raise typer.Exit(3) from None
    for answer in answers:
        console.print(answer, highlight=False)


def _append(path: Path, probe: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(probe) + "\n")
    except OSError as error:
        refuse(f"cannot write {path}: {error.strerror}; choose another --out")
