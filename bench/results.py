"""The result row: what one measured case leaves behind, one JSON object a line. No torch here.

A row is written once, flushed to the disk before the next case starts, and never changed. A case that failed is a row
too, with its status; a reader therefore never has to guess why a point is missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

SCHEMA = 1

Status = Literal["ok", "oom", "timeout", "unsupported", "error"]
Mode = Literal["train", "forward"]
Execution = Literal["eager", "graph", "compile"]
Dtype = Literal["bf16", "fp32"]
Device = Literal["cuda", "cpu"]


def utc_now() -> str:
    """The time of day, ISO 8601, UTC, as ``started_at`` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class ResultError(ValueError):
    """A results file cannot be read or written; the message says which line and what to do."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured: everything that changes the number, and nothing else.

    Attributes:
        model: Family, size and patch: ``DiG-S/2``.
        options: Options of `bench.models.create_model`, sorted by name: ``(("recurrence", "fla"),)``.
        resolution: Side of the square image in pixels; the latent is an eighth of it.
        batch: Images a step.
        mode: ``train`` (forward, backward, fused AdamW) or ``forward`` (no gradients).
        execution: ``eager``, ``graph`` (the whole step replayed as one CUDA graph) or ``compile`` (torch.compile).
        dtype: ``bf16`` (autocast over fp32 weights) or ``fp32``.
        device: ``cuda`` or ``cpu``.
    """

    model: str
    options: tuple[tuple[str, str], ...] = ()
    resolution: int
    batch: int = 1
    mode: Mode = "train"
    execution: Execution = "eager"
    dtype: Dtype = "bf16"
    device: Device = "cuda"

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no row may have."""
        object.__setattr__(self, "options", tuple(sorted((str(k), str(v)) for k, v in self.options)))
        for name, kind in (("mode", Mode), ("execution", Execution), ("dtype", Dtype), ("device", Device)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        for name in ("batch", "resolution"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")

    @property
    def family(self) -> str:
        """``DiG`` of ``DiG-S/2``, ``Flash-DiT`` of ``Flash-DiT-S/2``."""
        return self.model.rpartition("-")[0]

    @property
    def size(self) -> str:
        """``S`` of ``DiG-S/2``."""
        return self.model.rpartition("-")[2].partition("/")[0]

    @property
    def patch(self) -> int:
        """2 of ``DiG-S/2``."""
        return int(self.model.rpartition("/")[2])

    def describe(self) -> str:
        """One line for people: ``DiG-S/2 (recurrence=fla) 1024px train graph bf16 batch 1``."""
        options = f" ({', '.join(f'{k}={v}' for k, v in self.options)})" if self.options else ""
        return (
            f"{self.model}{options} {self.resolution}px {self.mode} {self.execution} {self.dtype} "
            f"batch {self.batch} on {self.device}"
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. None where the device has no such counter.

    Attributes:
        parameters: Weights, as stored.
        resident: Allocated before the first step: weights, buffers, inputs.
        allocator_peak: The most that torch's CUDA allocator handed out during the steps, the resident part included.
        reserved_peak: The most that this allocator held from the driver.
        process_peak: The whole process: NVML's figure on a GPU (context and libraries included), resident set on a CPU.
        process_source: Where process_peak is from: ``nvml-process``, ``nvml-device-delta`` (where the container hides
            process ids: the device's used memory, less what was used before the process started) or ``vm-hwm``.
    """

    parameters: int
    resident: int | None = None
    allocator_peak: int | None = None
    reserved_peak: int | None = None
    process_peak: int | None = None
    process_source: str | None = None

    @property
    def peak(self) -> int | None:
        """The figure that plots and tables show: the allocator's peak on a GPU, the process's on a CPU."""
        return self.allocator_peak if self.allocator_peak is not None else self.process_peak


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case and what came of it.

    Attributes:
        case: What was measured.
        status: ``ok``, or why there are no times: ``oom``, ``timeout``, ``unsupported`` (a missing package), ``error``.
        message: What happened, where status is not ``ok``.
        samples_ms: Every timed step, in milliseconds, in order.
        memory: The ledger, or None where the case did not come that far.
        parameters: Trainable parameters.
        flops: Floating-point operations of one step in full (two a multiply-add), by `bench.flops`.
        matmul_ceiling: FLOP/s of a large matrix product in this dtype, on this device, in this run; or None.
        implementations: Which implementation of each operation ran.
        stop_reason: Why sampling ended.
        seconds: Wall time by phase: ``start`` (imports, model, inputs), ``warmup``, ``measure``.
        environment: Commit, versions and device, by `bench.environment`.
        started_at: ISO 8601, UTC.
    """

    case: Case
    status: Status
    started_at: str
    message: str = ""
    samples_ms: tuple[float, ...] = ()
    memory: Memory | None = None
    parameters: int | None = None
    flops: int | None = None
    matmul_ceiling: float | None = None
    implementations: Mapping[str, str] = field(default_factory=dict)
    stop_reason: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError where status and samples contradict each other."""
        if self.status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}; got {self.status!r}")
        if (self.status == "ok") != bool(self.samples_ms):
            raise ValueError("samples_ms must be there exactly if status is ok")
        if not all(math.isfinite(x) and x > 0 for x in self.samples_ms):
            raise ValueError("samples_ms must be finite and positive")

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a step."""
        return median(self.samples_ms) if self.samples_ms else None

    @property
    def fps(self) -> float | None:
        """Images a second: batch over the median step."""
        ms = self.median_ms
        return None if ms is None else 1000 * self.case.batch / ms

    @property
    def ceiling_share(self) -> float | None:
        """Share of the measured matmul ceiling that the step's FLOPs reach, 0 to 1."""
        ms = self.median_ms
        if ms is None or not self.flops or not self.matmul_ceiling:
            return None
        return self.flops / (ms / 1000) / self.matmul_ceiling

    def to_json(self) -> str:
        """One line of JSON, without its newline."""
        record = dataclasses.asdict(self)
        record["case"]["options"] = dict(self.case.options)
        return json.dumps({"schema": SCHEMA, **record}, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read a line written by `to_json`.

        Raises:
            ResultError: Not a row of this schema; the message says what is wrong.
        """
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResultError(f"not JSON: {error}") from None
        if not isinstance(record, dict) or "schema" not in record:
            raise ResultError("not a result row: it has no schema version")
        schema = record.pop("schema")
        if schema != SCHEMA:
            raise ResultError(f"schema {schema!r} is not the one this version reads ({SCHEMA}); update the project")
        try:
            case = dict(record.pop("case"))
            case["options"] = tuple(dict(case["options"]).items())
            memory = record.pop("memory")
            return cls(
                case=Case(**case),
                memory=None if memory is None else Memory(**memory),
                samples_ms=tuple(float(x) for x in record.pop("samples_ms")),
                **record,
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ResultError(f"not a result row: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a file held.

    Attributes:
        rows: The rows, in the order of the file.
        torn: The bytes after the last newline, where the file ends inside a row; empty otherwise.
    """

    rows: tuple[Row, ...]
    torn: bytes = b""

    def latest(self) -> dict[Case, Row]:
        """The last row of every case."""
        return {row.case: row for row in self.rows}


def read_results(path: Path) -> Results:
    """Read a results file. A last line without its newline is what a kill leaves: it is returned as ``torn``.

    Raises:
        ResultError: The file cannot be opened, or a whole line of it is not a row; the message names file and line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    *lines, torn = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(line.decode()))
        except (ResultError, UnicodeDecodeError) as error:
            raise ResultError(f"{path}, line {number}: {error}") from None
    return Results(rows=tuple(rows), torn=torn)


class ResultsWriter:
    """Appends rows to a file, each flushed to the disk; the only writer of its file while it is open.

    A torn last line is moved to ``<file>.torn`` first, so that nothing whole is lost and nothing torn is read as a row.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self.path = path
        self.torn_path: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ResultError(f"cannot write {path}: {error.strerror}; choose another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ResultError(f"{path} is being written by another run; wait for it, or choose another --out") from None
        self._set_torn_line_aside()

    def _set_torn_line_aside(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        self.torn_path = self.path.with_name(self.path.name + ".torn")
        with self.torn_path.open("ab") as torn:
            torn.write(content[whole:] + b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        self._file.truncate(whole)

    def write(self, row: Row) -> None:
        """Append one row and wait until it is on the disk."""
        self._file.write(row.to_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and let others write it."""
        self._file.close()

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
