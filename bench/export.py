"""Results as a flat table: parquet or CSV, a line per row, a column per field. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.migrations import SCHEMA
from bench.results import Row
from bench.selection import newest

FORMATS = ("parquet", "csv")


def to_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a frame. Nested fields are named with dots; options and environment keep one column per name."""
    counted = {id(row) for row in newest(rows).rows}
    return pd.json_normalize([_flat(row, id(row) in counted) for row in rows], max_level=3)


def _flat(row: Row, is_newest: bool) -> dict[str, Any]:
    record = dataclasses.asdict(row)
    record["case"]["options"] = dict(row.case.options)
    # None where a part is absent would be a column of its own beside those of its fields.
    record = {name: value for name, value in record.items() if value is not None}
    record["marks"] = " ".join(row.marks)
    if row.checks is not None:
        record["checks"]["kernels"] = " ".join(row.checks.kernels)
    derived = {"median_ms": row.median_ms, "fps": row.fps, "ceiling_share": row.ceiling_share}
    return {"schema": SCHEMA, **record, **derived, "samples": len(row.samples_ms), "newest": is_newest}


def export_rows(rows: Sequence[Row], path: Path, format: str) -> None:
    """Write rows as ``parquet`` (samples kept as lists) or ``csv`` (samples left out: a cell holds one value)."""
    frame = to_frame(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "parquet":
        frame.to_parquet(path, index=False)
    elif format == "csv":
        frame.drop(columns="samples_ms").to_csv(path, index=False)
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
