"""``python -m bench capacity``. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.cases.case import Case
from bench.cases.choices import one_case
from bench.cli.options import CompileScope, Weights
from bench.inspect.capacity import (
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
from bench.messages import check_count, check_positive, refuse, visible
from bench.store.decoding import parse_json
from bench.store.files import append_line, read_file, require_appendable
from dig.environment import describe_environment

GIB = 2**30


def capacity(
    model: Annotated[str, typer.Option(help="Model name, options after colons: DiG-XL/2, DiG-XL/2:triton.")],
    mode: Annotated[str, typer.Option(help="train or forward.")] = "train",
    resolution: Annotated[int, typer.Option(help="Image side in pixels at which the largest batch is sought.")] = 256,
    batch: Annotated[int, typer.Option(help="Images a step at which the largest resolution is sought.")] = 1,
    execution: Annotated[str | None, typer.Option(help="eager, graph or compile; default as for run.")] = None,
    compile_scope: CompileScope = "block",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default as for run.")] = None,
    weights: Weights = "fp32",
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
    if limit is not None:
        check_positive(limit, "--limit")
    for option, value in (("--batch", batch), ("--most-batch", most_batch), ("--most-resolution", most_resolution)):
        check_count(value, option)
    check_positive(time_limit, "--time-limit")
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
    if case.device == "cpu" and limit is None:
        refuse("on a CPU say how much memory there is to fill: --limit GIB; filling all of the host's would stop it")
    if out is not None:
        _require_probes(out)

    allowed = None if limit is None else int(limit * GIB)
    where = {"limit": allowed, "environment": describe_environment()}

    def probe(tried: Case) -> Probe:
        found = probe_case(tried, limit=allowed, time_limit=time_limit)
        peak = f"fits, peak {found.peak / GIB:.2f} GiB" if found.peak else ("fits" if found.fits else "does not fit")
        console.print(f"  {tried.resolution}px batch {tried.batch}: {peak}", markup=False, highlight=False)
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
    console.print(case.describe(), markup=False, highlight=False)
    answers = []
    try:
        for words, search in searches:
            found = search()
            mark = " or more (the largest that was tried)" if found.bounded else ""
            answers.append(
                f"{words}: {found.largest}{mark}" if found.largest else f"{words}: not even the smallest fits"
            )
    except CapacityError as error:
        console.print(visible(f"stopped: {error}"), markup=False, highlight=False)
        raise typer.Exit(3) from None
    for answer in answers:
        console.print(answer, highlight=False)


def _require_probes(path: Path) -> None:
    """Refuse, before anything is tried, a file that cannot be appended to or holds anything but probes."""
    try:
        require_appendable(path)
        lines = read_file(path).splitlines() if path.exists() else []
    except OSError as error:
        refuse(f"cannot write {path}: {error.strerror}; choose another --out")
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line.decode())
        except ValueError:
            if number == len(lines):
                continue  # What a kill left of a line; the next one begins on its own.
            record = None
        if not isinstance(record, dict) or not {"case", "fits", "peak"} <= record.keys() or "schema" in record:
            refuse(f"{path}, line {number}: no probe of bench capacity; choose another --out")


def _append(path: Path, probe: dict[str, Any]) -> None:
    try:
        append_line(path, json.dumps(probe))
    except OSError as error:
        refuse(f"cannot write {path}: {error.strerror}; choose another --out")
