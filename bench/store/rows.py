"""The result row: what one measured case leaves behind, one JSON object a line. No torch here.

A row is written once, flushed to the disk before the next case starts, and never changed. A case that failed is a row
too, with its status; a reader therefore never has to guess why a point is missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from bench.cases.case import Case
from bench.store.decoding import decode_dataclass, parse_json, require, with_options
from bench.store.kinds import other_kind
from bench.store.ledgers import Checks, Clocks, Memory, Placement, Scaling, Timing
from bench.store.lines import LinesWriter, ResultError, Results, read_lines
from bench.store.migrations import SCHEMA, to_present
from dig.family import Look

__all__ = [
    "Mark", "ResultError", "Results", "ResultsWriter", "Row", "Status", "check_environment", "read_results", "utc_now",
]  # fmt: skip

Status = Literal["ok", "oom", "timeout", "unsupported", "error"]
Mark = Literal[
    "throttled",
    "shared-gpu",
    "unsteady",
    "unwatched",
    "unverified",
    "memory-kept",
    "no-reference",
    "measured-again",
    "small-parity",
    "not-rechecked",
    "l2-warm",
    "host-shared",
    "beside-another",
    "built-beside",
]
"""What a reader should know before trusting a row's times: the clock was held down in most readings; another process
was on the GPU; warm-up did not settle; NVML could not be asked; which kernels ran was not checked, for the profiler saw
none or nobody said which they should be; the case before it had not given its memory back; nothing else computes what
the model does, so that its outputs were compared with nothing; the launch was throttled before, and is here once more
(and throttled again where it carries that mark too); the family's operation was compared on a small input only, not at
the case's own shape; the timed step was not run again on other inputs, for want of memory; its data may have stayed in
the L2 cache from step to step; another case ran on a neighbouring GPU of the host while this one's steps were launched
one by one by the host; the same of a CUDA graph's replays, which ask little of the host (what its row says of eager
steps and launches was taken then too); the same while its kernels were built, whose seconds say less.
"""

LEAST_MS, MOST_MS = 1e-6, 1e12
"""A nanosecond and 31 years: what lies outside is no step's time."""
_WORDS = ("gpu_name", "gpu_uuid", "driver", "cuda", "torch", "triton", "python", "cpu", "commit")
_MAPPINGS = ("packages", "variables")
"""Entries of an environment that are words or null, and mappings from words to words; others may be anything."""


def check_environment(environment: Mapping[str, Any]) -> None:
    """Raise ValueError where an entry that readers know is of another kind."""
    for name in _WORDS:
        value = environment.get(name)
        require(value is None or isinstance(value, str), f"environment.{name} must be a word; got {value!r:.80}")
    for name in _MAPPINGS:
        value = environment.get(name)
        good = value is None or (isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()))
        require(good, f"environment.{name} must be words by name; got {value!r:.80}")


def utc_now() -> str:
    """The time of day, ISO 8601, UTC, as ``started_at`` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One launch of a case and its outcome.

    Attributes:
        case: What was measured.
        status: ``ok``, or why there are no times: ``oom``, ``timeout``, ``unsupported`` (a missing package), ``error``.
        message: What happened, where status is not ``ok``; of an ok row, what could not be said of it.
        samples_ms: Every timed step, in milliseconds, in order.
        memory: The ledger, or None where the case did not come that far.
        parameters: Trainable parameters.
        flops: Floating-point operations of one step in full (two a multiply-add), by `bench.measure.flops`; None where
            they could not be counted, which ``message`` then says.
        matmul_ceiling: FLOP/s of a large matrix product in this dtype, on this device, in this run; or None.
        implementations: Which implementation of each operation ran.
        stop_reason: Why sampling ended.
        seconds: Wall time by phase: ``start`` (imports, model, inputs), ``warmup``, ``measure``.
        environment: Commit, versions and device, by `dig.environment`.
        started_at: ISO 8601, UTC.
        launch: Which process launch of its case this is, from 0: launches are what intervals are taken over.
        key: Content address of case, code and environment, by `bench.store.identity`; empty where it was not recorded.
        marks: Reasons to doubt the times (`Mark`); a marked row is kept and shown as marked.
        timing: How the samples came to be, and where a step's time goes.
        clocks: SM clock, throttling and other processes during the samples; None without NVML.
        checks: What the parity check found.
        look: What the family says of its look in figures, by `dig.family.Look`.
        placement: On which of several GPUs it ran, and beside what; None where a run has one.
        scaling: Of several processes that train one model, and of the one that they are compared with.
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
    launch: int = 0
    key: str = ""
    marks: tuple[Mark, ...] = ()
    timing: Timing | None = None
    clocks: Clocks | None = None
    checks: Checks | None = None
    look: Look | None = None
    placement: Placement | None = None
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where status and samples contradict each other."""
        if self.status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}; got {self.status!r}")
        if (self.status == "ok") != bool(self.samples_ms):
            raise ValueError("samples_ms must be there exactly if status is ok")
        if not all(math.isfinite(x) and x > 0 for x in self.samples_ms):
            raise ValueError("samples_ms must be finite and positive")
        require(all(LEAST_MS <= x <= MOST_MS for x in self.samples_ms), "samples_ms must lie between 1 ns and 31 years")
        for name in ("launch", "parameters", "flops"):
            value = getattr(self, name)
            require((value or 0) >= 0, f"{name} must not be negative; got {value}")
        ceiling = self.matmul_ceiling
        require(ceiling is None or 1 <= ceiling < 1e30, f"matmul_ceiling must be FLOP/s of a machine; got {ceiling}")
        check_environment(self.environment)

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a step."""
        return median(self.samples_ms) if self.samples_ms else None

    @property
    def fps(self) -> float | None:
        """Images a second, of all processes together: their batches over the median step."""
        ms = self.median_ms
        return None if ms is None else 1000 * self.case.batch * self.case.processes / ms

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
            record = parse_json(line)
        except ValueError as error:
            raise ResultError(f"not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ResultError("not a result row: it has no schema version")
        if said := other_kind(record):
            raise ResultError(f"not a result row, but {said}")
        try:
            record = to_present(record)
        except ValueError as error:
            raise ResultError(str(error)) from None
        try:
            return decode_dataclass(cls, {**record, "case": with_options(record.get("case"))}, "row")
        except ValueError as error:
            raise ResultError(f"not a result row: {error}") from None


def read_results(path: Path) -> Results[Row]:
    """Read a results file, as of `bench.store.lines.read_lines`."""
    return read_lines(path, Row.from_json)


class ResultsWriter(LinesWriter[Row]):
    """Appends rows to a results file, as of `bench.store.lines.LinesWriter`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Row.from_json, go_on="go on with --resume")
