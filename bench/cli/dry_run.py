"""``python -m bench run --dry-run``: what would be measured, and how long that took before. torch is imported late."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.cases.case import Case
from bench.cases.jobs import Limits
from bench.messages import say
from bench.run.runner import Sweep, finished_launches
from bench.store.identity import code_hash
from bench.store.rows import Row, read_results
from dig.environment import ROOT, describe_environment
from dig.progress import duration
from dig.registry import VAE_FACTOR, ModelSpec


def tell_sweep(cases: list[Case], *, out: Path, resume: bool, launches: int, limits: Limits) -> None:
    """Print a line a case, then what all need together.

    Args:
        cases: What to measure.
        out: Results file; times of the same cases in it are the estimates.
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
    sizes: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
    for case in dict.fromkeys(launch.case for launch in remaining):
        key = (case.model, case.options)
        if key not in sizes:
            sizes[key] = _parameters(case)
        row = before.get(case)
        earlier = f"; before: {row.median_ms:.3g} ms in {duration(sum(row.seconds.values()))}" if row else ""
        say(f"{case.describe()}: {sizes[key]:,} parameters{earlier}")
    known = [sum(before[launch.case].seconds.values()) for launch in remaining if launch.case in before]
    took = f"; {len(known)} of them took {duration(sum(known))} before" if known else "; no earlier times to go by"
    most = duration(len(remaining) * (limits.prepare + limits.measure))
    skipped = len(cases) * launches - len(remaining)
    done = f", {skipped} done before" if skipped else ""
    say(f"{len(remaining)} cases to measure into {out}{done}{took}; at most {most} by their limits")
    say("dry run: nothing was measured")


def _parameters(case: Case) -> int:
    """Trainable parameters; of a model that isn't built."""
    from dig.training.needs import count_parameters

    side = case.resolution // VAE_FACTOR
    spec = ModelSpec(
        name=case.model,
        options=dict(case.options),
        source=case.source,
        input_size=(side, side),
        in_channels=4,
        num_classes=1000,
    )
    return count_parameters(spec)
