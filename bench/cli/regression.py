"""``python -m bench regression``: the gate's command, and its test of itself. No torch here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from bench.cases.case import Case
from bench.cases.choices import GRAMMAR, parse_case
from bench.cases.suites import without_repeats
from bench.cli.compare import percent
from bench.cli.options import one_of
from bench.judge.compare import INCONCLUSIVE, NO_REGRESSION, REGRESSION, Thresholds, exit_status, marks_of, to_markdown
from bench.judge.regression import BUDGETS, SUITES, Comparison, Plan, compare_checkouts, compare_sides
from bench.judge.statistics import LEAST_LAUNCHES, noise_floor
from bench.messages import cell, check_count, check_positive, refuse, visible
from bench.run.checkouts import Checkout, CheckoutError, check_out_base, copy_tree, describe_tree, slow_down
from bench.run.lifeline import scratch_folder
from bench.run.side import Side, SideError
from bench.store.files import require_file_or_nothing
from bench.store.rows import ResultError
from dig.environment import ROOT, gpu_present
from dig.registry import parse_name

MOST_LAUNCHES = 10_000
SLOWDOWN = 0.05
BOOST_MHZ = 1980.0
"""An H100's SM clock, where NVML hides it."""


def regression(
    base: Annotated[str, typer.Option(help="What to compare with: a revision, or a folder with a checkout.")] = "main",
    suite: Annotated[
        str | None, typer.Option(help="gpu (8 cases), quick (2), cpu (2), or auto, which is the default.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CASE",
            help=f"Instead of a suite: {GRAMMAR}, as DiG-S/2:triton@1792:train. Again for another case.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where each --case runs: auto, cuda or cpu.")] = "auto",
    launches: Annotated[int, typer.Option(help="Process launches a side and case, at least 5.")] = 6,
    least_effect: Annotated[str, typer.Option(help="The least difference of times that counts, in percent.")] = "2%",
    noise: Annotated[
        str | None, typer.Option(help="The runner's noise floor in percent, from --against-itself.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="After so long, ambiguous cases are not measured again.")] = 480.0,
    time_limit: Annotated[float, typer.Option(help="Seconds a launch may take.")] = 120.0,
    out: Annotated[Path, typer.Option(help="Folder for rows and summary; each run makes one of its own there.")] = Path(
        "out/regression"
    ),
    summary: Annotated[Path | None, typer.Option(help="Append the Markdown summary to this file too.")] = None,
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
    --against-itself and --self-test the status says whether the gate works: 0 if no run of unchanged code raised an
    alarm and the slowed copy did.
    """
    console = Console(stderr=True, soft_wrap=True)
    check_count(launches, "--launches", least=LEAST_LAUNCHES, most=MOST_LAUNCHES)
    check_count(against_itself, "--against-itself", least=0, most=MOST_LAUNCHES)
    check_count(seed, "--seed", least=0)
    check_positive(seconds, "--seconds")
    check_positive(time_limit, "--time-limit")
    if case and suite is not None:
        refuse("--suite and --case each say what to measure; give one of them")
    cases = without_repeats(parse_case(text, device=device) for text in case) if case else _cases_of(suite or "auto")
    try:
        plan = Plan(
            cases=tuple(cases),
            launches=launches,
            seconds=seconds,
            time_limit=time_limit,
            seed=seed,
            thresholds=Thresholds(
                time=percent(least_effect, "--least-effect"), noise=None if noise is None else percent(noise, "--noise")
            ),
        )
        folder = out / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        with tempfile.TemporaryDirectory(dir=scratch_folder()) as scratch:
            gate = _Gate(plan, Path(scratch), folder, console)
            if against_itself or self_test:
                status, text = gate.test_itself(runs=against_itself, slowed=self_test)
            else:
                status, text = gate.run(base)
            typer.echo(text, nl=False)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.md").write_text(text, encoding="utf-8")
            if summary is not None:
                require_file_or_nothing(summary)
                summary.parent.mkdir(parents=True, exist_ok=True)
                with summary.open("a", encoding="utf-8") as file:
                    file.write(text)
    except (ValueError, CheckoutError, ResultError) as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"cannot write {error.filename or out}: {error.strerror}; choose another --out")
    except SideError as error:
        console.print(visible(f"nothing can be said: {error}"), markup=False, highlight=False)
        raise typer.Exit(INCONCLUSIVE) from None
    except KeyboardInterrupt:
        console.print(visible(f"stopped; the rows measured so far are in {folder}"), markup=False)
        raise typer.Exit(130) from None
    raise typer.Exit(status)


def _cases_of(suite: str) -> list[Case]:
    """The cases of a suite by name; refused where they cannot be measured here."""
    name = ("gpu" if gpu_present() else "cpu") if suite == "auto" else suite
    one_of(name, "suite", SUITES)
    if name != "cpu" and not gpu_present():
        refuse("no NVIDIA GPU was found; use --suite cpu, or run on a machine with one")
    cases = SUITES[name]()
    for case in cases:
        if message := parse_name(case.model)[0].missing_packages(dict(case.options)):
            refuse(message)
    return cases


_SAID = {NO_REGRESSION: "no alarm", REGRESSION: "an alarm", INCONCLUSIVE: "inconclusive"}


def _shown_by(status: Status) -> Callable[[str], None]:
    """Shows what is measured, as it is written: brackets are no markup."""
    return lambda text: status.update(Text(visible(text)))


class _Gate:
    """The comparisons that one call of the command makes."""

    def __init__(self, plan: Plan, scratch: Path, folder: Path, console: Console) -> None:
        self.plan, self.scratch, self.folder, self.console = plan, scratch, folder, console
        self.change = copy_tree(ROOT, scratch / "change", describe_tree(ROOT))

    def _compare(self, base: Checkout, change: Checkout, name: str, plan: Plan | None = None) -> Comparison:
        with self.console.status("starting") as status:
            return compare_checkouts(
                base,
                change,
                plan or self.plan,
                folder=self.folder / name,
                on_start=_shown_by(status),
            )

    def _summary(self, found: Comparison, title: str) -> str:
        machine = found.change[0].environment if found.change else {}
        where = machine.get("gpu_name") or machine.get("cpu") or "unknown machine"
        notes = [f"{where}, torch {machine.get('torch')}, driver {machine.get('driver')}"]
        notes += marks_of(found.base, found.change)
        return to_markdown(found.findings, self.plan.thresholds, title=title, notes=notes)

    def run(self, revision: str) -> tuple[int, str]:
        """Compare with the base."""
        base = check_out_base(ROOT, revision, self.scratch / "base")
        found = self._compare(base, self.change, "run")
        return exit_status(found.findings), self._summary(found, f"{self.change.name} against {base.name}")

    def test_itself(self, *, runs: int, slowed: bool) -> tuple[int, str]:
        """Unchanged code must raise no alarm, and a slowed copy must; the noise floor comes with the former."""
        twin = copy_tree(ROOT, self.scratch / "twin", self.change.name)
        texts, statuses, ratios = [], [], []
        for index, found in enumerate(self._itself(twin, runs)):
            statuses.append(exit_status(found.findings))
            # At once, for whoever ends this before it is through; the rows are on the disk.
            self.console.print(f"run {index + 1} of {runs}: {_SAID[statuses[-1]]}", highlight=False)
            ratios += [f.interval.ratio for f in found.findings if f.metric == "time" and f.interval is not None]
            texts.append(self._summary(found, f"unchanged code, run {index + 1} of {runs}"))
        caught = True
        if slowed:
            caught, text = self._slowed(twin)
            texts.append(text)
        lines = ["## The gate's test of itself", ""]
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
        with (
            Side(twin, time_limit=limit) as base,
            Side(self.change, time_limit=limit) as change,
            self.console.status("starting") as status,
        ):
            for index in range(runs):
                yield compare_sides(
                    (base, change),
                    replace(self.plan, seed=self.plan.seed + index),
                    folder=self.folder / f"itself-{index}",
                    on_start=_shown_by(status),
                    warm=index > 0,
                )

    def _slowed(self, twin: Checkout) -> tuple[bool, str]:
        """Slow a copy down by a share of each case's own step, a case at a time, and say whether all were noticed."""
        caught, texts = True, []
        for index, case in enumerate(self.plan.cases):
            with Side(twin, time_limit=self.plan.time_limit) as side:
                row = side.measure(case, budget=BUDGETS[case.device], launch=0)
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
            found = self._compare(twin, victim, f"slowed-{index}", plan)
            caught = caught and any(f.metric == "time" and f.verdict == "slower" for f in found.findings)
            texts.append(self._summary(found, f"slowed by {SLOWDOWN:.0%}: {case.describe()}"))
        return caught, "\n".join(texts)
