"""Which rows belong together: series (the lines and columns) and settings (what one figure or table may not mix).

Figures and tables take names, order and grouping from here, so that a series is called the same wherever it is shown.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np

from bench.cases.case import Case, Device, Execution, Mode, Scope
from bench.store.rows import Mark, ResultError, Row, read_results
from bench.store.selection import by_case_and_machine, machine, newest
from reports.looks import Looks

SIZES = ("S", "B", "L", "XL")
_MODEL_NAME = re.compile(r"[^/]+-[^-/]+/[1-9][0-9]{0,8}")
FAMILIES = ("DiG", "Flash-DiT", "DiT", "DiS")
ATTENTION_FAMILIES = ("Flash-DiT", "DiT")
# A figure shows the first of these that was measured: a graph leaves out the launches, which say little of a model.
EXECUTIONS: tuple[Execution, ...] = ("graph", "compiled-graph", "eager", "compile")
MODES: tuple[Mode, ...] = ("train", "forward")

EXECUTION_NAMES: Mapping[str, str] = {
    "graph": "CUDA graph",
    "compiled-graph": "torch.compile, CUDA graph",
    "eager": "eager",
    "compile": "torch.compile",
}
PRECISION_NAMES: Mapping[str, str] = {"bf16": "bf16", "bf16-weights": "bf16 weights", "fp32": "fp32"}
MODE_NAMES: Mapping[str, str] = {"train": "training step", "forward": "forward pass"}
STATUS_NAMES: Mapping[str, str] = {
    "oom": "OOM",
    "timeout": "timeout",
    "unsupported": "unsupported",
    "error": "error",
}
SEVERAL = "several GPUs"
CPU_WARNING = "CPU (reference implementations), not a GPU result"
DOUBTS: Mapping[Mark, tuple[str, str]] = {
    "throttled": ("t", "the clock was held down in at least half of the readings"),
    "shared-gpu": ("s", "another process was on the GPU"),
    "unsteady": ("u", "the times had not settled when sampling began"),
    "unwatched": ("w", "clock and other processes were not watched"),
    "unverified": ("v", "which kernels ran was not checked"),
    "memory-kept": ("m", "the case before had not given its memory back"),
    "no-reference": ("r", "no reference computes the same: the outputs were compared with nothing else"),
    "small-parity": ("p", "its operation was compared with a truth on a small input only"),
    "not-rechecked": ("c", "what was timed was not run again on other inputs"),
    "l2-warm": ("l", "its data may have stayed in the L2 cache from step to step"),
    "host-shared": ("h", "launched by the host step by step while another case ran on a neighbouring GPU"),
    "beside-another": ("b", "another case ran on a neighbouring GPU"),
}
"""Letter and meaning of each mark that is a reason to doubt a row's times."""
ASSUMED_NOTE = "* DiS-XL is assumed (1152 wide, 48 deep): the published DiS has no XL."


def _rank(value: str, order: tuple[str, ...]) -> tuple[int, str]:
    return (order.index(value) if value in order else len(order), value)


def size_rank(size: str) -> tuple[int, str]:
    """Sort key of a size: S, B, L, XL, then any other by name."""
    return _rank(size, SIZES)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure, one column of a table: a model family with its options."""

    family: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, row: Row) -> Series:
        """The series that a row belongs to."""
        return cls(family=row.case.family, options=row.case.options)

    @property
    def rank(self) -> tuple[tuple[int, str], int, tuple[tuple[str, str], ...]]:
        """Sort key: DiG first, then the attention models, then DiS; fewer options first."""
        return (_rank(self.family, FAMILIES), len(self.options), self.options)


def series_labels(series: Iterable[Series], name: Callable[[str], str] = str) -> dict[Series, str]:
    """Names for a set of series: ``DiG (fla)``; ``DiG (backend=fla)`` where the values alone would not tell.

    Args:
        series: The set.
        name: Family to what it is called.
    """
    ordered = sorted(set(series), key=lambda s: s.rank)
    short = {s: _label(name(s.family), [value for _, value in s.options]) for s in ordered}
    uses = Counter(short.values())
    labels = {
        s: _label(name(s.family), [f"{k}={v}" for k, v in s.options])
        if uses[short[s]] > 1 or not _telling(s)
        else short[s]
        for s in ordered
    }
    # An option's value may look like two options; columns and lines need a name of their own all the same.
    taken: Counter[str] = Counter()
    for s, label in labels.items():
        taken[label] += 1
        labels[s] = label if taken[label] == 1 else f"{label} #{taken[label]}"
    return labels


def _label(family: str, words: list[str]) -> str:
    return f"{family} ({', '.join(words)})" if words else family


def _telling(series: Series) -> bool:
    """Whether the options' values are words that stand for themselves: not ``true``, not ``16``, none twice."""
    values = [value for _, value in series.options]
    return len(set(values)) == len(values) and all(
        v[:1].isalpha() and v.lower() not in ("true", "false") for v in values
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What must be equal for two numbers to compare.

    Attributes:
        device: ``cuda`` or ``cpu``.
        machine: Name of the GPU, or of the processor where the device is the CPU.
        precision: ``bf16`` (autocast), ``bf16-weights`` or ``fp32``.
        batch: Images a step.
        mode: ``train`` or ``forward``.
        execution: ``graph``, ``compiled-graph``, ``eager`` or ``compile``.
        scope: What one compilation covers; empty where nothing is compiled.
        max_autotune: Whether Inductor tuned each product.
    """

    device: Device
    machine: str
    precision: str
    batch: int
    mode: Mode
    execution: Execution
    scope: Scope = ""
    max_autotune: bool = False

    @classmethod
    def of(cls, row: Row) -> Setting:
        """The setting that a row was measured in."""
        case = row.case
        return cls(
            device=case.device,
            machine=machine(row),
            precision=case.precision,
            batch=case.batch,
            mode=case.mode,
            execution=case.execution,
            scope=case.scope,
            max_autotune=case.max_autotune,
        )

    @property
    def where(self) -> str:
        """The machine for people; of a CPU it says that it is none."""
        return self.machine if self.device == "cuda" else f"{CPU_WARNING}: {self.machine}"

    def describe(self) -> str:
        """Everything but the machine: ``training step, CUDA graph, bf16, batch 1``."""
        return f"{MODE_NAMES[self.mode]}, {self.way}, {PRECISION_NAMES[self.precision]}, batch {self.batch}"

    @property
    def way(self) -> str:
        """How it was run: ``CUDA graph``, ``torch.compile by block, CUDA graph``."""
        compiled = f"torch.compile by {self.scope}{', max-autotune' if self.max_autotune else ''}"
        return EXECUTION_NAMES[self.execution].replace("torch.compile", compiled)


@dataclass(frozen=True, kw_only=True)
class Launches(Row):
    """Several process launches of one case on one machine, as one row.

    Its time is the median over launches of each one's median step; ``samples_ms`` holds the steps of all, ``memory``
    the largest peak, ``marks`` those of any launch. The rest is of the last launch that has times.

    Attributes:
        launch_ms: Median milliseconds of each launch that has times.
        failed: Launches without times.
    """

    launch_ms: tuple[float, ...]
    failed: int = 0

    @property
    def median_ms(self) -> float:
        """Median milliseconds over launches."""
        return median(self.launch_ms)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The fastest and the slowest launch, in milliseconds."""
        return min(self.launch_ms), max(self.launch_ms)


def bar_ms(row: Row) -> tuple[float, float]:
    """The ends of a row's bar, in milliseconds: its launches' range; of one launch, 10th to 90th percentile of steps.

    Args:
        row: With times.
    """
    if isinstance(row, Launches):
        return row.spread_ms
    low, high = np.percentile(row.samples_ms, [10, 90])
    return float(low), float(high)


def launches_of(row: Row) -> int:
    """How many launches with times a row stands for."""
    return len(row.launch_ms) if isinstance(row, Launches) else int(row.status == "ok")


def merge_launches(rows: Iterable[Row]) -> Row:
    """One row for all launches of a case on a machine.

    Only rows that count (`bench.store.selection.newest`) are taken; where none of them has times, it is the last as it
    is.

    Args:
        rows: Of one case on one machine, at least one, in the order they were measured.
    """
    given = list(rows)
    latest = newest(given).rows
    good = [row for row in latest if row.status == "ok"]
    if len(latest) == 1 or not good:
        return given[-1]
    last = good[-1]
    fields = {f.name: getattr(last, f.name) for f in dataclasses.fields(Row)}
    fields["samples_ms"] = tuple(ms for row in good for ms in row.samples_ms)
    fields["memory"] = max((row.memory for row in good), key=lambda m: (m.peak or 0) if m is not None else 0)
    fields["marks"] = tuple(dict.fromkeys(mark for row in good for mark in row.marks))
    return Launches(
        **fields,
        launch_ms=tuple(ms for row in good if (ms := row.median_ms) is not None),
        failed=len(latest) - len(good),
    )


Ordered = TypeVar("Ordered", int, str)


def span(values: Iterable[Ordered]) -> str:
    """``20`` where all are equal, ``20 to 100`` where they are not."""
    ordered = sorted(set(values))
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def is_assumed(case: Case) -> bool:
    """Whether this project assumed the model's dimensions: DiS has no published XL."""
    return case.family == "DiS" and case.size == "XL"


def doubts(row: Row) -> tuple[Mark, ...]:
    """The row's marks that are reasons to doubt its times, in one order for all."""
    return tuple(mark for mark in DOUBTS if mark in row.marks)


def shared_doubts(rows: Iterable[Row]) -> frozenset[Mark]:
    """Marks that all rows with times share, to be said once; empty for fewer than two rows."""
    found = [frozenset(doubts(row)) for row in rows if row.status == "ok"]
    return frozenset.intersection(*found) if len(found) > 1 else frozenset()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The rows to report, the latest of every case and machine.

    Attributes:
        rows: The rows.
        warnings: What a reader of the files should know: a torn last line, and how many rows do not count.
        labels: The name of every series, in the order to show them.
        looks: How its families look.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    labels: Mapping[Series, str] = field(init=False)
    looks: Looks = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        looks = self.looks or Looks(self.rows)
        object.__setattr__(self, "looks", looks)
        object.__setattr__(self, "labels", series_labels((Series.of(row) for row in self.rows), looks.label))


def read_sweep(paths: list[Path]) -> Sweep:
    """Read results files; `bench.store.selection.newest` says which rows count, read one after the other.

    Launches of one case become one row (`merge_launches`).

    Two GPUs' rows of one case both stay, to be told apart.

    Raises:
        ResultError: A file cannot be read, holds a line that is no row, or none of them holds a row.
    """
    found = [read_single(path) for path in paths]
    rows = [row for own, _ in found for row in own]
    warnings = [said for _, own in found for said in own]
    if not rows:
        nothing = f"no rows in {', '.join(map(str, paths))}; run the benchmark first"
        raise ResultError("; ".join(warnings) if any(SEVERAL in said for said in warnings) else nothing)
    return sweep_of(rows, warnings)


def read_single(path: Path) -> tuple[list[Row], list[str]]:
    """A file's rows of one process each, if any, and what to warn of. Raises ResultError as `read_sweep` does."""
    results, warnings = read_results(path), []
    for row in results.rows:
        if _MODEL_NAME.fullmatch(row.case.model) is None:
            raise ResultError(
                f"{path}: {row.case.model!r:.80} is no model name; expected family, size and patch, such as DiG-S/2"
            )
    if several := sum(bool(row.case.parallel) for row in results.rows):
        warnings.append(f"{path}: {several} rows of {SEVERAL} left out; python -m reports.scaling shows them")
    if results.torn:
        warnings.append(
            f"{path}: the last line is torn (its {len(results.torn)} bytes end without a newline); left out"
        )
    return [row for row in results.rows if not row.case.parallel], warnings


def sweep_of(rows: Iterable[Row], warnings: Iterable[str] = (), looks: Looks | None = None) -> Sweep:
    """What counts of these rows, launches of one case merged.

    Args:
        rows: In the order in which they were read.
        warnings: To hand on.
        looks: How families look, where more is shown beside these rows; else of the rows themselves.
    """
    chosen = newest(rows)
    said = [*warnings, *([left_out] if (left_out := chosen.describe()) else [])]
    merged = tuple(merge_launches(own) for each in by_case_and_machine(chosen.rows).values() for own in each.values())
    return Sweep(rows=merged, warnings=tuple(said), looks=Looks(merged) if looks is None else looks)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows that one figure shows, all of one setting, and the settings that it leaves out."""

    setting: Setting
    rows: tuple[Row, ...]
    left_out: Mapping[Setting, int]


def select(rows: Iterable[Row], *, modes: tuple[Mode, ...]) -> Selection | None:
    """Choose the one setting to draw; None where no row has times.

    The machine with the most rows; the first of ``modes`` it has; the first of `EXECUTIONS` it has; then the
    precision, scope and batch with the most rows. Rows with times count before rows without. The same machine's
    other mode doesn't count as left out: that a figure of training steps has no forward passes needs no saying.

    Args:
        rows: Candidates, of any setting.
        modes: Both modes, the preferred one first.
    """
    candidates = tuple(rows)
    if not any(row.status == "ok" for row in candidates):
        return None
    kept = _most(candidates, lambda s: (s.device, s.machine))
    mode = next(m for m in modes if any(row.status == "ok" and row.case.mode == m for row in kept))
    kept = tuple(row for row in kept if row.case.mode == mode)
    execution = next(e for e in EXECUTIONS if any(row.status == "ok" and row.case.execution == e for row in kept))
    kept = _most(tuple(row for row in kept if row.case.execution == execution), lambda s: s)
    setting = Setting.of(kept[0])
    others = Counter(
        other
        for other in map(Setting.of, candidates)
        if other != setting
        and (other.mode == mode or (other.device, other.machine) != (setting.device, setting.machine))
    )
    return Selection(setting=setting, rows=kept, left_out=dict(others))


def _most(rows: tuple[Row, ...], key: Callable[[Setting], Hashable]) -> tuple[Row, ...]:
    """The rows of the most numerous group; of equal ones the GPU's, then the first in alphabetical order."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(Setting.of(row)), []).append(row)

    def weight(group: tuple[Row, ...]) -> tuple[int, int, bool, str]:
        with_times = sum(row.status == "ok" for row in group)
        setting = Setting.of(group[0])
        return (-with_times, -len(group), setting.device != "cuda", repr(setting))

    return min((tuple(group) for group in groups.values()), key=weight)
