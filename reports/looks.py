"""How families look in figures: as they declare in the registry or their rows, else by colours chosen to differ.

Families of this project and of installed packages are asked for their looks. A family that was measured by its import
path is not known here: its rows bring the look. What a look leaves out, or a family without one, is chosen here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from bench.store.rows import Row
from dig.family import BACKEND, Look
from dig.registry import families
from reports import layout
from reports.layout import Style

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

_MORE = {
    "Flash-DiT": Look(
        colors=("#0072B2", "#56B4E9", "#1F3F77", "#9DB7D5", "#00A8C6", "#5B6FD6"),
        markers="shdHPs",
        dashes=(
            (0, (4, 1.6)), (0, (2, 1.2)), (0, (3, 1, 1, 1)), (0, (6, 1.2)), (0, (5, 1, 1.5, 1)), (0, (2, 1, 2, 3)),
        ),
    ),
}  # fmt: skip
"""Of families with more backends than their declaration has colours. They stand here because what is declared decides
on numbers: a row whose family's files have changed is measured again."""
_PLACES = {"DiG": ("triton", "reference", "fla")}
"""Backends in the order of the look's colours: this project's kernels have the first, the published ones the lightest.
Of other families the one that is taken on a GPU comes first, then the others as declared."""

Options = tuple[tuple[str, str], ...]


class Looks:
    """The looks of the families of a report.

    Args:
        rows: Measured rows, whose families may say how they look.
        series: Family and options of whatever else is shown with them, as often as it is: series of one backend differ.
    """

    def __init__(self, rows: Iterable[Row] = (), series: Iterable[tuple[str, Options]] = ()) -> None:
        given = list(rows)
        self._said = {row.case.family: row.look for row in given if row.look is not None}
        self._strangers: list[str] = []
        self._series: dict[tuple[str, str], list[Options]] = {}
        counts = Counter([*series, *((row.case.family, row.case.options) for row in given)])
        # What is shown most often is the main line of its backend.
        for family, options in sorted(counts, key=lambda each: (-counts[each], each)):
            self._turn(family, options)

    def _turn(self, family: str, options: Options) -> int:
        """Which of the series of its backend this is."""
        own = self._series.setdefault((family, dict(options).get(BACKEND, "")), [])
        if options not in own:
            own.append(options)
        return own.index(options)

    def place(self, family: str, options: Options) -> tuple[int, int]:
        """Where a series stands among those of its family: by its backend, then among those of the same one."""
        known = families().get(family)
        backends = known.backends if known is not None else ()
        places = _PLACES.get(family) or tuple(
            sorted(backends, key=lambda word: known is not None and word != known.default_backend("cuda"))
        )
        backend = dict(options).get(BACKEND) or (places[0] if places else "")
        place = places.index(backend) if backend in places else len(places)
        return (place if backends else 0), self._turn(family, options)

    def of(self, family: str, options: Options) -> Style:
        """The look of a series: a backend's colour is the same in every figure, whatever else is shown there.

        Series of one backend share the colour and differ in marker, dashes and fill.
        """
        place, turn = self.place(family, options)
        first = self.style(family, place)
        if not turn:
            return first
        other = self.style(family, place + turn)
        return replace(other, color=first.color, width=layout.PLAIN_WIDTH, hollow=not first.hollow)

    def _own(self, family: str) -> Look:
        known = families().get(family)
        return (known.look if known is not None else None) or self._said.get(family) or Look()

    def label(self, family: str) -> str:
        """What the family is called in figures and tables."""
        return self._own(family).label or family

    def style(self, family: str, variant: int) -> Style:
        """The look of the ``variant``-th series of a family, counted from 0; the same whenever it is asked for."""
        look = _MORE.get(family) or self._own(family)
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
        return layout.style(look, variant)
