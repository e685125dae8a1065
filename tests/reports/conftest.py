from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from bench.cases.case import Case
from bench.store.ledgers import Memory
from bench.store.rows import Row

GPU = {"gpu_name": "NVIDIA H100 80GB HBM3", "driver": "580.82", "torch": "2.11.0", "commit": "0123456789abcdef"}
CPU = {"cpu": "AMD EPYC 9654", "torch": "2.13.0"}
GIB = 2**30


def build_row(model: str = "DiG-S/2", resolution: int = 1024, ms: float | None = 10.0, **changes: Any) -> Row:
    """A row; ``ms`` is every sample, or the samples; ``gib`` its peak; a status other than ok leaves both out."""
    row_fields = {
        "status",
        "flops",
        "matmul_ceiling",
        "environment",
        "implementations",
        "started_at",
        "launch",
        "key",
        "marks",
        "look",
        "message",
    }
    gib = changes.pop("gib", 2.0)
    samples = changes.pop("samples_ms", (ms, ms, ms))
    row = {k: changes.pop(k) for k in list(changes) if k in row_fields}
    case = Case(model=model, resolution=resolution, **{"execution": "graph", **changes})
    if row.setdefault("status", "ok") == "ok":
        peak = int(gib * GIB)
        kind = "allocator_peak" if case.device == "cuda" else "process_peak"
        row |= {"samples_ms": samples, "memory": Memory(parameters=4 * 33_000_000, **{kind: peak})}
    row.setdefault("environment", GPU if case.device == "cuda" else CPU)
    row.setdefault("started_at", "2026-11-22T10:00:00Z")
    return Row(case=case, **row)


@pytest.fixture
def make_row() -> Callable[..., Row]:
    return build_row


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Iterable[Row], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(row.to_json() + "\n" for row in rows))
        return path

    return write
