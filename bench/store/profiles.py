"""Where a step's time goes, as a row: products, the family's heart, the rest. One JSON object a line. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.cases.case import Case
from bench.store.decoding import decode_dataclass, of_kind, require, with_options
from bench.store.lines import LinesWriter, ResultError, Results, read_lines
from bench.store.rows import check_environment

KIND = "profile"
"""Tells these rows from those of `bench.store.rows`."""
SCHEMA = 1

PartName = Literal["products", "heart", "rest"]
PARTS: tuple[PartName, ...] = ("products", "heart", "rest")
"""Matrix products; attention, recurrence or scan, whatever mixes tokens; everything else."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of a step.

    Attributes:
        name: Which.
        us: Microseconds on the device.
        calls: Kernels, or operators on a CPU.
    """

    name: PartName
    us: float
    calls: int

    def __post_init__(self) -> None:
        """Raise ValueError on what is no time."""
        require(math.isfinite(self.us) and 0 <= self.us < 1e12, f"part.us must be microseconds; got {self.us}")
        require(self.calls >= 0, f"part.calls must not be negative; got {self.calls}")


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One step under the profiler, launched eagerly.

    Attributes:
        case: Which.
        started_at: ISO 8601, UTC.
        parts: Every part once, in the order of `PARTS`.
        flops: Of the step in full, two a multiply-add; where they cannot be counted, of the operations whose work is
            known.
        bytes: Its operations move at least: every input read once, every known output written once.
        flop_rate: Ceiling measured beside it, FLOP/s of a large matrix product.
        byte_rate: Ceiling measured beside it, bytes/s of a large copy, read and written.
        wall_us: The step on the host's clock, the profiler's own cost included.
        environment: Commit, versions and device, by `dig.environment`.
    """

    case: Case
    started_at: str
    parts: tuple[Part, ...]
    flops: float
    bytes: float
    flop_rate: float
    byte_rate: float
    wall_us: float
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError where parts or ceilings are missing."""
        require(tuple(part.name for part in self.parts) == PARTS, f"parts must be {', '.join(PARTS)}, each once")
        for name in ("flops", "bytes", "wall_us"):
            value = getattr(self, name)
            require(0 <= value < 1e30, f"{name} must not be negative; got {value}")
        for name in ("flop_rate", "byte_rate"):
            value = getattr(self, name)
            require(1 <= value < 1e30, f"{name} must be a machine's rate; got {value}")
        check_environment(self.environment)

    @property
    def device_ms(self) -> float:
        """Milliseconds of all parts together."""
        return sum(part.us for part in self.parts) / 1000

    def to_json(self) -> str:
        """One line of JSON, without its newline."""
        record = dataclasses.asdict(self)
        record["case"]["options"] = dict(self.case.options)
        return json.dumps({"kind": KIND, "schema": SCHEMA, **record}, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> ProfileRow:
        """Read a line that `to_json` wrote. Raises ResultError on anything else."""
        try:
            record, _ = of_kind(line, KIND, SCHEMA)
            return decode_dataclass(cls, {**record, "case": with_options(record.get("case"))}, "row")
        except ValueError as error:
            raise ResultError(f"not a row of {KIND}: {error}") from None


def read_profiles(path: Path) -> Results[ProfileRow]:
    """Read a file of such rows, as of `bench.store.lines.read_lines`."""
    return read_lines(path, ProfileRow.from_json)


class ProfilesWriter(LinesWriter[ProfileRow]):
    """Appends rows to a file, as of `bench.store.lines.LinesWriter`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, ProfileRow.from_json)
