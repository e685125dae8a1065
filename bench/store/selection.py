"""Which rows of a results file count: the newest measurement of every case on every machine. No torch here.

Every reader asks here, so that a comparison, a table and a figure of one file show the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bench.store.identity import VERSIONS
from bench.store.ledgers import Checks, Memory
from dig.environment import CIRCUMSTANCES

_BESIDE_THE_GPU = {"card": "gpu_uuid", "host processor": "cpu"}
"""What may differ between two machines whose GPUs have one name: cards by a few percent, hosts in what is eager."""


class Subject(Protocol):
    """What was measured: a case of whatever kind, which says all that changes the number and can be a dict's key."""

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""

    def describe(self) -> str:
        """One line for people."""


class Placed(Protocol):
    """A row of whatever kind, as far as saying where it was measured goes."""

    @property
    def case(self) -> Subject:
        """What was measured."""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Commit, versions and device, by `dig.environment`."""


class Measured(Placed, Protocol):
    """A row of one launch of a case, as far as choosing and comparing rows goes; `bench.store.rows.Row` is one."""

    @property
    def status(self) -> str:
        """``ok``, or why there is no time."""

    @property
    def message(self) -> str:
        """Of a failure."""

    @property
    def started_at(self) -> str:
        """ISO 8601, UTC."""

    @property
    def key(self) -> str:
        """Content address of what was measured."""

    @property
    def launch(self) -> int:
        """Which process launch of its case, from 0."""

    @property
    def marks(self) -> Sequence[str]:
        """Reasons to doubt the times."""

    @property
    def median_ms(self) -> float | None:
        """Median milliseconds."""

    @property
    def memory(self) -> Memory | None:
        """The ledger, where there is one."""

    @property
    def checks(self) -> Checks | None:
        """What was checked, where anything was."""


M = TypeVar("M", bound=Measured)


def machine(row: Placed) -> str:
    """Name of the GPU, or of the processor where the case ran on the CPU."""
    if row.case.device == "cuda":
        return str(row.environment.get("gpu_name") or "unnamed GPU")
    return str(row.environment.get("cpu") or "unnamed processor")


@dataclass(frozen=True, kw_only=True)
class Newest(Generic[M]):
    """The rows that count, in the order of the file, and how many do not.

    Attributes:
        rows: Of every case on every machine the launches of its newest measurement, each launch's last row.
        older: Rows of other code, versions, circumstances or budget (`Row.key`) than the newest of their case there.
        repeated: Rows whose launch was measured again since.
    """

    rows: tuple[M, ...]
    older: int
    repeated: int

    def describe(self) -> str:
        """What was left out, as a line; empty where nothing was."""
        parts = [f"{self.older} of older code, versions or circumstances"] if self.older else []
        parts += [f"{self.repeated} of launches that were measured again since"] if self.repeated else []
        return f"rows left out: {', '.join(parts)}" if parts else ""


def newest(rows: Iterable[M]) -> Newest[M]:
    """Choose the rows that count. What was measured last is newest: its key is the one that counts.

    Of the same moment it is what was appended last. Files may have been put together in any order.
    """
    given = sorted(rows, key=lambda row: row.started_at)
    keys = {(row.case, machine(row)): row.key for row in given}
    current = [row for row in given if row.key == keys[row.case, machine(row)]]
    last = {(row.case, machine(row), row.launch): row for row in current}
    chosen = {id(row) for row in last.values()}
    return Newest(
        rows=tuple(row for row in current if id(row) in chosen),
        older=len(given) - len(current),
        repeated=len(current) - len(last),
    )


def by_case_and_machine(rows: Iterable[M]) -> dict[Subject, dict[str, list[M]]]:
    """Rows by case and machine, each in the order they came, launches by number."""
    found: dict[Subject, dict[str, list[M]]] = {}
    for row in rows:
        found.setdefault(row.case, {}).setdefault(machine(row), []).append(row)
    for machines in found.values():
        for launches in machines.values():
            launches.sort(key=lambda row: row.launch)
    return found


def differences(sides: Sequence[tuple[str, Iterable[Placed]]]) -> list[str]:
    """A line for everything that was recorded of the sides' environments and is not the same in all their rows.

    Args:
        sides: Name and rows of each.
    """
    found = [(name, [_described(row) for row in rows]) for name, rows in sides]
    described = [row for _, rows in found for row in rows]
    lines = []
    for key in dict.fromkeys(key for row in described for key in row):
        # What a row does not speak of may have been anything; of a mapping that it has, an absent name is none.
        group = key.partition(" ")[0]
        values = [
            (side, dict.fromkeys(row.get(key, "none") for row in rows if key in row or group in row))
            for side, rows in found
        ]
        if len({value for _, own in values for value in own}) > 1:
            lines.append(f"{key}: " + "; ".join(f"{' and '.join(own)} in {side}" for side, own in values if own))
    return lines


def _described(row: Placed) -> dict[str, str]:
    """What may differ between two rows' environments, by name; of a mapping, its name alone says that it is there."""
    environment = row.environment
    found = {"machine": machine(row)}
    if row.case.device == "cuda":
        found |= {key: str(environment[name]) for key, name in _BESIDE_THE_GPU.items() if environment.get(name)}
    if environment.get("commit"):
        dirty = " with uncommitted changes" if environment.get("dirty") else ""
        found["commit"] = f"{str(environment['commit'])[:12]}{dirty}"
    for name in (*VERSIONS, *CIRCUMSTANCES, "cuda", "cudnn", "threads"):
        value = environment.get(name)
        if isinstance(value, Mapping):
            group = name.removesuffix("s")
            found |= {group: "", **{f"{group} {key}": str(inner) for key, inner in sorted(value.items())}}
        elif value is not None and name not in ("gpu_name", "cpu"):
            found[name] = str(value)
    return found
