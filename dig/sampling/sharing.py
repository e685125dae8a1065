"""What a job's processes share out: each makes some of what is missing, and one puts it together. Here: one alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Sharing:
    """One process alone. `dig.training.parallel.sharing.SharedWork` is several.

    Attributes:
        rank: Of this process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process opens what all write into, and puts it together."""
        return self.rank == 0

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """This process' share: a run of neighbours, which may have a model's batch in common."""
        return work[len(work) * self.rank // self.size : len(work) * (self.rank + 1) // self.size]

    def from_leader(self, ask: Callable[[], T]) -> T:
        """What asking gives, asked by the process that leads; the others wait for it."""
        return ask()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError unless all processes name the same facts of what is to be made."""

    def sees(self, folder: Path) -> None:
        """Raise ValueError unless all processes write into one folder, which is there."""

    def begins(self, what: str) -> None:
        """Say what begins, to whoever watches."""

    def meet(self) -> None:
        """Return once all processes have come here."""


ALONE = Sharing()
