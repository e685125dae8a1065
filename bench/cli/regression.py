"""``python -m bench regression``: the regression gate's command, and its self-test. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.cases.case import Case
from bench.cases.choices import GRAMMAR, GRAMMAR_WORDS, parse_case
from bench.cases.suites import without_repeats
from bench.cli.gate import (
    MOST_LAUNCHES,
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
from bench.cli.waiting import Waiting
from bench.judge.compare import INCONCLUSIVE, NO_REGRESSION, REGRESSION, exit_status
from bench.judge.regression import BUDGETS, SUITES, Comparison, compare_sides
from bench.judge.statistics import noise_floor
from bench.judge.stored import against_best
from bench.messages import cell, check_count, one_of, refuse
from bench.run.checkouts import Checkout, copy_tree, slow_down
from bench.run.side import Side
from bench.store.rows import ResultError, Row, read_results
from dig.environment import ROOT, gpu_present
from dig.registry import parse_name

SLOWDOWN = 0.05
BOOST_MHZ = 1980.0
"""An H100's SM clock, where NVML hides it."""


def regression(
    base: Base = "main",
    suite: Annotated[
        str | None, typer.Option(help="gpu (8 cases), quick (2), cpu (2), or auto, which is the default.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE",
            # With spaces, so that a terminal of 80 columns can break it.
            help=f"Instead of a suite: {GRAMMAR.replace('[', ' [')} without the spaces, as DiG-S/2:triton@1792:train; "
            f"{GRAMMAR_WORDS}. Again for another case.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where each --case runs: auto, cuda or cpu.")] = "auto",
    launches: Launches = 6,
    least_effect: LeastEffect = "2%",
    noise: Noise = None,
    seconds: Seconds = 480.0,
    time_limit: TimeLimit = 120.0,
    out: Out = Path("out/regression"),
    summary: Summary = None,
    best_of: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Compare with the best of the last N stored results of each case too: many steps below the least "
            "effect add up, and are seen. 0: with the base alone.",
        ),
    ] = 0,
    stored: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Results files, or folders of this command's runs, for --best-of. Default: --out."
        ),
    ] = None,
    against_itself: Annotated[
        int, typer.Option(help="Compare the tree with a copy of itself so many times, and print the noise floor.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the order of launches; runs of --against-itself count on from it.")] = 0,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Compare the tree with a copy whose forward pass was made 5% of the step slower: must be caught.",
        ),
    ] = False,
) -> None:
    """Measure the working tree and its base in turns, and say whether anything got slower or larger.

    Exit status 0: no regression; 1: a regression; 3: nothing measured, or inconclusive; 2: bad input. A case that runs
    on neither side is listed, and counts for nothing. With
    --against-itself and --self-test the status says whether the regression gate works: 0 if no run of unchanged code
    raised an alarm and the slowed copy did.
    """
    check_base(base)
    check_count(against_itself, "--against-itself", least=0, most=MOST_LAUNCHES)
    check_count(best_of, "--best-of", least=0, most=MOST_LAUNCHES)
    if stored and not best_of:
        refuse("--stored is what --best-of N chooses from; give both")
    if best_of and (against_itself or self_test):
        refuse("--best-of is of a comparison with the base, not of the regression gate's self-test")
    if case and suite is not None:
        refuse("--suite and --case each say what to measure; give one of them")
    cases = (
        without_repeats(parse_case(text, device=device) for text in case)
        if case
        else _cases_of("auto" if suite is None else suite)
    )
    plan = make_plan(
        cases,
        launches=launches,
        least_effect=least_effect,
        noise=noise,
        seconds=seconds,
        time_limit=time_limit,
        seed=seed,
    )

    try:
        earlier = _stored(stored or [out], required=bool(stored)) if best_of else []
    except ResultError as error:
        refuse(str(error))

    def judge(scratch: Path, folder: Path, console: Console) -> tuple[int, str]:
        gate = _OfSteps(plan, scratch, folder, console)
        if against_itself or self_test:
            return gate.test_itself(runs=against_itself, slowed=self_test)
        return gate.run(base, also=lambda found: against_best(found.change, earlier, best_of, found.thresholds))

    conclude(judge, out=out, summary=summary)


def _stored(paths: Sequence[Path], *, required: bool) -> list[Row]:
    """The rows of files, and of folders' runs; a folder's self-tests are none.

    Raises:
        ResultError: A file cannot be read, or nothing is there and something is required.
    """
    files = []
    for path in paths:
        files += sorted(path.glob("*/run/*.jsonl")) if path.is_dir() else [path] if required else []
    if required and not files:
        raise ResultError(f"no runs in {', '.join(map(str, paths))}; name results files, or a folder of earlier runs")
    return [row for file in files for row in read_results(file).rows]


def _cases_of(suite: str) -> list[Case]:
    """The cases of a suite by name; refused where they cannot be measured here."""
    one_of(suite, "--suite", ("auto", *SUITES))
    name = ("gpu" if gpu_present() else "cpu") if suite == "auto" else suite
    if name != "cpu" and not gpu_present():
        refuse("no NVIDIA GPU was found; use --suite cpu, or run on a machine with one")
    cases = SUITES[name]()
    for case in cases:
        if message := parse_name(case.model)[0].missing_packages(dict(case.options)):
            refuse(message)
    return cases


_SAID = {NO_REGRESSION: "no alarm", REGRESSION: "an alarm", INCONCLUSIVE: "inconclusive"}


class _OfSteps(RegressionGate[Case]):
    """The regression gate for whole steps, with its self-test."""

    def test_itself(self, *, runs: int, slowed: bool) -> tuple[int, str]:
        """Unchanged code must raise no alarm, and a slowed copy must; the noise floor comes with the former."""
        twin = copy_tree(ROOT, self.scratch / "twin", self.change.name)
        texts, statuses, ratios = [], [], []
        for index, found in enumerate(self._itself(twin, runs)):
            statuses.append(exit_status(found.findings))
            # At once, for whoever ends this before it is through; the rows are on the disk.
            self.console.print(f"run {index + 1} of {runs}: {_SAID[statuses[-1]]}", highlight=False)
            ratios += [f.interval.ratio for f in found.findings if f.metric == "time" and f.interval is not None]
            texts.append(self.summary(found, f"unchanged code, run {index + 1} of {runs}"))
        caught = True
        if slowed:
            caught, text = self._slowed(twin)
            texts.append(text)
        lines = ["## The regression gate's self-test", ""]
        if runs:
            alarms = statuses.count(REGRESSION)
            undecided = statuses.count(INCONCLUSIVE)
            lines.append(f"- unchanged code: {alarms} alarms and {undecided} inconclusive in {runs} runs")
        if ratios:
            floor = noise_floor(ratios)
            lines.append(f"- noise floor, 95% of |ratio - 1| over {len(ratios)} comparisons: {floor:.3%}")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "noise.json").write_text(json.dumps({"noise_floor": floor, "ratios": ratios}) + "\n")
        if slowed:
            lines.append(f"- slowed by {SLOWDOWN:.0%} of the step: {'caught' if caught else '**missed**'}")
        works = caught and REGRESSION not in statuses
        return (NO_REGRESSION if works else REGRESSION), "\n".join([*lines, "", *texts])

    def _itself(self, twin: Checkout, runs: int) -> Iterator[Comparison]:
        """Comparisons of unchanged code, one after the other, each in an order of its own.

        The two sides' processes stay, so that their models pass the parity check once and not in every run; each
        launch is a process of its own all the same.
        """
        if not runs:
            return
        limit = self.plan.time_limit
        with Side(twin, time_limit=limit) as base, Side(self.change, time_limit=limit) as change:
            for index in range(runs):
                with Waiting(self.console) as waiting:
                    found = compare_sides(
                        (base, change),
                        replace(self.plan, seed=self.plan.seed + index),
                        folder=self.folder / f"itself-{index}",
                        on_start=waiting.show,
                        warm=index > 0,
                    )
                yield found

    def _slowed(self, twin: Checkout) -> tuple[bool, str]:
        """Slow a copy down by a share of each case's own step, a case at a time, and say whether all were noticed."""
        caught, texts = True, []
        for index, case in enumerate(self.plan.cases):
            row = self._time(twin, case, f"how long a step takes, case {index + 1} of {len(self.plan.cases)}")
            if row.median_ms is None:
                texts.append(f"- not measured: {cell(case.describe())}: {row.status}: {cell(row.message)}\n")
                caught = False
                continue
            clock = row.clocks.sm_mhz_median if row.clocks is not None else None
            victim = slow_down(
                copy_tree(ROOT, self.scratch / f"slowed-{index}", self.change.name),
                milliseconds=SLOWDOWN * row.median_ms,
                megahertz=clock or BOOST_MHZ,
            )
            plan = replace(self.plan, cases=(case,))
            found = self.compare(twin, victim, f"slowed-{index}", plan)
            caught = caught and any(f.metric == "time" and f.verdict == "slower" for f in found.findings)
            texts.append(self.summary(found, f"slowed by {SLOWDOWN:.0%}: {case.describe()}"))
        return caught, "\n".join(texts)

    def _time(self, checkout: Checkout, case: Case, what: str) -> Row:
        """One launch of a case."""
        with Side(checkout, time_limit=self.plan.time_limit) as side, Waiting(self.console) as waiting:
            return side.measure(
                case,
                budget=BUDGETS[case.device],
                launch=0,
                tell=lambda doing: waiting.show(f"{what}, {case.describe()}: {doing}"),
            )
