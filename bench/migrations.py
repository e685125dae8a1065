"""Older result rows, brought to the present schema one version at a time. Files are never rewritten. No torch here.

Schema 2 (2026-11) adds to schema 1, and changes the meaning of no field:

========================= ==========================================================================================
field                     in a row that was written as schema 1
========================= ==========================================================================================
launch                    0: schema 1 has one process launch a case
key                       empty: the code's content was not recorded, so a resumed run measures the case again
marks                     empty, with ``unwatched`` for a GPU's times: nobody read clocks or looked for other processes
timing, clocks, checks    None: not recorded
memory.gradients,
.optimizer, .activations,
.context                  None: not recorded
========================= ==========================================================================================
"""

from __future__ import annotations

from typing import Any

SCHEMA = 2


def _from_1(record: dict[str, Any]) -> dict[str, Any]:
    case = record.get("case")
    watched = record.get("status") != "ok" or (isinstance(case, dict) and case.get("device") == "cpu")
    return {"launch": 0, "key": "", "marks": [] if watched else ["unwatched"], **record}


_STEPS = {1: _from_1}
_NEW_IN_2 = frozenset({"launch", "key", "marks", "timing", "clocks", "checks"})


def to_present(record: dict[str, Any]) -> dict[str, Any]:
    """A row's record as the present schema has it, without its version.

    Raises:
        ValueError: It has no version, or one that this project does not know; the message says what to do.
    """
    if "schema" not in record:
        raise ValueError("not a result row: it has no schema version")
    version = record["schema"]
    fields = {name: value for name, value in record.items() if name != "schema"}
    if type(version) is not int or version < 1:
        raise ValueError(f"schema {version!r:.80} is no version of a result row")
    if version > SCHEMA:
        raise ValueError(
            f"schema {version} is newer than the one this version reads ({SCHEMA}); update the project to read the file"
        )
    if version < 2 and (alien := _NEW_IN_2 & fields.keys()):
        raise ValueError(f"a row of schema {version} has no field {min(alien)!r}")
    while version < SCHEMA:
        fields = _STEPS[version](fields)
        version += 1
    return fields
