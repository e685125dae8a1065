"""``python -m bench run --dry-run``: what would be measured, what it needs at least, and what it took before.

torch is imported late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.cases.case import Case
from bench.cases.jobs import Limits
from bench.messages import say
from bench.run.runner import Launch, Sweep, finished_launches
from bench.store.identity import code_hash
from bench.store.rows import Row, read_results
from dig.environment import ROOT, describe_environment
from dig.memory import in_bytes
from dig.progress import duration
from dig.spec import VAE_FACTOR, ModelSpec

BYTES = {"fp32": 4, "bf16": 2}


def tell_sweep(cases: list[Case], *, out: Path, resume: bool, launches: int, limits: Limits) -> None:
    """Print a line a case, then what all need together.

    Args:
        cases: What to measure.
        out: Results file; what the same cases took in it, or the same ones of another size, is said.
        resume: Whether what it has already is skipped.
        launches: A case.
        limits: How long a case may take.

    Raises:
        ValueError: A model can't be built.
        ResultError: The results file is none.
    """
    rows = read_results(out).rows if out.exists() else ()
    sweep = Sweep(
        cases=tuple(cases),
        launches=launches,
        done=finished_launches(rows) if resume else frozenset(),
        limits=limits,
        code=code_hash(ROOT),
        environment=describe_environment(),
    )
    before: Mapping[Case, Row] = {row.case: row for row in rows if row.median_ms is not None}
    remaining = sweep.remaining
    known: dict[Case, Row] = {}
    near: dict[Case, Row] = {}
    for case in dict.fromkeys(launch.case for launch in remaining):
        earlier = ""
        if case in before:
            known[case] = before[case]
            earlier = f"; before: {_took(before[case])}"
        elif row := _nearest(case, before.values()):
            near[case] = row
            earlier = f"; {row.case.resolution}px batch {row.case.batch} before: {_took(row)}"
        say(f"{case.describe()}: {size_of(case)}{earlier}")
    times = [
        f"{_count(found, remaining)} {words} {duration(_seconds(found, remaining))}{more}"
        for found, words, more in (
            (known, "of them took", " before"),
            (near, "of them an estimated", ", as the nearest size did"),
        )
        if found
    ]
    took = "; ".join(times) or "no earlier times to go by"
    most = duration(len(remaining) * (limits.prepare + limits.measure))
    skipped = len(cases) * launches - len(remaining)
    done = f", {skipped} done before" if skipped else ""
    say(f"{len(remaining)} cases to measure into {out}{done}; {took}; at most {most} by their limits")
    say("dry run: nothing was measured")


def _count(found: Mapping[Case, Row], remaining: Sequence[Launch]) -> int:
    return sum(launch.case in found for launch in remaining)


def _seconds(found: Mapping[Case, Row], remaining: Sequence[Launch]) -> float:
    return sum(sum(found[launch.case].seconds.values()) for launch in remaining if launch.case in found)


def _took(row: Row) -> str:
    """``2 ms a step, 42 s in all, 0.94 GiB at most``."""
    peak = row.memory.peak if row.memory is not None else None
    memory = f", {in_bytes(peak)} at most" if peak else ""
    return f"{row.median_ms:.3g} ms a step, {duration(sum(row.seconds.values()))} in all{memory}"


def _nearest(case: Case, rows: Iterable[Row]) -> Row | None:
    """Of the rows that differ from a case in resolution and batch alone, that of the nearest number of pixels."""

    def apart(row: Row) -> float:
        return abs(math.log(row.case.resolution**2 * row.case.batch / (case.resolution**2 * case.batch)))

    alike = [row for row in rows if replace(row.case, resolution=case.resolution, batch=case.batch) == case]
    return min(alike, key=apart, default=None)


def size_of(case: Case) -> str:
    """Parameters of a model that isn't built, and the least memory of its step."""
    from dig.training.needs import Footprint, count_parameters, step_needs

    side = case.resolution // VAE_FACTOR
    spec = ModelSpec(
        name=case.model,
        options=dict(case.options),
        source=case.source,
        input_size=(side, side),
        in_channels=4,
        num_classes=1000,
    )
    parameters = count_parameters(spec)
    needs = step_needs(
        Footprint.of(spec),
        trained=parameters if case.mode == "train" else 0,
        at_once=case.batch,
        number=BYTES[case.dtype],
        weight=BYTES[case.weights],
    )
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in needs.items())
    return f"{parameters:,} parameters, an estimated {in_bytes(sum(needs.values()))} at least ({parts})"
