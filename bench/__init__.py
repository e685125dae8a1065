"""The benchmark: models by name, cases, measuring, results. ``bench.measure(model)`` measures from Python."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Import `bench.measure` when it is asked for; it can be called."""
    if name == "measure":
        return import_module("bench.measure")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
