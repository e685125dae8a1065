"""Results as a flat table: parquet or CSV, a line per row, a column per field. No torch here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from bench.store.files import write_file
from bench.store.migrations import SCHEMA
from bench.store.rows import Row
from bench.store.selection import newest
from bench.store.sheets import harmless

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
    """Write rows as ``parquet`` (samples kept as lists) or ``csv`` (samples left out: a cell holds one value).

    In CSV a text that begins as a formula does has a single quote before it (`bench.store.sheets`).
    """
    frame = to_frame(rows)
    content: str | bytes
    if format == "parquet":
        content = _of_one_kind(frame).to_parquet(None, index=False)
    elif format == "csv":
        content = _harmless(frame.drop(columns="samples_ms")).to_csv(index=False)
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)


def _harmless(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame without a text that a spreadsheet would take for a formula; its columns have names of their own."""
    for name in [name for name in frame.columns if not is_numeric_dtype(frame[name])]:
        frame[name] = pd.Series([harmless(value) for value in frame[name]], index=frame.index, dtype=object)
    return frame


def _of_one_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with JSON in the columns whose cells are of several kinds: an environment may hold anything."""
    for name in [name for name in frame.columns if frame[name].dtype == object and name != "samples_ms"]:
        cells = [value for value in frame[name] if value is not None and value == value]
        kinds = {float if type(value) is int else type(value) for value in cells}
        if len(kinds) > 1 or kinds & {dict, list, tuple}:
            texts = [None if value is None or value != value else json.dumps(value) for value in frame[name]]
            frame[name] = texts
    return frame
