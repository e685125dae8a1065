"""Whether values are of the types that a dataclass announces, wherever they come from: a file, or somebody's code."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

INTEGERS = 2**63
"""Whole numbers are below this, as torch and numpy count."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a list is a tuple, as in JSON, and a number finite."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(hints) and all(map(fits, value, hints))
    if origin is frozenset:
        return isinstance(value, frozenset | set) and all(fits(one, parts[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(a, parts[0]) and fits(b, parts[1]) for a, b in value.items())
    if origin is Callable:
        return callable(value)
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return number and abs(value) < (INTEGERS if isinstance(value, int) else math.inf)
    return isinstance(value, hint)
