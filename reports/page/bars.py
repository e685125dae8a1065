"""Charts of bars: where a step's time goes, what memory holds, what fits, whole sampling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bench.cases.case import Case
from bench.sampling.rows import Comparison
from bench.store.profiles import ProfileRow
from bench.store.rows import Row
from bench.store.selection import machine
from reports.cells import number
from reports.layout import Style
from reports.page.chart import Chart, Datum, Missing, Panel
from reports.page.commands import capacity_command, line, profile_command, run_command, sampling_command
from reports.page.evidence import Evidence, Probe
from reports.page.said import GIB, commit, marked, provenance, time_words, where
from reports.page.steps import PAPER, fullest, on_one_machine
from reports.series import MODE_NAMES, Series, Sweep, launches_of

TIME_PARTS: Mapping[str, str] = {
    "products": "matrix products",
    "attention or recurrence": "what mixes tokens: attention, recurrence, scan",
    "the rest": "norms, activations, convolutions, optimizer",
    "all kernels": "kernels, not told apart",
    "launches": "what launching kernel by kernel adds",
}
MEMORY_PARTS: Mapping[str, str] = {
    "weights": "as stored",
    "moments": "the optimizer's",
    "inputs, buffers": "allocated before the first step",
    "within the step": "gradients and activations",
}
NOT_RECORDED = "a machine that was not recorded"
POINTS = (("train", 1024), ("train", 1792), ("forward", 1024), ("train", 256))
"""Mode and resolution of the choices that come first."""


def _styles(evidence: Evidence, series: Iterable[Series]) -> dict[str, Style]:
    wanted = set(series)
    return {
        label: evidence.looks.of(each.family, each.options) for each, label in evidence.labels.items() if each in wanted
    }


def _points(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what was to be done, the likeliest to be looked for first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        case = row.case
        name = f"{case.size}/{case.patch} {MODE_NAMES[case.mode]} at {case.resolution}, batch {case.batch}"
        if case.precision != "bf16":
            name += f", {case.precision}"
        found.setdefault(name, []).append(row)

    def rank(name: str) -> tuple[int, int, int]:
        case = found[name][0].case
        point = (case.mode, case.resolution)
        preferred = POINTS.index(point) if point in POINTS and (case.size, case.batch) == ("S", 1) else len(POINTS)
        return (preferred, -len(found[name]), case.resolution)

    return {name: found[name] for name in sorted(found, key=rank) if len(found[name]) > 1}


def parts(evidence: Evidence) -> list[Chart | Missing]:
    """Where the time of a step goes that is launched kernel by kernel: on the device, by kind, and in launches."""
    title = "Where the time of an eager step goes"

    def choose(sweep: Sweep) -> list[Row]:
        launched = _eager(sweep.rows)
        captured = (row for row in sweep.rows if row.case.execution == "graph" and row.status == "ok")
        return [row for row in captured if row.case in launched]

    file, rows = fullest(evidence, choose)
    timed = on_one_machine(rows)
    # Not the brief trial of an eager step that a row of a graph has beside it: that takes up to twice as long.
    launched = _eager(evidence.sweeps[file].rows) if timed else {}
    points = _points(timed)
    if not points:
        why = "no file has two models at one point with a row of the eager step and one of its graph"
        return [Missing(name="parts", section="parts", title=title, why=why, command=PAPER)]
    profiles = {(each.case.model, each.case.options, each.case.mode, each.case.resolution, each.case.batch): each
                for each in evidence.profiles}  # fmt: skip
    panels, split, unsplit = [], [], {}
    for name, own in points.items():
        data: list[Datum] = []
        for row in own:
            case = row.case
            profile = profiles.get((case.model, case.options, case.mode, case.resolution, case.batch))
            label = evidence.labels[Series.of(row)]
            data += _time_data(row, launched[case], profile, label)
            if profile is None:
                unsplit[f"{name}: {label}"] = profile_command(case)
            else:
                split.append(profile)
        panels.append(Panel(name=name, data=tuple(data)))
    shown = {each.part for panel in panels for each in panel.data}
    first = next(iter(points))
    wanted = [command for key, command in unsplit.items() if key.startswith(f"{first}:")]
    return [
        Chart(
            name="parts",
            section="parts",
            title=title,
            kind="stack",
            panels=tuple(panels),
            styles=_styles(evidence, (Series.of(row) for row in timed)),
            parts={name: words for name, words in TIME_PARTS.items() if name in shown},
            y_label="ms a step, launched eagerly",
            caption=(
                provenance([*timed, *split], [file]),
                *marked([*timed, *(launched[row.case] for row in timed)]),
                "Launches: the time of the eager step less that of the same step as one CUDA graph, in which launches "
                "cost nothing. The rest of a bar is the graph's time"
                + (", split as the kernels of a profiled eager step are." if split else "."),
            ),
            reading="Shorter is faster. Where launches fill a bar, a CUDA graph helps more than another model.",
            command=PAPER,
            missing=tuple(
                (f"Products, attention or recurrence, and the rest apart, {first}", command) for command in wanted
            ),
        )
    ]


def _eager(rows: Iterable[Row]) -> dict[Case, Row]:
    """Rows of eager steps with a time, by the case of the same step in a graph."""
    found = (row for row in rows if row.case.execution == "eager" and row.status == "ok")
    return {replace(row.case, execution="graph"): row for row in found}


def _time_data(row: Row, launched: Row, profile: ProfileRow | None, label: str) -> list[Datum]:
    graph, eager = row.median_ms or 0.0, launched.median_ms or 0.0
    if profile is not None and profile.device_ms > 0:
        words = ("products", "attention or recurrence", "the rest")
        on_device = {
            word: graph * part.us / 1000 / profile.device_ms for word, part in zip(words, profile.parts, strict=True)
        }
    else:
        on_device = {"all kernels": graph}
    pieces = {**on_device, "launches": max(eager - graph, 0.0)}
    total = sum(pieces.values())
    command = run_command([row.case, launched.case]) if profile is None else profile_command(row.case)
    return [
        Datum(
            series=label,
            x=label,
            y=ms,
            part=part,
            text=f"{number(ms)} ms, {ms / total:.0%} of {number(total)} ms; the eager step {time_words(launched)} · "
            f"commit {commit(row.environment)}",
            command=command,
        )
        for part, ms in pieces.items()
    ]


def memory(evidence: Evidence) -> list[Chart | Missing]:
    """What the peak of the allocator is made of, by the ledger of every row."""
    title = "What the peak of memory is made of"

    def choose(sweep: Sweep) -> list[Row]:
        return [row for row in sweep.rows if row.status == "ok" and row.case.execution == "graph" and _ledger(row)]

    file, rows = fullest(evidence, choose)
    rows = on_one_machine(rows)
    points = _points(rows)
    if not points:
        why = "no file has two models at one point whose rows hold the ledger"
        return [Missing(name="memory", section="memory", title=title, why=why, command=PAPER)]
    panels = []
    for name, own in points.items():
        data, marks = [], {}
        for row in own:
            label = evidence.labels[Series.of(row)]
            ledger, held = _ledger(row), row.memory
            assert held is not None
            total = sum(ledger.values())
            extra = f" · gradients {number((held.gradients or 0) / GIB)} GiB" if row.case.mode == "train" else ""
            if held.process_peak:
                marks[label] = held.process_peak / GIB
                extra += f" · whole process {number(held.process_peak / GIB)} GiB"
            data += [
                Datum(
                    series=label,
                    x=label,
                    y=size / GIB,
                    part=part,
                    text=f"{number(size / GIB)} of {number(total / GIB)} GiB{extra} · commit {commit(row.environment)}",
                    command=run_command([row.case], launches=max(launches_of(row), 1)),
                )
                for part, size in ledger.items()
            ]
        panels.append(Panel(name=name, data=tuple(data), marks=marks))
    shown = {each.part for panel in panels for each in panel.data if each.y}
    return [
        Chart(
            name="memory",
            section="memory",
            title=title,
            kind="stack",
            panels=tuple(panels),
            styles=_styles(evidence, (Series.of(row) for row in rows)),
            parts={name: words for name, words in MEMORY_PARTS.items() if name in shown},
            y_label="GiB at the allocator's peak",
            caption=(
                provenance([row for own in points.values() for row in own], [file]),
                "Bars end at the peak of torch's allocator, which tables show; a tick, and the second number, are the "
                "whole process, with CUDA's context and what the allocator held in reserve. Gradients live within the "
                "step. No interval: a launch has one peak.",
            ),
            reading="Shorter is leaner. What grows with resolution lives within the step.",
            command=PAPER,
        )
    ]


def _ledger(row: Row) -> dict[str, int]:
    """Bytes of the allocator's peak by part; empty where a part is not known."""
    held = row.memory
    if held is None or None in (held.optimizer, held.resident, held.activations):
        return {}
    ledger = {
        "weights": held.parameters,
        "moments": held.optimizer or 0,
        "inputs, buffers": (held.resident or 0) - held.parameters,
        "within the step": held.activations or 0,
    }
    return ledger if min(ledger.values()) >= 0 else {}


def capacity(evidence: Evidence) -> list[Chart | Missing]:
    """The largest batch and the largest resolution that fit, of every model that was tried, each on one machine."""
    title = "The largest batch and resolution that fit"
    groups: dict[tuple[Case, int | None, str], list[Probe]] = {}
    machines: dict[str, list[Probe]] = {}
    for probe in evidence.probes:
        kind = replace(probe.case, batch=1, resolution=256)
        groups.setdefault((kind, probe.limit, _tried_on(probe)), []).append(probe)
        machines.setdefault(_tried_on(probe), []).append(probe)
    found: dict[str, list[Datum]] = {}
    series = []
    for own in groups.values():
        case = own[0].case
        label = f"{case.model}{_options(evidence, case.family, case.options)}"
        for axis, other in (("batch", "resolution"), ("resolution", "batch")):
            for fixed in sorted({getattr(probe.case, other) for probe in own}):
                here = [probe for probe in own if getattr(probe.case, other) == fixed]
                tried = {getattr(probe.case, axis): probe for probe in here}
                if len(tried) < 3:
                    continue
                fits = [value for value, probe in tried.items() if probe.fits]
                fails = [value for value, probe in tried.items() if not probe.fits]
                at = f"at {fixed} pixels" if axis == "batch" else f"at batch {fixed}"
                room = "" if own[0].limit is None else f", within {number(own[0].limit / GIB)} GiB"
                on = _tried_on(own[0])
                apart = f", {on}" if len(machines) > 1 else ""
                name = f"Largest {axis} {at}, {MODE_NAMES[case.mode]}, {case.way}, {case.precision}{room}{apart}"
                top = max(fits, default=None)
                held = None if top is None else tried[top].peak
                beyond = f"{min(fails)} does not fit" if fails else "nothing larger was tried"
                found.setdefault(name, []).append(
                    Datum(
                        series=label,
                        x=label,
                        y=top,
                        word="nothing fits" if top is None else "",
                        text=f"{f'peak {number(held / GIB)} GiB · ' if held else ''}{beyond} · {on}",
                        command=capacity_command(
                            case,
                            resolution=fixed if axis == "batch" else 256,
                            batch=fixed if axis == "resolution" else 1,
                            limit=own[0].limit,
                        ),
                    )
                )
        series.append((label, case.family, case.options))
    command = line("capacity", "--model", "DiG-XL/2:triton", "--mode", "train", "--out", "out/capacity.jsonl")
    if not found:
        why = "no probes of what fits are here"
        return [Missing(name="capacity", section="capacity", title=title, why=why, command=command)]
    places = " and ".join(_counted(name, own) if len(machines) > 1 else name for name, own in machines.items())
    commits = " and ".join(dict.fromkeys(filter(None, (commit(probe.environment) for probe in evidence.probes))))
    return [
        Chart(
            name="capacity",
            section="capacity",
            title=title,
            kind="bars",
            panels=tuple(Panel(name=name, data=tuple(data)) for name, data in found.items()),
            styles={label: evidence.looks.of(family, options) for label, family, options in series},
            y_label="the largest that fits",
            counts=True,
            caption=(
                f"{places}{f' · commit {commits}' if commits else ''} · {len(evidence.probes)} probes, each a process",
                *_alike(machines),
                "Found by bisection; no interval, for what fits has none.",
            ),
            reading="Longer bars hold more.",
            command=command,
        )
    ]


def _tried_on(probe: Probe) -> str:
    # Older probes don't say where; nobody knows that two of them are of one machine.
    return where(probe) if probe.environment else NOT_RECORDED


def _counted(name: str, probes: Sequence[Probe]) -> str:
    return f"{name} ({len(probes)} probe{'' if len(probes) == 1 else 's'})"


def _alike(machines: Mapping[str, Sequence[Probe]]) -> list[str]:
    """What to know of machines of one name, whose bars are of all of them."""
    cards = {name: {each.environment.get("gpu_uuid") for each in own} - {None} for name, own in machines.items()}
    several = {name: len(own) for name, own in cards.items() if len(own) > 1}
    return [f"{count} cards are named {name}; bars are of all of them." for name, count in several.items()]


def _options(evidence: Evidence, family: str, options: tuple[tuple[str, str], ...]) -> str:
    label = evidence.label(family, options)
    return label[label.index(" (") :] if " (" in label else ""


def sampling(evidence: Evidence) -> list[Chart | Missing]:
    """Samples a second of whole guided sampling, from noise to latents."""
    title = "Samples a second of whole sampling"
    timed = [entry for entry in evidence.sampling if entry.row.speed is not None]
    if not timed:
        why = "no sampling row has a speed"
        return [Missing(name="sampling", section="sampling", title=title, why=why, command=line("sampling"))]
    settings = [(*entry.row.case.describe().split(", "), machine(entry.row)) for entry in evidence.sampling]
    shared = [part for part in settings[0][:-1] if all(part in one for one in settings)]
    groups: dict[str, list[Comparison]] = {}
    for entry, setting in zip(evidence.sampling, settings, strict=True):
        # What tells panels apart, and that alone: a picture has room for some words.
        own_words = [part for part in setting if not all(part in one for one in settings)]
        name = ": ".join(filter(None, (f"{entry.row.case.resolution} px", ", ".join(own_words))))
        groups.setdefault(name, []).append(entry)
    panels = []
    for name, own in groups.items():
        runs = {entry.row.run: [each.row.case for each in own if each.row.run == entry.row.run] for entry in own}
        panels.append(
            Panel(
                name=name,
                data=tuple(_sampling_datum(entry, sampling_command(entry, runs[entry.row.run])) for entry in own),
            )
        )
    confidence = min(entry.row.speed.confidence for entry in timed if entry.row.speed is not None)
    return [
        Chart(
            name="sampling",
            section="sampling",
            title=title,
            kind="bars",
            panels=tuple(panels),
            styles={
                entry.row.case.label: evidence.looks.of(entry.row.case.family, entry.row.case.options)
                for entry in evidence.sampling
            },
            y_label="samples/s",
            caption=(
                provenance([entry.row for entry in timed]),
                ", ".join([*shared, "from noise to latents in the host's memory, without decoding; random weights. "])
                + "Models took turns, batch by batch. Intervals hold the median with a confidence of at least "
                f"{confidence:.1%}.",
            ),
            reading="Longer bars sample faster.",
            # A run measures its models in turns: a command for each.
            command="; ".join(dict.fromkeys(each.command for panel in panels for each in panel.data)),
        )
    ]


def _sampling_datum(entry: Comparison, command: str) -> Datum:
    row = entry.row
    speed = row.speed
    parts = [] if speed is None else [f"{speed} samples/s"]
    if entry.peer is not None and entry.ratio is not None:
        parts.append(f"{entry.ratio} times {entry.peer}")
    parts += [f"{number(row.peak_memory_gib)} GiB"] if row.peak_memory_gib else []
    parts += [f"commit {found}"] if (found := commit(row.environment)) else []
    return Datum(
        series=row.case.label,
        x=row.case.label,
        y=None if speed is None else speed.median,
        low=None if speed is None else speed.low,
        high=None if speed is None else speed.high,
        word="" if speed is not None else row.status,
        text=" · ".join(parts),
        command=command,
    )
