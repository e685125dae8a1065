"""The tables "At its best": every family in the fastest, and in the leanest, of the ways that were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from bench.messages import cell
from bench.store.rows import Row
from reports.best import ATTENTION, OURS, Contest, Lead, Role, Ways, contests, failure, memory, time
from reports.cells import GIB, MISSING, markdown, milliseconds, number
from reports.series import (
    MODE_NAMES,
    MODES,
    PRECISION_NAMES,
    Launches,
    Sweep,
    is_assumed,
    shared_doubts,
)

MOST_LETTERS = 240
"""Of a failure's reason."""
_LEGEND = (
    "Every family in the fastest of the ways that were measured. Cells: ms · way. Lead: the time of the fastest "
    "attention, named where it is not Flash-DiT's, over DiG's on this project's kernels; bold where DiG is slower. "
    "Brackets of a lead: from the peer's fastest launch over DiG's slowest to the opposite. Attention ways: how many "
    "have a time, of those tried.\n\n"
    "Memory likewise, in GiB, by the way that takes least, which need not be the fastest."
)


def best_tables(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The paragraphs for one machine; none where nothing was compiled.

    Args:
        sweep: All rows.
        rows: Those of the machine.
    """
    found = contests(rows)
    if not found:
        return []
    ways = Ways(sweep, found)
    shared = shared_doubts(sweep.rows)

    def milliseconds_of(row: Row) -> str:
        return milliseconds(row, shared)

    def gib_of(row: Row) -> str:
        return number((memory(row) or 0) / GIB)

    parts = [f"### At its best\n\n{_LEGEND}"]
    for mode in MODES:
        own = [contest for contest in found if contest.task.mode == mode]
        if not own:
            continue
        heading = f"#### At its best: {MODE_NAMES[mode]}"
        parts.append(f"{heading}, time\n\n{_table(own, ways, time, milliseconds_of)}")
        if failures := _failures(own, ways):
            parts.append(failures)
        parts.append(f"{heading}, memory\n\n{_table(own, ways, memory, gib_of)}")
    return parts


def _table(
    found: Sequence[Contest], ways: Ways, figure: Callable[[Row], float | None], shown: Callable[[Row], str]
) -> str:
    """A line per task, a column per role; the lead after Flash-DiT's, or last."""
    roles = [role for role in ways.roles if any(role in contest.rows for contest in found)]
    lines = []
    for contest in found:
        task = contest.task
        line = {
            "model": cell(f"{task.size}/{task.patch}"),
            "resolution": task.resolution,
            "batch": task.batch,
            "precision": PRECISION_NAMES[task.precision],
        }
        line |= {ways.column(role): _cell(contest, role, ways, figure, shown) for role in roles}
        tried = [row for role in ATTENTION for row in contest.rows.get(role, ())]
        timed = sum(figure(row) is not None for row in tried)
        line |= {"lead": _lead(contest.lead(figure), ways), "attention ways": f"{timed} of {len(tried)}"}
        lines.append(line)
    table = pd.DataFrame(lines)
    columns = list(table.columns)
    columns.remove("lead")
    after = max(columns.index(ways.column(role)) for role in roles if role in (OURS, ATTENTION[0]) or role == roles[0])
    columns.insert(after + 1, "lead")
    return markdown(table[columns].set_index(["model", "resolution", "batch", "precision"]))


def _cell(
    contest: Contest, role: Role, ways: Ways, figure: Callable[[Row], float | None], shown: Callable[[Row], str]
) -> str:
    rows = contest.rows.get(role, ())
    best = contest.best(figure, role)
    if best is not None:
        text = f"{shown(best)} · {cell(ways.way(best))}"
    else:
        text = ", ".join(dict.fromkeys(failure(row) for row in rows if row.status != "ok")) or MISSING
    return text + (r"\*" if any(is_assumed(row.case) for row in rows) else "")


def _lead(lead: Lead | None, ways: Ways) -> str:
    if lead is None:
        return MISSING
    text = f"{number(lead.value)}\N{MULTIPLICATION SIGN}"
    if lead.value < 1:
        text = f"**{text}**"
    if lead.low < lead.high and any(isinstance(row, Launches) for row in (lead.ours, lead.peer)):
        text += f" [{number(lead.low)}, {number(lead.high)}]"
    peer = Role.of(lead.peer.case)
    return text if peer == ATTENTION[0] or peer is None else f"{text} {cell(ways.column(peer))}"


def _failures(found: Sequence[Contest], ways: Ways) -> str:
    """Every way that has no time, by reason, and the tasks it failed at."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for contest in found:
        for role in sorted(contest.rows, key=lambda role: role.rank):
            for row in contest.rows[role]:
                if row.status != "ok":
                    reasons.setdefault((ways.full(row), reason(row)), []).append(contest.task.describe())
    lines = [f"- {cell(name)}: {cell(why)} ({cell('; '.join(at))})" for (name, why), at in reasons.items()]
    return "Without a time:\n\n" + "\n".join(lines) if lines else ""


def reason(row: Row) -> str:
    """Why a row has no times: ``OOM``, ``timeout``, or in the words of its message; ``parity: ...`` where it failed."""
    word = failure(row)
    if row.status in ("oom", "timeout") or not row.message:
        return word
    message = row.message if len(row.message) <= MOST_LETTERS else f"{row.message[:MOST_LETTERS]}…"
    return message if word == "parity" else f"{word}: {message}"
