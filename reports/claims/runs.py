"""Training runs, a JSON line each, as ``examples/ablation.py`` writes them: arms of an experiment, seeds of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from bench.judge.statistics import CONFIDENCE, Interval
from bench.store.decoding import parse_json
from bench.store.lines import ResultError, read_lines
from reports.ablation import FEWEST, estimate
from reports.ablation_runs import TIMED, repeating
from reports.cells import number
from reports.claims.finding import Finding, Verdict, together
from reports.claims.rows import Files
from reports.claims.spec import Order
from reports.series import span


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as far as orders of arms go.

    Attributes:
        experiment, arm: Which.
        seed: Of weights and data.
        frechet, loss: What came of it; less is better. None where it was not measured.
        steps, batch, seconds: How long it was trained; None where the line doesn't say.
        samples, sampling_steps: What its distance was taken of.
        about: Card and commit, as the line says them.
    """

    experiment: str
    arm: str
    seed: int
    frechet: float | None
    loss: float | None
    steps: int | None = None
    batch: int | None = None
    seconds: float | None = None
    samples: int | None = None
    sampling_steps: int | None = None
    about: str = ""

    @property
    def length(self) -> tuple[int | None, ...]:
        """What runs that are compared have in common; of equal seconds steps differ."""
        return None if self.experiment == TIMED else self.steps, self.batch, self.samples, self.sampling_steps

    def to_json(self) -> str:
        """Nothing is written from here."""
        raise NotImplementedError("runs are written by examples/ablation.py")

    @classmethod
    def from_json(cls, line: str) -> Run:
        """Read a line.

        Raises:
            ResultError: It is no run.
        """
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ResultError(f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ResultError("not a training run: no object")
        for name, kind in (("experiment", str), ("arm", str), ("seed", int)):
            if type(record.get(name)) is not kind:
                raise ResultError(f"not a training run: {name} must be {kind.__name__}; got {record.get(name)!r:.40}")
        return cls(
            experiment=record["experiment"],
            arm=record["arm"],
            seed=record["seed"],
            frechet=_positive(record, "frechet"),
            loss=_positive(record, "loss"),
            seconds=_positive(record, "seconds"),
            **{name: _count(record, name) for name in ("steps", "batch", "samples", "sampling_steps")},
            about=_about(record),
        )


def _about(record: dict[str, Any]) -> str:
    card, commit = record.get("gpu_name") or "a CPU", str(record.get("commit") or "an unknown commit")[:7]
    return f"{card}, {commit}{' with uncommitted changes' if record.get('dirty') else ''}"


def _count(record: dict[str, Any], name: str) -> int | None:
    value = record.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ResultError(f"not a training run: {name} must be a count; got {value!r:.40}")
    return value


def _positive(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ResultError(f"not a training run: {name} must be above 0; got {value!r:.40}")
    return float(value)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of files, of an arm and seed the last one.

    Raises:
        ResultError: A file cannot be read, or holds a line that is no run.
    """
    runs = [run for path in paths for run in read_lines(path, Run.from_json).rows]
    return list({(run.experiment, run.arm, run.seed): run for run in runs}.values())


def _compare(better: dict[int, Run], worse: dict[int, Run], measure: str) -> Interval | None:
    """The worse arm's over the better's, seed beside seed; None with fewer than two seeds in common.

    The middle is the geometric mean, and the interval Student's t of the logarithms, as `reports.ablation` takes them.
    """
    seeds = sorted(better.keys() & worse.keys())
    if len(seeds) < FEWEST:
        return None
    found = estimate([math.log(getattr(worse[seed], measure) / getattr(better[seed], measure)) for seed in seeds])
    return Interval(ratio=math.exp(found.middle), low=math.exp(found.low), high=math.exp(found.high))


def _command(claim: Order, runs: Sequence[Run]) -> str:
    """What trains these arms again, as long as these runs were; the script's own length where there are none."""
    if not runs:
        return repeating([claim.experiment], claim.arms)
    last, timed = runs[-1], claim.experiment == TIMED
    return repeating(
        [claim.experiment],
        claim.arms,
        seeds=max(run.seed for run in runs) + 1,
        steps=None if timed else last.steps,
        budget=int(last.seconds) if timed and last.seconds else None,
        batch=last.batch,
        samples=last.samples,
        sampling_steps=last.sampling_steps,
    )


def judge_order(claim: Order, files: Files) -> Finding:
    """Whether each arm is better than the next one, over seeds.

    A pair holds where the whole interval of their ratio says so. It does not where the whole interval says the
    opposite, and is not told apart where the interval leaves it open.

    Raises:
        ResultError: The file cannot be read.
    """
    paths = files.paths(claim.rows)
    runs = [
        run
        for run in read_runs(paths)
        if run.experiment == claim.experiment and run.arm in claim.arms and getattr(run, claim.measure) is not None
    ]
    arms: dict[str, dict[int, Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, {})[run.seed] = run
    command = claim.command or _command(claim, runs)
    missing = [arm for arm in claim.arms if arm not in arms]
    unlike = len({run.length for run in runs}) > 1
    pairs = [] if missing or unlike else [_compare(arms[a], arms[b], claim.measure) for a, b in pairwise(claim.arms)]
    if missing or unlike or None in pairs:
        what = "a pair needs two seeds in common"
        if unlike:
            what = "runs that differ in steps, batch or samples can't be compared"
        if missing:
            what = f"no runs of {', '.join(missing)}"
        return Finding(
            id=claim.id,
            source=claim.source,
            said=claim.said,
            verdict="not measured",
            command=command,
            notes=(f"{what} in {claim.rows}",),
        )
    found = [pair for pair in pairs if pair is not None]
    verdicts: list[Verdict] = [
        "holds" if pair.low > 1 else "does not hold" if pair.high < 1 else "not told apart" for pair in found
    ]
    between = [
        f"{b} over {a}: {number(pair.ratio)} [{number(pair.low)}, {number(pair.high)}], {verdict}"
        for (a, b), pair, verdict in zip(pairwise(claim.arms), found, verdicts, strict=True)
    ]
    name = {"frechet": "Fréchet distance", "loss": "loss"}[claim.measure]
    found_of = {arm: mean(getattr(run, claim.measure) for run in own.values()) for arm, own in arms.items()}
    means = f"{name}: {', '.join(f'{arm} {number(found_of[arm])}' for arm in claim.arms)}"
    return Finding(
        id=claim.id,
        source=claim.source,
        said=claim.said,
        verdict=together(verdicts),
        # An interval is of a ratio; of several pairs each stands in the notes.
        measured=f"{number(found[0].ratio)} times ({means})" if len(found) == 1 else means,
        interval=(found[0].low, found[0].high) if len(found) == 1 else None,
        command=command,
        notes=(
            *between,
            f"{span(len(own) for own in arms.values())} seeds each, ratios in {CONFIDENCE:.0%}",
            f"{claim.rows}: runs on {'; '.join(dict.fromkeys(run.about for run in runs))}",
        ),
    )
