"""What a claim compares, in the harness's notation: one case, the best of several, or a case at every resolution."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.cases.case import Case, Device
from bench.cases.choices import read_case
from bench.store.rows import Row
from dig.registry import parse_family

BEST = "best "
EVERY = "@*"
NOTATION = "[best ]MODEL[:OPTIONS]@RESOLUTION[:MODE]...; @* is every resolution"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A case, or a set of which the fastest counts.

    Attributes:
        case: It, or what all of the set have in common; its resolution says nothing where it is of every one.
        options: Those that were named; a case of a set may have others beside them.
        best: Whether it is a set: every way of running the model in this mode, batch and precision.
        every: Whether it is of every resolution.
    """

    case: Case
    options: tuple[tuple[str, str], ...]
    best: bool = False
    every: bool = False

    @classmethod
    def parse(cls, text: str, device: Device = "cuda") -> Subject:
        """``DiG-S/2:fla@1792:train``, ``best Flash-DiT-XL/2@2048:forward:bf16-weights``, ``DiT-S/2@*:train``.

        Args:
            text: As above.
            device: Where it ran.

        Raises:
            ValueError: It names none.
        """
        rest = text.strip()
        best = rest.startswith(BEST)
        rest = rest.removeprefix(BEST)
        every = re.search(r"@\*(?=:|$)", rest) is not None
        model = rest.rpartition("@")[0]
        case = read_case(re.sub(r"@\*(?=:|$)", "@256", rest), device=device)
        _, _, named = parse_family(model, sized=True)
        return cls(case=case, options=tuple(sorted(named.items())), best=best, every=every)

    def at(self, resolution: int) -> Subject:
        """It at one resolution."""
        return replace(self, case=replace(self.case, resolution=resolution), every=False)

    def has(self, row: Row) -> bool:
        """Whether a row is of it, at whatever resolution where it is of every one."""
        case, own = row.case, self.case
        if self.every:
            own = replace(own, resolution=case.resolution)
        if not self.best:
            return case == own
        return set(self.options) <= set(case.options) and all(
            getattr(case, name) == getattr(own, name)
            for name in ("model", "resolution", "batch", "mode", "precision", "device", "processes")
        )

    def of(self, rows: Iterable[Row]) -> list[Row]:
        """Its rows."""
        return [row for row in rows if self.has(row)]

    @property
    def name(self) -> str:
        """For people: ``the best Flash-DiT-S/2``, ``DiG-S/2 (fla)``."""
        words = ", ".join(value for _, value in self.options)
        return f"{'the best ' if self.best else ''}{self.case.model}{f' ({words})' if words else ''}"
