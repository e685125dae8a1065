"""How families look in figures: as they declare in the registry or their rows, else by colours chosen to differ.

Families of this project and of installed packages are asked for their looks. A family that was measured by its import
path is not known here: its rows bring the look. What a look leaves out, or a family without one, is chosen here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.store.rows import Row
from dig.family import Look
from dig.registry import families
from reports import drawing
from reports.drawing import Style

# Crosses are missing among the markers: a cross is a failure.
STRANGERS = (
    Look(
        colors=("#CC79A7", "#8E3B6B", "#E8B4D0"),
        markers="PHp",
        dashes=((0, (8, 2, 2, 2)), (0, (8, 2, 1, 2)), (0, (2, 4))),
    ),
    Look(
        colors=("#8C564B", "#5C3A2E", "#C49C94"),
        markers="d*8",
        dashes=((0, (10, 2)), (0, (10, 4)), (0, (1, 5))),
    ),
    Look(
        colors=("#7F7F00", "#4B4B00", "#BDBD5C"),
        markers="HPD",
        dashes=((0, (5, 1, 1, 1, 1, 1)), (0, (3, 5, 1, 5)), (0, (5, 5))),
    ),
)
"""Looks of families that say nothing of theirs, in the order in which they are asked for."""


class Looks:
    """The looks of the families of a report.

    Args:
        rows: Measured rows, whose families may say how they look.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._said = {row.case.family: row.look for row in rows if row.look is not None}
        self._strangers: list[str] = []

    def _own(self, family: str) -> Look:
        known = families().get(family)
        return (known.look if known is not None else None) or self._said.get(family) or Look()

    def label(self, family: str) -> str:
        """What the family is called in figures and tables."""
        return self._own(family).label or family

    def style(self, family: str, variant: int) -> Style:
        """The look of the ``variant``-th series of a family, counted from 0; the same whenever it is asked for."""
        look = self._own(family)
        if not (look.colors and look.markers and look.dashes):
            if family not in self._strangers:
                self._strangers.append(family)
            chosen = STRANGERS[self._strangers.index(family) % len(STRANGERS)]
            look = replace(
                look,
                colors=look.colors or chosen.colors,
                markers=look.markers or chosen.markers,
                dashes=look.dashes or chosen.dashes,
            )
        return drawing.style(look, variant)
