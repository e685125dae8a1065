"""Whether values are of the types that a dataclass announces, wherever they come from: a file, or somebody's code."""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
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


def whole_number(name: str, value: Any) -> int:
    """An argument that is a whole number, NumPy's and torch's too, as Python's.

    Raises:
        TypeError: It is something else; the message names the argument.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError):  # torch's error of a tensor of several is a ValueError
        raise TypeError(f"{name} must be a whole number; got {value!r:.80}") from None


def real_number(name: str, value: Any) -> float:
    """An argument that is a number, NumPy's and torch's too, as Python's. Raises TypeError on anything else."""
    try:
        if isinstance(value, bool | str | bytes | None) or not (isinstance(value, Real) or hasattr(value, "item")):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a number; got {value!r:.80}") from None


def check_word(name: str, value: Any) -> None:
    """Raise TypeError unless an argument is a text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text; got {value!r:.80}")


def expected(hint: Any) -> str:
    """What an annotated type takes, in words: ``a whole number``."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not type(None)]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(expected, parts)))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple, frozenset):
        return f"a list of {_SEVERAL.get(parts[0], 'values')}"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    Path: "a text in quotes",
}
_SEVERAL: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts in quotes"}
