"""``python -m bench coverage``: what the regression gate's intervals are worth, simulated. No torch here."""

from __future__ import annotations

from typing import Annotated

import typer

from bench.cli.options import numbers
from bench.judge.statistics import LEAST_LAUNCHES
from bench.messages import check_count

MOST_TRIALS, MOST_LAUNCHES = 10**6, 200


def coverage(
    trials: Annotated[int, typer.Option(help="Comparisons a line.")] = 1000,
    launches: Annotated[
        str, typer.Option(help=f"Of each side, separated by commas; {LEAST_LAUNCHES} or more.")
    ] = "5,6,12,18",
) -> None:
    """Simulate how often the regression gate's intervals hold the truth, and its verdicts on equal code, by noise.

    The change is as fast as its base in every trial. Takes some minutes; docs/method.md quotes it.
    """
    check_count(trials, "--trials", most=MOST_TRIALS)
    chosen = numbers(launches, "--launches", least=LEAST_LAUNCHES)
    check_count(max(chosen), "--launches", most=MOST_LAUNCHES)
    from bench.judge.coverage import report

    report(chosen, trials=trials)
