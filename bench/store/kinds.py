"""What a record is that is no row of a step: the other kinds that this project writes, and what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BY_KIND = {
    "sampling": "a row of sampling; python -m reports.sampling reads it",
    "profile": "a row of bench profile; python -m reports.page reads it",
    "op": "a row of bench ops compare, which judges its rows itself",
}
"""Of records that say of which kind they are."""
BY_FIELDS = (
    ({"fits", "peak"}, "a probe of bench capacity; python -m reports.page reads it"),
    ({"experiment", "arm", "seed"}, "a run of examples/ablation.py; python -m reports.ablation reads it"),
    ({"implementation"}, "a line of bench ops, which no command reads"),
    ({"case", "device"}, "a line of bench ops, which no command reads"),
    ({"step", "loss"}, "a line of a training log; python -m reports.fashion reads those of runs"),
)
"""Of records without a schema, by fields that they have and no other."""


def other_kind(record: Mapping[str, Any]) -> str:
    """What a record is, and what reads it; empty where it may be a row of a step, or is unknown."""
    if "kind" in record:
        kind = record["kind"]
        return BY_KIND.get(kind, "") if isinstance(kind, str) else ""
    if "schema" in record:
        return ""
    return next((said for fields, said in BY_FIELDS if fields <= record.keys()), "")
