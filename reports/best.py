"""Every family at its best: which rows do the same work, and which way of a family is the fastest or the leanest.

Rows of one `Task` differ in the family and in how it is run only. Any row with times may be its family's best; marks
are shown beside it and exclude nothing, as in the other tables. What failed, a parity check say, is never the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bench.cases.case import Case, Device, Mode
from bench.store.rows import Row
from bench.store.selection import machine
from dig.family import BACKEND
from reports.series import (
    ATTENTION_FAMILIES,
    FAMILIES,
    MODE_NAMES,
    MODES,
    PRECISION_NAMES,
    STATUS_NAMES,
    Sweep,
    bar_ms,
    size_rank,
)

ATTENTION_NAMES: Mapping[str, str] = {
    "sdpa-cudnn": "cuDNN",
    "sdpa-flash": "SDPA flash",
    "flash-attn": "FA2",
    "flash-attn-3": "FA3",
    "flash-attn-4": "FA4",
    "flash-attn-4-padded": "FA4 padded",
}
"""Flash-DiT's backends, in short."""

PARITY = "parity:"
"""How the message of a row begins that computed something else than its reference."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """A column: a family, or one of DiG's two sets of kernels."""

    family: str
    backend: str = ""

    @classmethod
    def of(cls, case: Case) -> Role | None:
        """The case's; None for a DiG on neither this project's kernels nor the published ones."""
        backend = dict(case.options).get(BACKEND, "")
        if case.family != OURS.family:
            return cls(family=case.family)
        return next((role for role in (OURS, PUBLISHED) if role.backend == backend), None)

    @property
    def rank(self) -> tuple[int, str]:
        """Sort key: DiG on this project's kernels, Flash-DiT, published DiG, DiT, DiS, others by name."""
        return (_ORDER.index(self), "") if self in _ORDER else (len(_ORDER), self.family)


OURS = Role(family="DiG", backend="triton")
PUBLISHED = Role(family="DiG", backend="fla")
ATTENTION = tuple(Role(family=family) for family in ATTENTION_FAMILIES)
NOT_ROLES = ("model", "resolution", "batch", "precision", "lead", "attention ways")
"""What the other columns are called."""
_ORDER = (OURS, ATTENTION[0], PUBLISHED, *(Role(family=family) for family in FAMILIES[2:]))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done, by whatever family and in whatever way."""

    device: Device
    machine: str
    mode: Mode
    size: str
    patch: int
    resolution: int
    batch: int
    precision: str

    @classmethod
    def of(cls, row: Row) -> Task:
        """The task that a row did."""
        case = row.case
        return cls(
            device=case.device,
            machine=machine(row),
            mode=case.mode,
            size=case.size,
            patch=case.patch,
            resolution=case.resolution,
            batch=case.batch,
            precision=case.precision,
        )

    @property
    def rank(self) -> tuple[int, str, tuple[int, str], int, int, int]:
        """Sort key: training first, then by precision, size, patch, batch and resolution."""
        return (
            MODES.index(self.mode), self.precision, size_rank(self.size), self.patch, self.batch, self.resolution,
        )  # fmt: skip

    def describe(self) -> str:
        """``S/2 training step at 1024, batch 1, bf16``."""
        return (
            f"{self.size}/{self.patch} {MODE_NAMES[self.mode]} at {self.resolution}, batch {self.batch}, "
            f"{PRECISION_NAMES[self.precision]}"
        )


@dataclass(frozen=True, kw_only=True)
class Lead:
    """How many times as much the best attention takes as DiG on this project's kernels: above 1, DiG is ahead.

    Attributes:
        ours: DiG's row.
        peer: The attention model's.
        value: The ratio.
        low: It, from the low end of the peer's bar and the high end of DiG's (`reports.series.bar_ms`).
        high: From the other ends.
    """

    ours: Row
    peer: Row
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A task and everything that was measured of it."""

    task: Task
    rows: Mapping[Role, tuple[Row, ...]]

    def best(self, figure: Callable[[Row], float | None], *roles: Role) -> Row | None:
        """The row of these roles with the least figure, of equal ones the first; None where none has one."""
        found = [(value, row) for role in roles for row in self.rows.get(role, ()) if (value := figure(row))]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def lead(self, figure: Callable[[Row], float | None]) -> Lead | None:
        """DiG's lead over the best attention by a figure, `time` or `memory`; None where either side has none."""
        ours, peer = self.best(figure, OURS), self.best(figure, *ATTENTION)
        if ours is None or peer is None:
            return None
        value = (figure(peer) or 0) / (figure(ours) or 1)
        if figure is not time:
            return Lead(ours=ours, peer=peer, value=value, low=value, high=value)
        (fast, slow), (peer_fast, peer_slow) = bar_ms(ours), bar_ms(peer)
        return Lead(ours=ours, peer=peer, value=value, low=peer_fast / slow, high=peer_slow / fast)


def time(row: Row) -> float | None:
    """Median milliseconds; None where it has no times."""
    return row.median_ms if row.status == "ok" else None


def memory(row: Row) -> float | None:
    """Peak in bytes; None where it has no times or the peak is not known."""
    return row.memory.peak if row.status == "ok" and row.memory is not None else None


def failure(row: Row) -> str:
    """Why a row has no times, in a word: ``OOM``, ``timeout``, ``parity``, ``error``."""
    return "parity" if row.message.startswith(PARITY) else STATUS_NAMES[row.status]


def contests(rows: Iterable[Row]) -> list[Contest]:
    """The tasks of which some way compiles, in order; others were not measured at anybody's best."""
    found: dict[Task, dict[Role, list[Row]]] = {}
    for row in rows:
        if (role := Role.of(row.case)) is not None:
            found.setdefault(Task.of(row), {}).setdefault(role, []).append(row)
    return [
        Contest(task=task, rows={role: tuple(own) for role, own in found[task].items()})
        for task in sorted(found, key=lambda task: task.rank)
        if any(row.case.compiles for own in found[task].values() for row in own)
    ]


class Ways:
    """What ways are called: ``FA4, compiled by block, graph``; options that all rows of a role share go unsaid.

    Args:
        sweep: Names the families.
        found: What is shown together.

    Attributes:
        roles: Those that have rows, in order.
    """

    def __init__(self, sweep: Sweep, found: Iterable[Contest]) -> None:
        options: dict[Role, list[set[tuple[str, str]]]] = {}
        for contest in found:
            for role, rows in contest.rows.items():
                options.setdefault(role, []).extend(set(row.case.options) for row in rows)
        self.roles = sorted(options, key=lambda role: role.rank)
        self._shared = {role: set.intersection(*each) for role, each in options.items()}
        self._columns: dict[Role, str] = {}
        for role in self.roles:
            label = sweep.looks.label(role.family)
            label = f"{label} ({role.backend})" if role.backend else label
            # A family may call itself anything, another's name too; columns need a name of their own all the same.
            while label in (*self._columns.values(), *NOT_ROLES):
                label += "'"
            self._columns[role] = label

    def column(self, role: Role) -> str:
        """``DiG (triton)``, ``Flash-DiT``; every role's own."""
        return self._columns[role]

    def kernels(self, row: Row) -> str:
        """What tells the row's options from others of its role: ``FA4``; often nothing. Attention is always named."""
        role = Role.of(row.case)
        words = []
        for option, value in row.case.options:
            if option == BACKEND and role == ATTENTION[0]:
                words.append(ATTENTION_NAMES.get(value, value))
            elif role is None or (option, value) not in self._shared[role]:
                words.append(value if option == BACKEND else f"{option}={value}")
        return ", ".join(words)

    def way(self, row: Row) -> str:
        """Kernels and execution: ``FA4, compiled by block, graph``."""
        kernels, executed = self.kernels(row), execution(row.case)
        return f"{kernels}, {executed}" if kernels else executed

    def full(self, row: Row) -> str:
        """With the family: ``Flash-DiT: FA4, compiled by block, graph``."""
        role = Role.of(row.case)
        return f"{self.column(role) if role is not None else row.case.family}: {self.way(row)}"


def execution(case: Case) -> str:
    """``compiled by block, graph``; ``graph``; ``eager``."""
    words = [f"compiled by {case.scope}"] if case.compiles else []
    words += ["max-autotune"] if case.max_autotune else []
    words += ["graph"] if case.captures else []
    return ", ".join(words) or "eager"
