"""What the page is made of: files of every kind that the benchmark writes, read once. No torch here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.cases.case import Case
from bench.sampling.rows import KIND as SAMPLING
from bench.sampling.rows import Comparison, SamplingCase, SamplingRow, compare, read_rows
from bench.store.decoding import decode_dataclass, parse_json, with_options
from bench.store.files import read_file
from bench.store.lines import ResultError, read_lines
from bench.store.migrations import rename_backend
from bench.store.profiles import KIND as PROFILE
from bench.store.profiles import ProfileRow, read_profiles
from bench.store.rows import Row, read_results
from bench.store.selection import machine
from reports.looks import Looks
from reports.page.claims import Claim, read_claims
from reports.page.pictures import FILES
from reports.series import SEVERAL, Series, Sweep, read_single, series_labels, sweep_of

Kind = Literal["rows", "sampling", "probes", "profiles"]
CLAIMS = "claims.json"
"""The file of a folder that holds verdicts on claims."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One try of ``bench capacity``: whether a case fits.

    Attributes:
        case: What was tried.
        fits: Whether it did.
        peak: Bytes at its peak; None where it did not fit, or nobody knows.
        limit: Bytes that the process might take; None for all there were.
        environment: Where, by `dig.environment`; empty in older files.
    """

    case: Case
    fits: bool
    peak: int | None = None
    limit: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As ``bench capacity`` writes it."""
        record = dataclasses.asdict(self)
        record["case"]["options"] = dict(self.case.options)
        return json.dumps(record)

    @classmethod
    def from_json(cls, line: str) -> Probe:
        """Read a line of ``bench capacity``. Raises ResultError on anything else."""
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or "fits" not in record:
                raise ValueError("it does not say whether something fits")
            if "case" not in record:
                # As written before probes had the whole case: its main fields, beside the answer.
                kept = {key: record.pop(key) for key in ("fits", "peak", "limit", "environment") if key in record}
                record = {"case": {"execution": "graph", **record}, **kept}
            case = with_options(record["case"])
            options = rename_backend(str(case.get("model")), dict(case["options"]))
            case["options"] = [list(pair) for pair in sorted(options.items())]
            return decode_dataclass(cls, {**record, "case": case}, "probe")
        except ValueError as error:
            raise ResultError(f"not a probe of bench capacity: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was read.

    Attributes:
        sweeps: By file, what counts of its rows. A file is a run or several, and figures draw one file each.
        paths: Where the files are.
        scaled: What counts of files' rows of several GPUs that train one model, with the file's name.
        sampling: Whole sampling loops, each beside its peer.
        probes: What fits.
        profiles: Where a step's time goes.
        claims: Verdicts, where somebody gave any.
        warnings: What a reader should know: torn lines, rows that don't count.
        labels: What every series is called, the same in all files.
        looks: How families look, the same in all files.
    """

    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)
    scaled: tuple[tuple[str, Row], ...] = ()
    sampling: tuple[Comparison, ...] = ()
    probes: tuple[Probe, ...] = ()
    profiles: tuple[ProfileRow, ...] = ()
    claims: tuple[Claim, ...] = ()
    warnings: tuple[str, ...] = ()
    labels: Mapping[Series, str] = field(default_factory=dict)
    looks: Looks = field(default_factory=Looks, compare=False, repr=False)

    @property
    def rows(self) -> list[tuple[str, Row]]:
        """Every row of one process that counts in its file, with the file's name."""
        return [(name, row) for name, sweep in self.sweeps.items() for row in sweep.rows]

    def label(self, family: str, options: tuple[tuple[str, str], ...]) -> str:
        """What a series is called."""
        return self.labels[Series(family=family, options=options)]

    @property
    def machines(self) -> list[str]:
        """Where rows were measured, the most frequent first."""
        found = [machine(row) for _, row in self.rows]
        return sorted(set(found), key=lambda name: (-found.count(name), name))


def kind_of(path: Path) -> Kind | None:
    """Of which kind a file's rows are, by its first whole line; None where they are none that the page shows.

    Raises:
        ResultError: It cannot be read.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    line = next((line for line in content.split(b"\n") if line.strip()), b"")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if "fits" in record and "schema" not in record:
        return "probes"
    known: Mapping[Any, Kind] = {SAMPLING: "sampling", PROFILE: "profiles", None: "rows"}
    word = record.get("kind")
    kind = known.get(word) if word is None or isinstance(word, str) else None
    return None if kind == "rows" and not {"case", "schema"} <= record.keys() else kind


def find_files(paths: Iterable[Path]) -> tuple[list[tuple[Path, Kind]], list[str]]:
    """Files to read, those of folders by name, and what is left out of folders.

    Raises:
        ResultError: A file was named that holds nothing to show, or nothing was found.
    """
    found: list[tuple[Path, Kind]] = []
    warnings = []
    for path in paths:
        folder = path.is_dir()
        for file in sorted(path.glob("*.jsonl")) if folder else [path]:
            kind = kind_of(file)
            if kind is not None:
                found.append((file, kind))
            elif folder and file.name in FILES:
                continue  # Drawn as a picture, or warned of there.
            elif folder:
                warnings.append(f"{file}: left out; its first line is no row of the benchmark")
            elif file.exists() and not file.read_bytes().strip():
                raise ResultError(f"no rows in {file}; run the benchmark first")
            else:
                raise ResultError(
                    f"{file}: its first line is no row of the benchmark; name files that python -m bench wrote"
                )
    if not found:
        raise ResultError(f"no rows in {', '.join(map(str, paths))}; run the benchmark first")
    # A file that is named, and lies in a folder that is named too, counts once.
    unique = {file.resolve(): (file, kind) for file, kind in found}
    return list(unique.values()), warnings


def gather(paths: Sequence[Path], claims: Path | None = None) -> Evidence:
    """Read files, and folders' ``*.jsonl`` and claims.

    Args:
        paths: Files and folders.
        claims: File of verdicts; by default ``claims.json`` of the first folder that has one.

    Raises:
        ResultError: Something cannot be read, or there are no rows.
    """
    files, warnings = find_files(paths)
    names = _names([file for file, _ in files])
    rows: dict[str, list[Row]] = {}
    scaled: list[tuple[str, Row]] = []
    sampled: list[SamplingRow] = []
    probes: list[Probe] = []
    profiles: list[ProfileRow] = []
    for file, kind in files:
        torn = b""
        if kind == "rows":
            rows[names[file]], said = read_single(file)
            several = (
                [row for row in read_results(file).rows if row.case.parallel] if any(SEVERAL in s for s in said) else []
            )
            scaled += [(names[file], row) for row in sweep_of(several).rows]
            warnings += [each for each in said if SEVERAL not in each]
        elif kind == "sampling":
            sampled += (sampling := read_rows(file)).rows
            torn = sampling.torn
        elif kind == "probes":
            probes += (tried := read_lines(file, Probe.from_json)).rows
            torn = tried.torn
        else:
            profiles += (profiled := read_profiles(file)).rows
            torn = profiled.torn
        warnings += [f"{file}: the last line is torn; left out"] if torn else []
    everything = [row for own in rows.values() for row in own]
    others: list[Case | SamplingCase] = [*(row.case for row in sampled), *(probe.case for probe in probes)]
    others += [row.case for row in profiles]
    looks = Looks(everything, ((case.family, case.options) for case in others))
    series = [
        Series(family=case.family, options=case.options)
        for case in (*(row.case for row in [*everything, *(row for _, row in scaled)]), *others)
    ]
    sweeps = {}
    for name, own in rows.items():
        sweep = sweep_of(own, looks=looks)
        warnings += [f"{name}: {said}" for said in sweep.warnings]
        if sweep.rows:
            sweeps[name] = sweep
    if not (sweeps or scaled or sampled or probes or profiles):
        raise ResultError(f"no rows in {', '.join(map(str, paths))}; run the benchmark first")
    if claims is None:
        claims = next((path / CLAIMS for path in paths if (path / CLAIMS).is_file()), None)
    return Evidence(
        sweeps=sweeps,
        paths={name: file for file, name in names.items()},
        scaled=tuple(scaled),
        sampling=tuple(compare(sampled)),
        probes=tuple(probes),
        profiles=tuple(profiles),
        claims=() if claims is None else read_claims(claims),
        warnings=tuple(warnings),
        labels=_in_order(series_labels(series, looks.label), looks),
        looks=looks,
    )


def _in_order(labels: Mapping[Series, str], looks: Looks) -> dict[Series, str]:
    """Families as they were, of each the main line first."""
    families = list(dict.fromkeys(series.family for series in labels))

    def rank(series: Series) -> tuple[int, tuple[int, int]]:
        return families.index(series.family), looks.place(series.family, series.options)

    return {series: labels[series] for series in sorted(labels, key=rank)}


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """What files are called: by their names, with as much of the folder as tells two of one name apart."""
    names = {}
    for file in files:
        twins = [other for other in files if other.name == file.name]
        names[file] = file.name if len(twins) == 1 else str(file)
    return names
