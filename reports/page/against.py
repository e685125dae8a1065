"""Charts that hold things against each other: models against a card's ceilings, two machines, two files."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Mapping

from bench.cases.case import Case
from bench.messages import visible
from bench.store.profiles import ProfileRow
from bench.store.rows import Row
from bench.store.selection import machine
from reports.cells import number
from reports.page.chart import Chart, Datum, Missing, Panel, Roof
from reports.page.commands import line, profile_command, run_command
from reports.page.evidence import Evidence
from reports.page.said import provenance, time_words
from reports.series import Series, bar_ms, launches_of

MOST_PAIRS = 8
"""Of machines or files that are offered."""
MOST_CASES = 40
"""Of a pair that are drawn; the farthest from 1 first."""


def roofline(evidence: Evidence) -> list[Chart | Missing]:
    """Every profiled step under its card's two ceilings."""
    title = "Roofline: what steps do with the card"
    profiles = [each for each in evidence.profiles if each.flops and each.bytes and each.device_ms]
    models = {(row.case.model, row.case.options): row.case for _, row in evidence.rows if _typical(row.case)}
    missing = tuple(
        (f"{case.model} ({', '.join(word for _, word in case.options)})", profile_command(case))
        for key, case in models.items()
        if key not in {(each.case.model, each.case.options) for each in profiles}
    )
    if not profiles:
        command = missing[0][1] if missing else "python -m bench profile --model DiG-S/2 --rows out/profiles.jsonl"
        why = "no profiled step is here: rows of single steps do not say how many bytes they move"
        return [Missing(name="roofline", section="roofline", title=title, why=why, command=command)]
    groups: dict[str, list[ProfileRow]] = {}
    for each in profiles:
        groups.setdefault(machine(each), []).append(each)
    panels = []
    for name, own in groups.items():
        # Ceilings differ a little from run to run; the highest is what the card can do.
        roof = Roof(
            name=name, flop_rate=max(each.flop_rate for each in own), byte_rate=max(each.byte_rate for each in own)
        )
        panels.append(Panel(name=name, data=tuple(_under(evidence, each, roof) for each in own), roof=roof))
    series = {Series(family=each.case.family, options=each.case.options) for each in profiles}
    return [
        Chart(
            name="roofline",
            section="roofline",
            title=title,
            kind="points",
            panels=tuple(panels),
            styles={
                label: evidence.looks.of(each.family, each.options)
                for each, label in evidence.labels.items()
                if each in series
            },
            x_label="FLOPs a byte moved at least",
            y_label="TFLOP/s",
            log_x=True,
            log_y=True,
            caption=(
                provenance(profiles),
                "A point is one eager step: its FLOPs in full over the device's time in kernels, against the same "
                "FLOPs over the bytes that its operations move at least (inputs read once, outputs written once). "
                "Ceilings: a large product and a large copy, measured in the same process.",
            ),
            reading="Under the slope, memory bounds a step; under the flat roof, products do. The gap to the roof is "
            "what better kernels could win.",
            command=profile_command(profiles[0].case),
            missing=missing,
        )
    ]


def _typical(case: Case) -> bool:
    return (case.mode, case.resolution, case.batch, case.size) == ("train", 1792, 1, "S") and case.captures


def _under(evidence: Evidence, row: ProfileRow, roof: Roof) -> Datum:
    intensity = row.flops / row.bytes
    rate = row.flops / (row.device_ms / 1000)
    share = rate / min(roof.flop_rate, intensity * roof.byte_rate)
    case = row.case
    return Datum(
        series=evidence.label(case.family, case.options),
        x=intensity,
        y=rate / 1e12,
        text=f"{case.model} {case.resolution} px {case.mode}, batch {case.batch} · {number(row.device_ms)} ms of "
        f"kernels · {share:.0%} of the roof",
        command=profile_command(case),
    )


def beside(evidence: Evidence) -> list[Chart | Missing]:
    """Two machines, or two files, case by case: times of one over times of the other."""
    title = "Two machines, or two files, against each other"
    by_machine: dict[str, dict[Case, Row]] = {}
    by_file: dict[str, dict[Case, Row]] = {}
    for file, row in evidence.rows:
        if row.status == "ok":
            _keep_newest(by_machine.setdefault(machine(row), {}), row)
            _keep_newest(by_file.setdefault(file, {}), row)
    pairs = [*_pairs(by_machine), *_pairs(by_file)][:MOST_PAIRS]
    if not pairs:
        why = "no two machines and no two files have a case in common"
        command = "python -m reports.page out/a.jsonl out/b.jsonl --out out/report"
        return [Missing(name="beside", section="beside", title=title, why=why, command=command)]
    panels = []
    shown: list[Row] = []
    for (first, mine), (second, theirs) in pairs:
        common = [(mine[case], theirs[case]) for case in mine if case in theirs]
        common.sort(key=lambda pair: abs((pair[1].median_ms or 1) / (pair[0].median_ms or 1) - 1), reverse=True)
        panels.append(
            Panel(
                name=f"{second} over {first}",
                data=tuple(_ratio(evidence, a, b) for a, b in common[:MOST_CASES]),
                level=1.0,
            )
        )
        shown += [row for pair in common[:MOST_CASES] for row in pair]
    series = {Series.of(row) for row in shown}
    return [
        Chart(
            name="beside",
            section="beside",
            title=title,
            kind="ratios",
            panels=tuple(panels),
            styles={
                label: evidence.looks.of(each.family, each.options)
                for each, label in evidence.labels.items()
                if each in series
            },
            y_label="time / time",
            log_y=False,
            caption=(
                provenance(shown),
                f"At most {MOST_CASES} cases of a pair, the farthest from 1 first. Intervals: one's fast end over the "
                "other's slow one, to the opposite. Cards, hosts and commits may differ too: "
                "python -m bench compare says what does, and gives verdicts.",
            ),
            reading="Left of 1, the first named is faster.",
            command="; ".join(dict.fromkeys(_comparing(evidence, mine, theirs) for (_, mine), (_, theirs) in pairs)),
        )
    ]


def _comparing(evidence: Evidence, first: Mapping[Case, Row], second: Mapping[Case, Row]) -> str:
    """What compares the files of two sides' rows; the page itself, where a machine's are in several."""
    file_of = {id(row): file for file, row in evidence.rows}
    files = [list(dict.fromkeys(file_of[id(row)] for row in side.values())) for side in (first, second)]
    paths = [[str(evidence.paths.get(name, name)) for name in names] for names in files]
    if [len(names) for names in paths] == [1, 1] and paths[0] != paths[1]:
        return line("compare", *paths[0], *paths[1])
    together = dict.fromkeys(itertools.chain(*paths))
    return visible(shlex.join(["python", "-m", "reports.page", *together, "--out", "out/report"]))


Side = tuple[str, dict[Case, Row]]


def _keep_newest(rows: dict[Case, Row], row: Row) -> None:
    """Of a case the newest counts, whatever the order of the files."""
    known = rows.get(row.case)
    if known is None or known.started_at <= row.started_at:
        rows[row.case] = row


def _pairs(sides: dict[str, dict[Case, Row]]) -> list[tuple[Side, Side]]:
    """Pairs with cases in common, most of them first."""
    pairs: Iterable[tuple[Side, Side]] = itertools.combinations(sides.items(), 2)
    counted = [(len(a[1].keys() & b[1].keys()), (a, b)) for a, b in pairs]
    return [pair for count, pair in sorted(counted, key=lambda each: -each[0]) if count]


def _ratio(evidence: Evidence, first: Row, second: Row) -> Datum:
    (fast, slow), (other_fast, other_slow) = bar_ms(first), bar_ms(second)
    case = first.case
    return Datum(
        series=evidence.labels[Series.of(first)],
        x=f"{case.model} {_words(case)} {case.resolution} px {case.mode}, {case.way}, {case.precision}, "
        f"batch {case.batch}",
        y=(second.median_ms or 0) / (first.median_ms or 1),
        low=other_fast / slow,
        high=other_slow / fast,
        text=f"{time_words(second)} over {time_words(first)}",
        command=run_command([case], launches=max(launches_of(first), 1)),
    )


def _words(case: Case) -> str:
    return f"({', '.join(word for _, word in case.options)})" if case.options else ""
