"""The tables, as GitHub Markdown: every row of the results, grouped so that a table holds one setting only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from bench.messages import cell
from bench.store.rows import Row
from reports.best_tables import best_tables
from reports.cells import GIB, MISSING, markdown, milliseconds, number
from reports.series import (
    ASSUMED_NOTE,
    ATTENTION_FAMILIES,
    DOUBTS,
    EXECUTIONS,
    MODES,
    STATUS_NAMES,
    Launches,
    Series,
    Setting,
    Sweep,
    doubts,
    is_assumed,
    shared_doubts,
    size_rank,
    span,
)

_PREAMBLE = (
    "Times are medians of the timed steps, in milliseconds. GiB is the peak of the GPU memory that torch allocated, or "
    "of the whole process on a CPU. The speed of the fastest DiG is given in multiples of the fastest attention model. "
    f"Numbers have three significant digits. {MISSING}: not measured."
)
_LAUNCHES_NOTE = (
    "A time with brackets is the median over several process launches of each one's median step; the brackets hold the "
    "fastest and the slowest launch, and, where some failed, how many of how many have a time."
)


def tables(sweep: Sweep, *, title: str | None = None) -> str:
    """The whole of ``tables.md``."""
    parts = [f"# {cell(title or 'Results')}", _PREAMBLE]
    if any(isinstance(row, Launches) for row in sweep.rows):
        parts.append(_LAUNCHES_NOTE)
    parts += _doubts_note(sweep)
    machines: dict[tuple[bool, str], list[Row]] = {}
    for row in sweep.rows:
        machines.setdefault((row.case.device != "cuda", Setting.of(row).where), []).append(row)
    # GPUs first; among them the one with the most rows.
    for (_, where), rows in sorted(machines.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        parts += [f"## {cell(where)}", environment(rows), *_implementations(sweep, rows)]
        parts += [*best_tables(sweep, rows), *_sections(sweep, rows)]
    if any(is_assumed(row.case) for row in sweep.rows):
        parts.append(ASSUMED_NOTE.replace("*", r"\*", 1))
    return "\n\n".join(parts) + "\n"


def _doubts_note(sweep: Sweep) -> list[str]:
    """What the cells' letters mean. Marks that all rows share are said here, without a letter."""
    shared = shared_doubts(sweep.rows)
    lettered = {mark for row in sweep.rows if row.status == "ok" for mark in doubts(row)} - shared
    legend = [f"{letter}: {meaning}" for mark, (letter, meaning) in DOUBTS.items() if mark in lettered]
    told = [DOUBTS[mark][1] for mark in DOUBTS if mark in shared]
    notes = [f"Of all times: {'; '.join(told)}."] if told else []
    return [*notes, *([f"Of times with a letter: {'; '.join(legend)}."] if legend else [])]


def environment(rows: Sequence[Row]) -> str:
    """One line: hardware, versions, commit and dates of the rows; of different values, all of them."""
    found = [row.environment for row in rows]
    parts = []
    for key in ("gpu_name", "cpu", "driver", "cuda", "torch", "triton", "python"):
        values = _distinct(e.get(key) for e in found)
        name = "" if key in ("gpu_name", "cpu") else f"{key} "
        if values:
            parts.append(name + ", ".join(values))
    packages = sorted({name for e in found for name in e.get("packages") or {}} - {"torch", "triton"})
    for package in packages:
        parts.append(f"{package} " + ", ".join(_distinct((e.get("packages") or {}).get(package) for e in found)))
    names = sorted({name for e in found for name in e.get("variables") or {}})
    parts += [f"{name}=" + ", ".join(_distinct((e.get("variables") or {}).get(name) for e in found)) for name in names]
    commits = _distinct(
        f"{str(e['commit'])[:12]}{' with uncommitted changes' if e.get('dirty') else ''}"
        for e in found
        if e.get("commit")
    )
    if commits:
        parts.append("commit " + ", ".join(commits))
    parts.append(span([row.started_at[:10] for row in rows]))
    return cell(" · ".join(parts))


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values if v))


def _implementations(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """A list of what ran under every series' name."""
    ran: dict[str, dict[str, list[str]]] = {}
    for series, label in sweep.labels.items():
        for row in rows:
            if Series.of(row) == series:
                for operation, implementation in row.implementations.items():
                    names = ran.setdefault(label, {}).setdefault(operation, [])
                    if implementation not in names:
                        names.append(implementation)
    lines = [
        f"- {cell(label)}: "
        + ", ".join(f"{cell(operation)} {', '.join(map(_code, names))}" for operation, names in used.items())
        for label, used in ran.items()
    ]
    return ["What ran:\n\n" + "\n".join(lines)] if lines else []


def _sections(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The tables of one machine: by resolution, then forward passes by size."""
    groups: dict[tuple[Setting, str, int], list[Row]] = {}
    by_setting: dict[Setting, list[Row]] = {}
    for row in rows:
        setting = Setting.of(row)
        groups.setdefault((setting, row.case.size, row.case.patch), []).append(row)
        if setting.mode == "forward":
            by_setting.setdefault(setting, []).append(row)
    parts = []
    for setting, size, patch in sorted(groups, key=lambda k: (_setting_rank(k[0]), size_rank(k[1]), k[2])):
        described = setting.describe()
        parts.append(f"### {cell(size)}/{patch}: {described}\n\n" + _by_resolution(sweep, groups[setting, size, patch]))
    for setting in sorted(by_setting, key=_setting_rank):
        parts.append(f"### All sizes: {setting.describe()}\n\n" + _by_size(sweep, by_setting[setting]))
    return parts


def _setting_rank(setting: Setting) -> tuple[int, tuple[int, str, bool], str, int]:
    how = (EXECUTIONS.index(setting.execution), setting.scope, setting.max_autotune)
    return (MODES.index(setting.mode), how, setting.precision, setting.batch)


def _by_resolution(sweep: Sweep, rows: Sequence[Row]) -> str:
    shared = shared_doubts(sweep.rows)

    def shown(row: Row) -> str:
        peak = row.memory.peak if row.memory is not None else None
        return f"{milliseconds(row, shared)} · {number(peak / GIB) if peak else MISSING}"

    frame = _frame(sweep, rows, shown)
    table = _pivot(sweep, frame, ["resolution"])
    ratios = _ratios(frame)
    if not ratios.empty:
        table["speed of the fastest DiG"] = ratios
    return f"Cells: ms · GiB.\n\n{markdown(table.fillna(MISSING))}"


def _by_size(sweep: Sweep, rows: Sequence[Row]) -> str:
    shared = shared_doubts(sweep.rows)

    def shown(row: Row) -> str:
        share = row.ceiling_share
        percent = MISSING if share is None else f"{number(100 * share)}%"
        return f"{milliseconds(row, shared)} · {number(row.fps or 0)} · {percent}"

    ceilings = sorted(row.matmul_ceiling / 1e12 for row in rows if row.matmul_ceiling)
    head = "Cells: ms · FPS · share of the measured matmul ceiling"
    if ceilings:
        low, high = number(ceilings[0]), number(ceilings[-1])
        head += f" ({low if low == high else f'{low} to {high}'} TFLOP/s)"
    table = _pivot(sweep, _frame(sweep, rows, shown), ["model", "resolution"])
    return f"{head}.\n\n{markdown(table.fillna(MISSING))}"


def _frame(sweep: Sweep, rows: Iterable[Row], shown: Callable[[Row], str]) -> pd.DataFrame:
    """One record a row; ``shown`` gives the text of a row with times, a failed one shows its status."""
    ordered = sorted(rows, key=lambda row: (size_rank(row.case.size), row.case.patch, row.case.resolution))
    frame = pd.DataFrame(
        {
            "model": cell(f"{row.case.size}/{row.case.patch}"),
            "resolution": row.case.resolution,
            "family": row.case.family,
            "series": sweep.labels[Series.of(row)],
            "ms": row.median_ms,
            "cell": (shown(row) if row.status == "ok" else STATUS_NAMES[row.status])
            + (r"\*" if is_assumed(row.case) else ""),
        }
        for row in ordered
    )
    # Ordered by size, where the alphabet would say B, L, S, XL.
    frame["model"] = pd.Categorical(frame["model"], categories=frame["model"].unique(), ordered=True)
    return frame


def _pivot(sweep: Sweep, frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Series as columns, in the sweep's order."""
    table = frame.pivot(index=keys, columns="series", values="cell")
    return table[[label for label in sweep.labels.values() if label in table.columns]]


def _ratios(frame: pd.DataFrame) -> pd.Series[str]:
    """By resolution, how many times as fast the fastest DiG is as the fastest attention model, and which that is."""
    timed = frame.dropna(subset=["ms"]).sort_values("ms", kind="stable")
    ours = timed[timed["family"] == "DiG"].groupby("resolution").first()
    theirs = timed[timed["family"].isin(ATTENTION_FAMILIES)].groupby("resolution").first()
    both = ours.merge(theirs, left_index=True, right_index=True, suffixes=("_ours", "_theirs"))
    return pd.Series(
        [
            f"{number(theirs / ours)}\N{MULTIPLICATION SIGN} {cell(name)}"
            for ours, theirs, name in zip(both["ms_ours"], both["ms_theirs"], both["series_theirs"], strict=True)
        ],
        index=both.index,
        dtype=object,
    )


def _code(text: str) -> str:
    """A code span; a text that could end it, or be read as more by a lesser reader of Markdown, is none."""
    return f"`{text}`" if re.fullmatch(r"[\w.:/+ -]*\w", text) else cell(text)
