"""An operation alone, as a model calls it: what is measured, where that can be, and its rows. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, get_args

from bench.cases.case import MOST_COUNT, Device, Dtype, Mode
from bench.cases.jobs import Budget
from bench.store.decoding import decode_dataclass, of_kind, require
from bench.store.lines import ResultError
from bench.store.rows import LEAST_MS, MOST_MS, Mark, Status, check_environment
from dig.registry import parse_name
from dig.spec import check_resolution

SCHEMA = 1
KIND = "op"
"""Tells these rows from those of whole steps and of sampling."""

BOTH, GPU_ONLY = ("reference", "triton"), ("triton",)
IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = {
    "gla": BOTH,
    "srem": BOTH,
    "adaln": BOTH,
    "swiglu": BOTH,
    "products": GPU_ONLY,
    "condition": GPU_ONLY,
    "weights": GPU_ONLY,
    "modulation": BOTH,
}
"""Operation → how it can be computed. ``triton`` is what DiG:triton calls: the recurrence with gates and norms (gla),
SREM's convolution (srem), the gated residual with its norm (adaln), SwiGLU alone (swiglu) and in its matrix products
(products), the condition of a few images, a block's weights made ready for the products, and adaLN's linear layer
(modulation).
"""
FORWARD_ONLY = frozenset({"condition"})
"""Without a backward pass: what only inference calls."""


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """What is measured.

    Attributes:
        op: A key of `IMPLEMENTATIONS`.
        implementation: One of its values: ``triton`` or ``reference``.
        model: The DiG whose widths it has: ``DiG-S/2``; the heads are those of the release variant.
        resolution: Side of the square image in pixels.
        batch: Images.
        mode: ``train`` (forward and backward pass) or ``forward``.
        dtype: ``bf16`` or ``fp32``.
        device: ``cuda`` or ``cpu``.
    """

    op: str
    implementation: str
    model: str
    resolution: int
    batch: int = 1
    mode: Mode
    dtype: Dtype
    device: Device

    def __post_init__(self) -> None:
        """Raise ValueError on what cannot be measured; the message says what can."""
        for name, known in (("op", IMPLEMENTATIONS), ("mode", get_args(Mode)), ("dtype", get_args(Dtype))):
            value = getattr(self, name)
            require(value in known, f"{name} must be one of {', '.join(known)}; got {value!r:.80}")
        known = IMPLEMENTATIONS[self.op]
        if self.device == "cpu" and known == GPU_ONLY:
            raise ValueError(f"{self.op} has no implementation for a CPU; it needs an NVIDIA GPU")
        require(self.implementation in known, f"{self.op} has no {self.implementation!r}; it has {', '.join(known)}")
        if self.device == "cpu" and self.implementation == "triton":
            raise ValueError(f"{self.op}: triton runs on a GPU only, reference on both")
        if self.mode == "train" and self.op in FORWARD_ONLY:
            raise ValueError(f"{self.op} has no backward pass, for training does not call it; use --mode forward")
        for name in ("batch", "resolution"):
            value = getattr(self, name)
            require(1 <= value <= MOST_COUNT, f"{name} must be a whole number from 1 to {MOST_COUNT}; got {value}")
        family, _, patch = parse_name(self.model)
        require(family.name == "DiG", f"these are DiG's operations; {self.model} is none")
        check_resolution(self.resolution, patch)

    @property
    def size(self) -> str:
        """``S`` of ``DiG-S/2``."""
        return parse_name(self.model)[1]

    @property
    def side(self) -> int:
        """Tokens along a side of the image."""
        return self.resolution // 8 // parse_name(self.model)[2]

    def describe(self) -> str:
        """One line for people: ``gla (triton) of DiG-S/2 1792px train bf16 batch 1 on cuda``."""
        return (
            f"{self.op} ({self.implementation}) of {self.model} {self.resolution}px {self.mode} {self.dtype} "
            f"batch {self.batch} on {self.device}"
        )


@dataclass(frozen=True, kw_only=True)
class OpJob:
    """Measure an operation; the answer is a row as JSON."""

    case: OpCase
    budget: Budget
    environment: Mapping[str, Any]
    launch: int = 0


@dataclass(frozen=True, kw_only=True)
class OpRow:
    """One launch of an operation and what came of it, as far as comparing two sides goes.

    Attributes:
        case: What was measured.
        status: ``ok``, or why there are no times.
        message: Of a failure.
        samples_ms: Milliseconds of one call, in order; each is a mean over calls on different inputs.
        launch: Which process launch of its case, from 0.
        marks: Reasons to doubt the times, as of `bench.store.rows.Mark`.
        environment: Commit, versions and device.
        started_at: ISO 8601, UTC.
    """

    case: OpCase
    status: Status
    started_at: str
    message: str = ""
    samples_ms: tuple[float, ...] = ()
    launch: int = 0
    marks: tuple[Mark, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError where status and samples contradict each other."""
        require(self.status in get_args(Status), f"status must be one of {', '.join(get_args(Status))}")
        require((self.status == "ok") == bool(self.samples_ms), "samples_ms must be there exactly if status is ok")
        good = all(math.isfinite(x) and LEAST_MS <= x <= MOST_MS for x in self.samples_ms)
        require(good, "samples_ms must lie between 1 ns and 31 years")
        require(self.launch >= 0, f"launch must not be negative; got {self.launch}")
        check_environment(self.environment)

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds a call."""
        return median(self.samples_ms) if self.samples_ms else None

    @property
    def key(self) -> str:
        """Empty: these rows are compared where they were measured, and no run is resumed from them."""
        return ""

    @property
    def memory(self) -> None:
        """Not measured: what an operation takes shows in the step's."""

    @property
    def checks(self) -> None:
        """None: operations have tests that compare them with their references."""

    def to_json(self) -> str:
        """One line of JSON, without its newline."""
        content = {"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(content, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> OpRow:
        """Read a line that `to_json` wrote. Raises ResultError on anything else."""
        try:
            record, _ = of_kind(line, KIND, SCHEMA)
            return decode_dataclass(cls, record, "row")
        except ValueError as error:
            raise ResultError(f"not a row of an operation: {error}") from None
