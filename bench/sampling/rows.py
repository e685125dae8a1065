"""What a measurement of sampling says: its rows, how they are kept, and how two models compare. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bench.cases.case import CAPTURED, COMPILED, MOST_COUNT, Execution, Scope, Weights
from bench.measure.intervals import MedianInterval
from bench.store.decoding import decode_dataclass, of_kind, require, with_options
from bench.store.lines import LinesWriter, ResultError, Results, read_lines
from bench.store.migrations import rename_backend
from bench.store.rows import Status, check_environment
from bench.store.selection import machine

SCHEMA = 3
"""3 has ``case.scope`` and ``case.weights``; 2 calls the backend by its present name (`bench.store.migrations`) and has
``case.source``. Rows of 1 and 2 are read too."""
MOST_CFG = 1e6
KIND = "sampling"
"""Tells these rows from those of `bench.store.rows`, which are of single steps."""


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
        execution: ``graph``, all steps as one CUDA graph; ``compiled-graph``, the same of a compiled model;
            ``compile``; or ``eager``.
        scope: What one compilation covers, as of `bench.cases.case.Case`; empty where nothing is compiled.
        weights: ``fp32`` (under autocast where dtype is bf16), or ``bf16``: the model was cast.
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
    execution: Execution = "graph"
    scope: Scope = ""
    weights: Weights = "fp32"
    source: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError on a number that no case may have."""
        for name in ("resolution", "steps", "batch"):
            value = getattr(self, name)
            require(1 <= value <= MOST_COUNT, f"{name} must be a whole number from 1 to {MOST_COUNT}; got {value}")
        require(abs(self.cfg) <= MOST_CFG, f"cfg must be a number up to {MOST_CFG:g}; got {self.cfg:g}")
        require(
            bool(self.scope) == (self.execution in COMPILED), "a scope is of executions that compile, and they have one"
        )
        require(self.weights == "fp32" or self.dtype == "bf16", "weights bf16 are for sampling in bf16")

    @property
    def family(self) -> str:
        """``DiG``."""
        return self.model.rpartition("-")[0]

    @property
    def label(self) -> str:
        """``DiG-XL/2 (triton, release)``."""
        compiled = [f"compiled by {self.scope}"] if self.scope else []
        words = ", ".join([*(value for _, value in self.options), *compiled])
        return f"{self.model} ({words})" if words else self.model

    @property
    def setting(self) -> SamplingCase:
        """Everything but the model and whether it is compiled: what two must have in common to be compared."""
        plain: Execution = "graph" if self.captures else "eager"
        return dataclasses.replace(self, model="", options=(), source="", execution=plain, scope="")

    @property
    def captures(self) -> bool:
        """Whether all steps are one CUDA graph."""
        return self.execution in CAPTURED

    def describe(self) -> str:
        """The setting in words: ``ddim, 50 steps, guidance 1.5 (three channels), 32 at once, bf16, graph``."""
        guidance = f"guidance {self.cfg:g} ({self.cfg_channels} channels)" if self.cfg != 1 else "no guidance"
        precision = "bf16 weights" if self.weights == "bf16" else self.dtype
        how = f"{precision}, {'graph' if self.captures else 'eager'}, {self.device}"
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
    def speed(self) -> MedianInterval | None:
        """Samples a second; None of a failure."""
        return MedianInterval.of(self.case.batch / s for s in self.seconds) if self.status == "ok" else None

    def to_json(self) -> str:
        """One line of JSON, without its newline. What can be computed from the seconds is written for readers."""
        record = dataclasses.asdict(self)
        record["case"]["options"] = dict(self.case.options)
        speed = None if self.speed is None else dataclasses.asdict(self.speed)
        content = {"kind": KIND, "schema": SCHEMA, **record, "samples_per_second": speed}
        return json.dumps(content, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> SamplingRow:
        """Read a line that `to_json` wrote. Raises ResultError on anything else."""
        try:
            record, version = of_kind(line, KIND, SCHEMA)
            record.pop("samples_per_second", None)
            case = with_options(record.get("case"))
            if version == 1:
                options = rename_backend(str(case.get("model")), dict(case["options"]))
                case |= {"options": [list(pair) for pair in sorted(options.items())]}
            return decode_dataclass(cls, {**record, "case": case}, "row")
        except ValueError as error:
            raise ResultError(f"not a row of {KIND}: {error}") from None


def read_rows(path: Path) -> Results[SamplingRow]:
    """Read a file of sampling rows, as of `bench.store.lines.read_lines`."""
    return read_lines(path, SamplingRow.from_json)


class RowsWriter(LinesWriter[SamplingRow]):
    """Appends rows to a file of sampling rows, as of `bench.store.lines.LinesWriter`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SamplingRow.from_json)


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
    ratio: MedianInterval | None = None


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
            ratio = MedianInterval.of(theirs / ours for ours, theirs in zip(row.seconds, peer.seconds, strict=True))
        found.append(Comparison(row=row, peer=peer.case.label, ratio=ratio))
    return found


def _turns(row: SamplingRow) -> tuple[object, ...]:
    """What rows have in common that were measured in turns."""
    return row.run, row.case.setting, machine(row)
