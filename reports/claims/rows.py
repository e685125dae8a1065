"""The rows that claims are tested on: files by name, each file's newest rows, one machine's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.store.files import read_file
from bench.store.kinds import other_kind
from bench.store.rows import ResultError, Row
from bench.store.selection import machine
from dig.environment import ROOT
from reports.claims.ratio import FIGURES, Figure
from reports.claims.subject import Subject
from reports.series import read_sweep

ROWS = ROOT / "results" / "h100"
"""The published ones of one machine."""
ELSEWHERE = ROOT / "results" / "h200"
"""Those of another."""
BESIDE = ("ablation.jsonl",)
"""Files of the other machine that are read beside those of their name: runs of equal seconds."""
INSTEAD = ("batch32-best.jsonl", "batch32.jsonl", "best.jsonl")
"""Files of the other machine that are read instead of those of their name, which older code measured."""


def published() -> list[Path]:
    """The files that the published verdicts come from."""
    own = [path for path in sorted(ROWS.glob("*.jsonl")) if path.name not in INSTEAD]
    return [*own, *(ELSEWHERE / name for name in sorted(BESIDE + INSTEAD))]


def _first(path: Path) -> object:
    """The first line's JSON; None where it is none."""
    try:
        content = read_file(path)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    try:
        return json.loads(next((line for line in content.splitlines() if line.strip()), b""))
    except (ValueError, RecursionError):
        return None


def of_steps(path: Path) -> bool:
    """Whether a file holds rows of steps: what is no JSON at all is for its reader to refuse."""
    record = _first(path)
    return not isinstance(record, dict) or (record.get("kind") is None and {"case", "schema"} <= record.keys())


def kind_of(path: Path) -> str:
    """What a file's first line is, and what reads it; empty where it may be a row of a step, or is unknown."""
    record = _first(path)
    return other_kind(record) if isinstance(record, dict) else ""


def check_written(path: Path) -> None:
    """Refuse a file whose first line is an object of JSON that nothing of this project writes.

    Rows of other kinds and of older formats pass, and so does what is no object: its reader says what is wrong with it.

    Raises:
        ResultError: It is such a file, or it cannot be read.
    """
    if isinstance(_first(path), dict) and not of_steps(path) and not kind_of(path):
        raise ResultError(f"{path}: its first line is no row of the benchmark; name files that python -m bench wrote")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that one claim may be tested on.

    Attributes:
        name: The file's.
        rows: Of one machine, launches merged.
        notes: What a reader should know of them.
    """

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def find(self, subject: Subject, figure: Figure = "time") -> Row | None:
        """The subject's row with the least time (or memory); where none has any, one that says why, or None."""
        found = subject.of(self.rows)
        measured = [(value, row) for row in found if (value := FIGURES[figure](row)) is not None]
        return min(measured, key=lambda pair: pair[0])[1] if measured else next(iter(found), None)


class Files:
    """Results files, read when a claim asks for them.

    A claim names its file. Where a file of that name was not given, the claim is tested on those that were given and
    that no claim names: somebody's own.

    Args:
        paths: Any files; those that hold no rows of steps are left alone.
        named: The names that claims know.
    """

    def __init__(self, paths: Sequence[Path], named: Iterable[str]) -> None:
        known = set(named)
        self._named: dict[str, list[Path]] = {}
        for path in paths:
            if path.name in known:
                self._named.setdefault(path.name, []).append(path)
        self._own = [path for path in paths if path.name not in known]
        self._own_steps: list[Path] | None = None
        self._read: dict[tuple[str, ...], Source | None] = {}
        self.used: set[Path] = set()

    def paths(self, name: str) -> list[Path]:
        """The files of a name."""
        self.used.update(found := self._named.get(name, []))
        return found

    def read_for(self, *names: str, runs: bool = False) -> list[Path]:
        """The files that a claim which names these files is tested on.

        Args:
            names: The files'.
            runs: Whether the claim is of training runs, which are read from files of the name alone.
        """
        if (named := [path for name in names for path in self._named.get(name, [])]) or runs:
            return named
        if self._own_steps is None:
            self._own_steps = [path for path in self._own if of_steps(path)]
        return self._own_steps

    def source(self, *names: str) -> Source | None:
        """The rows for a claim that names these files; None where there are none.

        Of a case that several of them have, the first file's rows count.

        Raises:
            ResultError: A file cannot be read.
        """
        if names not in self._read:
            self._read[names] = self._source(names)
        return self._read[names]

    def _source(self, names: tuple[str, ...]) -> Source | None:
        paths = self.read_for(*names)
        self.used.update(paths)
        if not paths:
            return None
        rows: list[Row] = []
        for group in [own for name in names if (own := self._named.get(name))] or [paths]:
            had = {row.case for row in rows}
            rows += [row for row in read_sweep(group).rows if row.case not in had]
        counts = Counter(map(machine, rows))
        where = min(counts, key=lambda one: (-counts[one], one))
        notes = [f"on {where}, of {len(counts)} machines there"] if len(counts) > 1 else []
        return Source(
            name=", ".join(path.name for path in paths),
            rows=tuple(row for row in rows if machine(row) == where),
            notes=tuple(notes),
        )
