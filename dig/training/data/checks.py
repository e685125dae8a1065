"""Values as they come from a file: JSON gives any type for any of them."""

from __future__ import annotations

import math
import re
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_whole(name: str, value: Any, *, least: int) -> None:
    """Raise ValueError unless it is a whole number from ``least`` to 2^62; true and false are none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}; got {_short(value)}")
    if value > 2**62:
        raise ValueError(f"{name} must be at most 2^62")


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless it is a number above ``low`` and at most ``high``, and finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low < value <= high or math.isinf(value):
        raise ValueError(f"{name} must be a finite number above {low:g} and at most {high:g}; got {_short(value)}")


def check_names(name: str, value: Any) -> None:
    """Raise ValueError unless it is a tuple of at least one name, all different."""
    if not isinstance(value, tuple) or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"{name} must be names; got {_short(value)}")
    if not value or len(set(value)) < len(value):
        raise ValueError(f"{name} must be at least one, and different; got {_short(value)}")


def check_shape(name: str, value: Any) -> None:
    """Raise ValueError unless it is a tuple of three sizes."""
    if not isinstance(value, tuple) or len(value) != 3:
        raise ValueError(f"{name} must be channels, rows and columns; got {_short(value)}")
    for size in value:
        check_whole(name, size, least=1)


def check_sha256(name: str, value: Any) -> None:
    """Raise ValueError unless it is a SHA-256 in hexadecimal."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{name} must be 64 hexadecimal digits; got {_short(value)}")


def _short(value: Any) -> str:
    return repr(value)[:60]
