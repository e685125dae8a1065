"""Charts of single steps: the paper's Figs. 1 and 2, DiG's lead, and the FLOP/s that every model reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from bench.store.rows import Row
from bench.store.selection import machine
from reports.best import Contest, Lead, Ways, contests, execution, time
from reports.best_figure import label_of, lead_styles, peer_words
from reports.figures import PAPER_RESOLUTIONS, PATCH
from reports.page.chart import Chart, Datum, Missing, Panel
from reports.page.commands import line, run_command
from reports.page.evidence import Evidence
from reports.page.said import GIB, intervals, marked, provenance, row_words
from reports.series import (
    ASSUMED_NOTE,
    MODE_NAMES,
    STATUS_NAMES,
    Selection,
    Series,
    Sweep,
    bar_ms,
    is_assumed,
    launches_of,
    select,
    size_rank,
)  # fmt: skip

PAPER = line("run", "--suite", "paper", "--resume")
ON_CPU = line("run", "--suite", "cpu", "--resume")
BEST = line("run", "--suite", "best", "--resume")
SIZE = "S"
"""Of Fig. 1."""


def speed(row: Row) -> tuple[float, float, float] | None:
    """Images a second, with the ends of its interval."""
    if row.status != "ok":
        return None
    fast, slow = bar_ms(row)
    images = 1000 * row.case.batch
    return row.fps or 0, images / slow, images / fast


def peak(row: Row) -> tuple[float, float, float] | None:
    """Peak memory in GiB, of which a launch has one."""
    found = row.memory.peak if row.status == "ok" and row.memory is not None else None
    return None if not found else (found / GIB, found / GIB, found / GIB)


Figure = Callable[[Row], tuple[float, float, float] | None]


def datum(row: Row, series: str, x: float | str, figure: Figure) -> Datum:
    """A row's number, or why it has none."""
    found = figure(row)
    return Datum(
        series=series,
        x=x,
        y=None if found is None else found[0],
        low=None if found is None else found[1],
        high=None if found is None else found[2],
        word="" if row.status == "ok" else STATUS_NAMES[row.status],
        text=row_words(row),
        command=run_command([row.case], launches=max(launches_of(row), 1)),
        assumed=is_assumed(row.case),
    )


def fullest(evidence: Evidence, choose: Callable[[Sweep], Sequence[Row]]) -> tuple[str, Sequence[Row]]:
    """The file with the most of what is wanted, and what it has: a figure's numbers are of one file, mostly one run.

    Of files with as much, the one with the newest row.
    """
    found = {name: choose(sweep) for name, sweep in evidence.sweeps.items()}

    def much_and_new(name: str) -> tuple[int, str]:
        measured = [row for row in found[name] if row.status == "ok"]
        return len(measured), max((row.started_at for row in measured), default="")

    best = max(found, key=much_and_new, default="")
    return best, found.get(best, ())


def sweep_command(evidence: Evidence) -> str:
    """What measures both of the paper's figures where these rows are from: in small, where all are a CPU's."""
    return ON_CPU if {row.case.device for _, row in evidence.rows} == {"cpu"} else PAPER


def on_one_machine(rows: Sequence[Row]) -> list[Row]:
    """Those of the machine that has the most of them."""
    where = [machine(row) for row in rows]
    most = max(dict.fromkeys(where), key=where.count, default="")
    return [row for row, name in zip(rows, where, strict=True) if name == most]


def figure_1(evidence: Evidence) -> list[Chart | Missing]:
    """Fig. 1 of the paper: speed (a) and memory (b) of a step against resolution."""
    titles = {
        "fig1a": f"Speed against resolution, size {SIZE}/{PATCH}",
        "fig1b": f"Memory against resolution, size {SIZE}/{PATCH}",
    }

    def choose(sweep: Sweep) -> tuple[Row, ...]:
        candidates = (row for row in sweep.rows if row.case.size == SIZE and row.case.patch == PATCH)
        selection = select(candidates, modes=("train", "forward"))
        return () if selection is None else selection.rows

    name, rows = fullest(evidence, choose)
    if not any(row.status == "ok" for row in rows):
        why = f"no row of size {SIZE} and patch {PATCH} has a time"
        return [
            Missing(name=key, section="speed", title=title, why=why, command=sweep_command(evidence))
            for key, title in titles.items()
        ]
    words = MODE_NAMES[rows[0].case.mode]
    memory = "GPU memory" if rows[0].case.device == "cuda" else "process memory"
    labels = {
        "fig1a": (f"{words.capitalize()}, images/s", speed, "Higher is faster. A line ends where the model fails."),
        "fig1b": (f"{words.capitalize()}, peak {memory} in GiB", peak, "Lower is leaner. A line ends where it fails."),
    }
    found: list[Chart | Missing] = []
    for key, (y_label, figure, reading) in labels.items():
        if not any(figure(row) for row in rows):
            why = f"no row of size {SIZE} and patch {PATCH} says what memory it took"
            command = sweep_command(evidence)
            found.append(Missing(name=key, section="speed", title=titles[key], why=why, command=command))
            continue
        chart = _lines(evidence, rows, name, x=lambda row: float(row.case.resolution), figure=figure)
        found.append(
            replace(
                chart,
                name=key,
                title=titles[key],
                x_label="Image side in pixels",
                y_label=y_label,
                reading=reading,
            )
        )
    return found


def figure_2(evidence: Evidence) -> list[Chart | Missing]:
    """Fig. 2 of the paper: speed of a forward pass against size, at two resolutions."""
    found: list[Chart | Missing] = []
    for letter, side in zip("ab", _sides(evidence), strict=True):
        title = f"Speed against model size, {side} \N{MULTIPLICATION SIGN} {side} pixels"

        def choose(sweep: Sweep, side: int = side) -> tuple[Row, ...]:
            candidates = [row for row in sweep.rows if row.case.resolution == side and row.case.patch == PATCH]
            selection: Selection | None = select(candidates, modes=("forward", "train"))
            sizes = set() if selection is None else {row.case.size for row in selection.rows if row.status == "ok"}
            return selection.rows if selection is not None and len(sizes) > 1 else ()

        name, rows = fullest(evidence, choose)
        if not rows:
            why = f"no file has two sizes with times at {side} pixels"
            found.append(
                Missing(name=f"fig2{letter}", section="speed", title=title, why=why, command=sweep_command(evidence))
            )
            continue
        order = sorted({row.case.size for row in rows}, key=size_rank)
        chart = _lines(evidence, rows, name, x=lambda row: row.case.size, figure=speed)
        data = sorted(chart.panels[0].data, key=lambda each: order.index(str(each.x)))
        found.append(
            replace(
                chart,
                name=f"fig2{letter}",
                title=title,
                panels=(Panel(data=tuple(data)),),
                x_label="Model size",
                y_label=f"{MODE_NAMES[rows[0].case.mode].capitalize()}, images/s",
                reading="Higher is faster. Sizes follow each other; the axis has no scale.",
            )
        )
    return found


def _sides(evidence: Evidence) -> tuple[int, ...]:
    """The paper's two resolutions; where no file has two sizes at either, the two largest at which one has."""
    sizes: dict[tuple[str, int], set[str]] = {}
    for file, row in evidence.rows:
        if row.status == "ok" and row.case.patch == PATCH:
            sizes.setdefault((file, row.case.resolution), set()).add(row.case.size)
    found = sorted({side for (_, side), own in sizes.items() if len(own) > 1})
    if not found or set(found) & set(PAPER_RESOLUTIONS):
        return PAPER_RESOLUTIONS
    return (*found[-2:], *PAPER_RESOLUTIONS)[:2]


def _lines(
    evidence: Evidence, rows: Iterable[Row], file: str, *, x: Callable[[Row], float | str], figure: Figure
) -> Chart:
    """Lines of rows of one setting, by series."""
    given = sorted(rows, key=lambda row: row.case.resolution)
    timed = [row for row in given if row.status == "ok"]
    names = {Series.of(row): evidence.labels[Series.of(row)] for row in given}
    drawn = [series for series in evidence.labels if series in {Series.of(row) for row in timed}]
    cases = [row.case for row in given]
    lost = sorted({names[Series.of(row)] for row in given if Series.of(row) not in drawn})
    return Chart(
        name="",
        section="speed",
        title="",
        kind="lines",
        y_label="",
        panels=(
            Panel(
                data=tuple(
                    datum(row, names[series], x(row), figure)
                    for series in drawn
                    for row in sorted(
                        (row for row in given if Series.of(row) == series), key=lambda row: row.case.resolution
                    )
                )
            ),
        ),
        styles={names[series]: evidence.looks.of(series.family, series.options) for series in drawn},
        log_y=True,
        caption=(
            provenance(timed, [file]),
            f"{cases[0].way}, {cases[0].precision}, batch {cases[0].batch}. "
            + (intervals(timed) if figure is speed else "No interval: a launch has one peak."),
            *(marked(timed) if figure is speed else [ASSUMED_NOTE] if any(map(is_assumed, cases)) else []),
            *([f"Without any number: {', '.join(lost)}."] if lost else []),
        ),
        command=run_command(cases),
    )


def lead(evidence: Evidence) -> list[Chart | Missing]:
    """How many times as long the fastest attention takes as DiG on this project's kernels, each at its best."""
    title = "DiG's lead over the fastest attention, both at their best"

    def choose(sweep: Sweep) -> list[Row]:
        leads = [found for contest in contests(sweep.rows) if (found := contest.lead(time)) is not None]
        return [row for each in leads for row in (each.ours, each.peer)]

    name, rows = fullest(evidence, choose)
    if not rows:
        why = "no file has both DiG on this project's kernels and a compiled attention, timed at one point"
        return [Missing(name="lead", section="lead", title=title, why=why, command=BEST)]
    sweep = evidence.sweeps[name]
    # Of one machine: the one with the most points.
    machines = [machine(row) for row in rows]
    where = max(dict.fromkeys(machines), key=machines.count)
    found = [contest for contest in contests(sweep.rows) if contest.task.machine == where]
    ways = Ways(sweep, found)
    common = Counter(execution(each.peer.case) for contest in found if (each := contest.lead(time))).most_common(1)[0][
        0
    ]
    data: list[Datum] = []
    of_series: dict[str, list[tuple[Contest, Lead]]] = {}
    behind, total, missing = 0, 0, []
    for contest in found:
        each = contest.lead(time)
        if each is None:
            missing.append(contest.task.describe())
            continue
        label = label_of(contest)
        of_series.setdefault(label, []).append((contest, each))
        total, behind = total + 1, behind + (each.value < 1)
        data.append(
            Datum(
                series=label,
                x=float(contest.task.resolution),
                y=each.value,
                low=each.low,
                high=each.high,
                label=peer_words(each, ways, common),
                text=f"{ways.full(each.peer)}: {row_words(each.peer)} — {ways.full(each.ours)}: {row_words(each.ours)}",
                command=run_command([each.ours.case, each.peer.case])
                if each.ours.case.execution == each.peer.case.execution
                else f"{run_command([each.ours.case])} && {run_command([each.peer.case])}",
            )
        )
    return [
        Chart(
            name="lead",
            section="lead",
            title=title,
            kind="lines",
            panels=(Panel(data=tuple(data), level=1.0),),
            styles=lead_styles(of_series),
            x_label="Image side in pixels",
            y_label="Attention's time / DiG's time",
            log_x=True,
            log_y=True,
            caption=(
                provenance([row for row in rows if machine(row) == where], [name]),
                f"Labels: the attention; {common}, unless they say otherwise. DiG is slower at {behind} of {total} "
                "points. Intervals: from the attention's fast end over DiG's "
                "slow one, to the opposite.",
                *marked({id(row): row for row in rows}.values()),
                *([f"Without a time on one side: {'; '.join(missing)}."] if missing else []),
            ),
            reading="Above 1, DiG is faster.",
            command=BEST,
        )
    ]


def achieved(evidence: Evidence) -> list[Chart | Missing]:
    """FLOP/s of every model over the ceiling measured beside it: the roofline's upper part, from rows alone."""
    title = "Share of the measured ceiling of matrix products"

    def reached(row: Row) -> tuple[float, float, float] | None:
        share = row.ceiling_share if row.status == "ok" else None
        if share is None:
            return None
        fast, slow = bar_ms(row)
        middle = row.median_ms or 1
        return 100 * share, 100 * share * middle / slow, 100 * share * middle / fast

    groups: dict[str, list[Row]] = {}
    file, rows = fullest(evidence, lambda sweep: [row for row in sweep.rows if reached(row) is not None])
    for row in on_one_machine(rows):
        case = row.case
        if reached(row) is not None and case.captures and not case.compiles:
            groups.setdefault(
                f"{case.size}/{case.patch} {MODE_NAMES[case.mode]}, batch {case.batch}, {case.precision}", []
            ).append(row)
    groups = {name: own for name, own in groups.items() if len({row.case.resolution for row in own}) > 1}
    if not groups:
        why = "no two resolutions have rows in a CUDA graph with counted FLOPs and a measured ceiling"
        return [Missing(name="achieved", section="roofline", title=title, why=why, command=PAPER)]
    ordered = dict(sorted(groups.items(), key=lambda pair: -len(pair[1])))
    charts = [
        _lines(evidence, own, file, x=lambda row: float(row.case.resolution), figure=reached)
        for own in ordered.values()
    ]
    styles = {name: style for chart in charts for name, style in chart.styles.items()}
    everything = [row for own in ordered.values() for row in own]
    return [
        replace(
            charts[0],
            name="achieved",
            section="roofline",
            title=title,
            panels=tuple(
                Panel(name=name, data=chart.panels[0].data) for name, chart in zip(ordered, charts, strict=True)
            ),
            styles={name: styles[name] for name in evidence.labels.values() if name in styles},
            x_label="Image side in pixels",
            y_label="% of a large product's FLOP/s",
            caption=(
                provenance(everything, [file]),
                "FLOPs of a step counted in full, over its time, over the ceiling measured in the same run.",
            ),
            reading="Higher is nearer to what the card can multiply. DiG does fewer FLOPs the more tokens there are: "
            "compare times, not shares, across models.",
            command=PAPER,
        )
    ]
