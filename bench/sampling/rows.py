"""What a measurement of sampling says: its rows, how they are kept, and how two models compare. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from bench.cases.case import MOST_COUNT
from bench.store.decoding import decode_dataclass, parse_json, require
from bench.store.files import append_line, read_file, require_appendable
from bench.store.migrations import rename_backend
from bench.store.rows import check_environment

SCHEMA = 2
"""2 calls the backend by its present name (`bench.store.migrations`) and has ``case.source``; 1 is read too."""
MOST_CFG = 1e6
KIND = "sampling"
"""Tells these rows from those of `bench.store.rows`, which are of single steps."""
_BEGINS = f'{{"kind":"{KIND}"'.encode()
CONFIDENCE = 0.95
Status = Literal["ok", "oom", "timeout", "error"]


class RowError(ValueError):
    """A file of rows cannot be read or written; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median, and order statistics around it.

    Attributes:
        median: Of the values.
        low: A lower end.
        high: A higher end.
        confidence: With this probability the interval holds the median of whatever the values are drawn from, however
            that is distributed. Two values give 0.5, five 0.94.
    """

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: Iterable[float], confidence: float = CONFIDENCE) -> Interval:
        """The narrowest interval of at least this confidence; with too few values for it, least to most.

        Raises:
            ValueError: There are no values.
        """
        ordered = sorted(values)
        n = len(ordered)
        if not n:
            raise ValueError("a median needs values")

        def reached(k: int) -> float:
            """Both medians agree unless fewer than k of n values fall on one side, each with probability a half."""
            return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

        k = max((k for k in range(1, n // 2 + 1) if reached(k) >= confidence), default=1)
        return cls(median=median(ordered), low=ordered[k - 1], high=ordered[n - k], confidence=max(0.0, reached(k)))

    def __str__(self) -> str:
        """``3.21 (3.18 to 3.22)``."""
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, kw_only=True)
class SamplingCase:
    """What is measured.

    Attributes:
        model: ``DiG-XL/2``.
        options: Of its family, by name, in alphabetical order.
        resolution: Side of the images in pixels; the model's latent is an eighth of it.
        sampler: ``ddim``, say.
        steps: Steps of the sampler.
        cfg: Guidance; 1 is none.
        cfg_channels: Which noise channels are guided, ``three`` or ``all``.
        batch: Samples at once. With guidance the model sees twice as many.
        dtype: ``bf16`` or ``fp32``.
        device: ``cuda`` or ``cpu``.
        execution: ``graph``, all steps as one CUDA graph; or ``eager``.
        source: The family's import path, as of `bench.cases.case.Case`.
    """

    model: str
    options: tuple[tuple[str, str], ...] = ()
    resolution: int
    sampler: str = "ddim"
    steps: int = 50
    cfg: float = 1.5
    cfg_channels: str = "three"
    batch: int
    dtype: str = "bf16"
    device: str = "cuda"
    execution: str = "graph"
    source: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError on a number that no case may have."""
        for name in ("resolution", "steps", "batch"):
            value = getattr(self, name)
            require(1 <= value <= MOST_COUNT, f"{name} must be a whole number from 1 to {MOST_COUNT}; got {value}")
        require(abs(self.cfg) <= MOST_CFG, f"cfg must be a number up to {MOST_CFG:g}; got {self.cfg:g}")

    @property
    def family(self) -> str:
        """``DiG``."""
        return self.model.rpartition("-")[0]

    @property
    def label(self) -> str:
        """``DiG-XL/2 (triton, release)``."""
        words = ", ".join(value for _, value in self.options)
        return f"{self.model} ({words})" if words else self.model

    @property
    def setting(self) -> SamplingCase:
        """Everything but the model: what two models must have in common to be compared."""
        return dataclasses.replace(self, model="", options=(), source="")

    def describe(self) -> str:
        """The setting in words: ``ddim, 50 steps, guidance 1.5 (three channels), 32 at once, bf16, graph``."""
        guidance = f"guidance {self.cfg:g} ({self.cfg_channels} channels)" if self.cfg != 1 else "no guidance"
        how = f"{self.dtype}, {self.execution}, {self.device}"
        return f"{self.sampler}, {self.steps} steps, {guidance}, {self.batch} at once, {how}"


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """A case, measured.

    Attributes:
        case: What.
        status: ``ok``, or why there are no figures.
        message: Of a failure.
        run: Of which run; rows of one run and setting were measured in turns, repeat by repeat.
        seconds: Of each repeat, a batch from noise to latents in the host's memory, in the order of the turns.
        setup_seconds: Building the model, compiling kernels, capturing the graph and the first, untimed batch.
        peak_memory_gib: The most that torch allocated on the GPU at a time; None on a CPU.
        started_at: ISO time.
        environment: Device, versions, commit.
    """

    case: SamplingCase
    status: Status
    message: str = ""
    run: str = ""
    seconds: tuple[float, ...] = ()
    setup_seconds: float | None = None
    peak_memory_gib: float | None = None
    started_at: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError where status and seconds contradict each other."""
        if self.status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}; got {self.status!r}")
        if self.status == "ok" and not self.seconds:
            raise ValueError("an ok row needs seconds")
        if not all(math.isfinite(second) and second > 0 for second in self.seconds):
            raise ValueError("seconds must be finite and positive")
        require(all(1e-9 <= second <= 1e9 for second in self.seconds), "seconds must lie between 1 ns and 31 years")
        for name in ("peak_memory_gib", "setup_seconds"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1e12, f"{name} must be a number of common size; got {value}")
        check_environment(self.environment)

    @property
    def speed(self) -> Interval | None:
        """Samples a second; None of a failure."""
        return Interval.of(self.case.batch / s for s in self.seconds) if self.status == "ok" else None

    def to_json(self) -> str:
        """One line of JSON, without its newline. What can be computed from the seconds is written for readers."""
        record = dataclasses.asdict(self)
        record["case"]["options"] = dict(self.case.options)
        speed = None if self.speed is None else dataclasses.asdict(self.speed)
        content = {"kind": KIND, "schema": SCHEMA, **record, "samples_per_second": speed}
        return json.dumps(content, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> SamplingRow:
        """Read a line that `to_json` wrote. Raises RowError on anything else."""
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or record.pop("kind", None) != KIND:
                raise ValueError(f"it is not of kind {KIND!r}")
            if (version := record.pop("schema", None)) not in (1, SCHEMA):
                raise ValueError(f"it is of schema {version!r}, not of 1 to {SCHEMA}")
            record.pop("samples_per_second", None)
            case = record.get("case")
            if not isinstance(case, dict) or not isinstance(case.get("options"), dict):
                raise ValueError("case.options must be an object")
            if not all(isinstance(value, str) for value in case["options"].values()):
                raise ValueError("case.options must be words")
            options = case["options"]
            if version == 1:
                options = rename_backend(str(case.get("model")), options)
            fields = {name: value for name, value in case.items() if name != "options"}
            record["case"] = {**fields, "options": [list(pair) for pair in sorted(options.items())]}
            return decode_dataclass(cls, record, "row")
        except ValueError as error:
            raise RowError(f"not a row of {KIND}: {error}") from None


def append_row(path: Path, row: SamplingRow) -> None:
    """Append a row and wait until it is on the disk. Raises RowError where that can't be."""
    try:
        append_line(path, row.to_json())
    except OSError as error:
        raise RowError(f"cannot write {path}: {error.strerror}; choose another --out") from None


def require_rows(path: Path) -> None:
    """Raise RowError where rows cannot be appended: the file can't be written, or holds something else."""
    try:
        require_appendable(path)
    except OSError as error:
        raise RowError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    if path.exists():
        try:
            read_rows(path)
        except RowError as error:
            raise RowError(f"{error}; choose another --out") from None


def read_rows(path: Path) -> tuple[list[SamplingRow], list[int]]:
    """The rows of a file, and the numbers of lines that end in the middle, as a kill leaves them.

    Raises:
        RowError: The file can't be read, or holds other rows.
    """
    try:
        lines = read_file(path).split(b"\n")
    except OSError as error:
        raise RowError(f"cannot read {path}: {error.strerror}") from None
    rows, torn = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.rstrip().endswith(b"}") and (line.startswith(_BEGINS) or _BEGINS.startswith(line)):
            torn.append(number)
            continue
        try:
            rows.append(SamplingRow.from_json(line.decode()))
        except UnicodeDecodeError:
            raise RowError(f"{path}, line {number}: not text in UTF-8; is it a file of sampling rows?") from None
        except RowError as error:
            raise RowError(f"{path}, line {number}: {error}") from None
    return rows, torn


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row beside that of its peer.

    Attributes:
        row: The row.
        peer: Label of the model that it is compared with; None if it is the peer itself, or there is none.
        ratio: How many times as fast it is, from repeats of the same turn; None without such repeats.
    """

    row: SamplingRow
    peer: str | None = None
    ratio: Interval | None = None


def machine(row: SamplingRow) -> str:
    """Name of the GPU, or of the processor."""
    name = row.environment.get("gpu_name") if row.case.device == "cuda" else None
    return str(name or row.environment.get("cpu") or "unknown hardware")


def compare(rows: Sequence[SamplingRow]) -> list[Comparison]:
    """Every row beside the last model of its run, setting and machine, in order.

    Of a case that was measured twice on a machine, the later row counts.
    """
    latest = {(row.case, machine(row)): row for row in rows}
    peers = {_turns(row): row for row in rows}
    found = []
    for row in latest.values():
        peer = peers[_turns(row)]
        if peer is row:
            found.append(Comparison(row=row))
            continue
        ratio = None
        # Turns that one of them did not live to see say nothing.
        if row.status == peer.status == "ok" and len(row.seconds) == len(peer.seconds):
            ratio = Interval.of(theirs / ours for ours, theirs in zip(row.seconds, peer.seconds, strict=True))
        found.append(Comparison(row=row, peer=peer.case.label, ratio=ratio))
    return found


def _turns(row: SamplingRow) -> tuple[object, ...]:
    """What rows have in common that were measured in turns."""
    return row.run, row.case.setting, machine(row)
