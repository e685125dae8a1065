"""What commands share that measure a tree and its base in turns: the plan, the sides, how it ends. No torch here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn

import typer
from rich.console import Console

from bench.cli.compare import percent
from bench.cli.waiting import Waiting
from bench.judge.compare import INCONCLUSIVE, Finding, Thresholds, exit_status, marks_of, to_markdown
from bench.judge.regression import C, Comparison, Plan, compare_checkouts
from bench.judge.statistics import LEAST_LAUNCHES
from bench.messages import check_count, check_positive, refuse, visible
from bench.run.checkouts import Checkout, CheckoutError, check_out_base, copy_tree, describe_tree
from bench.run.lifeline import scratch_folder
from bench.run.side import Side, SideError, SideOf
from bench.store.files import require_file_or_nothing
from bench.store.lines import ResultError
from dig.environment import ROOT

MOST_LAUNCHES = 10_000

# Options that these commands have in common.
Base = Annotated[str, typer.Option(help="What to compare with: a revision, or a folder with a checkout.")]
Launches = Annotated[int, typer.Option(help="Process launches a side of what is measured, at least 5.")]
LeastEffect = Annotated[str, typer.Option(help="The least difference of times that counts, in percent.")]
Noise = Annotated[
    str | None, typer.Option(help="The runner's noise floor in percent, from bench regression --against-itself.")
]
Seconds = Annotated[float, typer.Option(help="After so long, what is ambiguous is not measured again.")]
TimeLimit = Annotated[float, typer.Option(help="Seconds a launch may take.")]
Out = Annotated[Path, typer.Option(help="Folder for rows and summary; each run makes one of its own there.")]
Summary = Annotated[Path | None, typer.Option(help="Append the Markdown summary to this file too.")]


def check_base(base: str) -> None:
    """Refuse an empty base, which as a folder would be this one: the tree would be compared with itself."""
    if not base.strip():
        refuse("--base needs a revision, or a folder with a checkout")


def make_plan(
    cases: Sequence[C],
    *,
    launches: int,
    least_effect: str,
    noise: str | None,
    seconds: float,
    time_limit: float,
    seed: int,
) -> Plan[C]:
    """The plan that the options of a command name; anything wrong ends the command."""
    check_count(launches, "--launches", least=LEAST_LAUNCHES, most=MOST_LAUNCHES)
    check_count(seed, "--seed", least=0)
    check_positive(seconds, "--seconds")
    check_positive(time_limit, "--time-limit")
    return Plan(
        cases=tuple(cases),
        launches=launches,
        seconds=seconds,
        time_limit=time_limit,
        seed=seed,
        thresholds=Thresholds(
            time=percent(least_effect, "--least-effect"), noise=None if noise is None else percent(noise, "--noise")
        ),
    )


class RegressionGate(Generic[C]):
    """The comparisons that one call of a command makes.

    Args:
        plan: How they are measured.
        scratch: Takes the copies.
        folder: Takes the rows.
        console: Shows what is being measured.
        side: Opens the process of a side (`bench.judge.regression.compare_checkouts`).
    """

    def __init__(
        self,
        plan: Plan[C],
        scratch: Path,
        folder: Path,
        console: Console,
        side: Callable[..., SideOf[Any, Any]] = Side,
    ) -> None:
        self.plan, self.scratch, self.folder, self.console, self._side = plan, scratch, folder, console, side
        self.change = copy_tree(ROOT, scratch / "change", describe_tree(ROOT))

    def compare(self, base: Checkout, change: Checkout, name: str, plan: Plan[C] | None = None) -> Comparison:
        """Measure two checkouts in turns; their rows go to a folder of this name."""
        with Waiting(self.console) as waiting:
            return compare_checkouts(
                base,
                change,
                plan or self.plan,
                folder=self.folder / name,
                on_start=waiting.show,
                side=self._side,
            )

    def summary(self, found: Comparison, title: str) -> str:
        """What came of it, in Markdown."""
        machine = found.change[0].environment if found.change else {}
        where = machine.get("gpu_name") or machine.get("cpu") or "unknown machine"
        notes = [f"{where}, torch {machine.get('torch')}, driver {machine.get('driver')}"]
        notes += marks_of(found.base, found.change)
        return to_markdown(found.findings, found.thresholds, title=title, notes=notes)

    def run(self, revision: str, also: Callable[[Comparison], Sequence[Finding]] = lambda found: ()) -> tuple[int, str]:
        """Compare with the base: the exit status, and the summary.

        Args:
            revision: The base's.
            also: Findings beside those of the base, from what was measured.
        """
        base = check_out_base(ROOT, revision, self.scratch / "base")
        found = self.compare(base, self.change, "run")
        found = replace(found, findings=(*found.findings, *also(found)))
        return exit_status(found.findings), self.summary(found, f"{self.change.name} against {base.name}")


def conclude(judge: Callable[[Path, Path, Console], tuple[int, str]], *, out: Path, summary: Path | None) -> NoReturn:
    """Do what a command compares, print and keep its summary, and end with its status.

    Args:
        judge: Given a scratch folder, a folder for rows and a console; gives the status and the summary.
        out: Takes a folder for this run.
        summary: The summary is appended to this file too.
    """
    console = Console(stderr=True, soft_wrap=True)
    folder = out / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    try:
        with tempfile.TemporaryDirectory(dir=scratch_folder()) as scratch:
            status, text = judge(Path(scratch), folder, console)
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
