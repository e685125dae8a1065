"""Launches whose tensors are told by name: parts of others, and the same ones given to several launches.

A plan (`dig.raster_plan`) makes them once for the dtypes, shapes and the device that they are always started with.
"""

from __future__ import annotations

from dig.ops.launch import Launch

Place = tuple[str, int]
"""By its name, which of the tensors that a launch is given, and the first of its elements."""

_WHOLE = 64


def whole(elements: int) -> int:
    """As many, up to a multiple of 64: at which a part of a tensor begins, so that none is aligned worse than alone."""
    return -(-elements // _WHOLE) * _WHOLE


def placed(launch: Launch, given: str, *taken: str | Place) -> Launch:
    """A launch whose tensors, in order, are those ``taken`` of the ones that it is ``given``, whose names these are."""
    names = given.split()
    places = [(each, 0) if isinstance(each, str) else each for each in taken]
    return launch.settled(tuple((names.index(name), first) for name, first in places))


def moved(launch: Launch, given: str, *tensors: str | Place) -> Launch:
    """A launch of parts of some tensors, where each of these now begins in one of those that it is ``given``."""
    begins = [(each, 0) if isinstance(each, str) else each for each in tensors]
    taken = [(begins[which][0], begins[which][1] + first) for which, first in launch.parts or ()]
    return placed(launch, given, *taken)
