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

Schema 3 (2026-11) calls the option that says which implementation runs by one name in every family, ``backend``:

========================= ==========================================================================================
field                     in a row that was written as schema 1 or 2
========================= ==========================================================================================
case.options.backend      was ``recurrence`` (DiG), ``attention`` (DiT, Flash-DiT) or ``mixer`` (DiS)
case.source               empty: every family was this project's own
look                      None: figures know the looks of this project's families
========================= ==========================================================================================

Schema 4 (2026-11) tells more ways of running a step apart:

========================= ==========================================================================================
field                     in a row that was written as schema 1 to 3
========================= ==========================================================================================
case.scope                ``model`` where the execution is ``compile``: the whole model was compiled; else empty
case.max_autotune         false
case.weights              ``fp32``
checks.operation_error,
.operation_bound,
.recheck_error            None: only a small input was compared, and nothing after the timed steps
========================= ==========================================================================================

Schema 5 (2026-11) knows several GPUs:

========================= ==========================================================================================
field                     in a row that was written as schema 1 to 4
========================= ==========================================================================================
case.processes            1
case.parallel             empty
placement, scaling        None: a run had one GPU, and every model one process
========================= ==========================================================================================

Schema 6 (2026-11) knows how several GPUs send:

========================= ==========================================================================================
field                     in a row that was written as schema 1 to 5
========================= ==========================================================================================
case.sending              ``collectives`` of several processes; else empty
========================= ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA = 6
FORMER_BACKEND = {"DiG": "recurrence", "DiT": "attention", "Flash-DiT": "attention", "DiS": "mixer"}
"""Family → what ``backend`` was called until schema 2, and in sampling rows and training runs of that time."""


def rename_backend(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options, with the backend by its present name; those of today are left as they are."""
    former = FORMER_BACKEND.get(model.rpartition("-")[0])
    return {"backend" if name == former else name: value for name, value in options.items()}


def _from_1(record: dict[str, Any]) -> dict[str, Any]:
    case = record.get("case")
    watched = record.get("status") != "ok" or (isinstance(case, dict) and case.get("device") == "cpu")
    return {"launch": 0, "key": "", "marks": [] if watched else ["unwatched"], **record}


def _from_2(record: dict[str, Any]) -> dict[str, Any]:
    case = record.get("case")
    if not isinstance(case, dict) or not isinstance(case.get("options"), dict):
        return record  # No row; whoever decodes it says so.
    return {**record, "case": {**case, "options": rename_backend(str(case.get("model")), case["options"])}}


def _from_3(record: dict[str, Any]) -> dict[str, Any]:
    case = record.get("case")
    if not isinstance(case, dict) or case.get("execution") != "compile":
        return record
    return {**record, "case": {**case, "scope": "model"}}


def _from_4(record: dict[str, Any]) -> dict[str, Any]:
    case = record.get("case")
    if isinstance(case, dict) and (alien := {"processes", "parallel"} & case.keys()):
        raise ValueError(f"a row of schema 4 has no field 'case.{min(alien)}'")
    return record


def _from_5(record: dict[str, Any]) -> dict[str, Any]:
    # What a case has where nothing is said is what such rows mean.
    case = record.get("case")
    if isinstance(case, dict) and "sending" in case:
        raise ValueError("a row of schema 5 has no field 'case.sending'")
    return record


_STEPS = {1: _from_1, 2: _from_2, 3: _from_3, 4: _from_4, 5: _from_5}
_NEW_IN = {
    2: frozenset({"launch", "key", "marks", "timing", "clocks", "checks"}),
    3: frozenset({"look"}),
    5: frozenset({"placement", "scaling"}),
}
"""Version → the fields that it brought."""


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
    later = frozenset().union(*(names for schema, names in _NEW_IN.items() if schema > version))
    if alien := later & fields.keys():
        raise ValueError(f"a row of schema {version} has no field {min(alien)!r}")
    while version < SCHEMA:
        fields = _STEPS[version](fields)
        version += 1
    return fields
