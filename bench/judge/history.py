"""The best of the last commits, as a base: drift that no single step shows. No torch here.

A gate that compares each change with the one before lets through what stays below its threshold: five times 1% are 5%.
Stored rows say which of the last commits was the fastest. It is measured anew, in turns with the change, for stored
times are of other cards and days.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.cases.case import Case
from bench.store.rows import Row


@dataclass(frozen=True, kw_only=True)
class Best:
    """The commit to compare with.

    Attributes:
        commit: Its name, as the repository has it.
        known: How many of the commits had rows of every case.
        asked: How many there were.
    """

    commit: str
    known: int
    asked: int


def commit_of(row: Row) -> str:
    """The commit of a row; empty where there were changes beside it, or nobody recorded one."""
    name, dirty = row.environment.get("commit"), row.environment.get("dirty")
    return name if isinstance(name, str) and not dirty and not name.endswith("-dirty") else ""


def best_of(commits: Sequence[str], rows: Iterable[Row], cases: Sequence[Case]) -> Best | None:
    """The commit whose rows of these cases have the least geometric mean of their medians.

    Args:
        commits: Full names.
        rows: Of any commits; theirs may be shortened. Of several launches of a case the fastest median counts.
        cases: All must have a time.

    Returns:
        None where no commit has rows of every case.
    """
    times: dict[str, dict[Case, float]] = {}
    for row in rows:
        name, ms = commit_of(row), row.median_ms
        if row.status != "ok" or ms is None or len(name) < 7:
            continue
        for commit in commits:
            if commit.startswith(name):
                own = times.setdefault(commit, {})
                own[row.case] = min(ms, own.get(row.case, math.inf))
    whole = {commit: own for commit, own in times.items() if own.keys() >= set(cases)}
    if not whole:
        return None
    mean = {commit: sum(math.log(own[case]) for case in cases) for commit, own in whole.items()}
    # Of equal ones the newest, which comes first.
    return Best(
        commit=min(commits, key=lambda commit: mean.get(commit, math.inf)), known=len(whole), asked=len(commits)
    )
