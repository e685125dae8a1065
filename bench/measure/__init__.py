"""What runs in the worker of a case: step, timing, memory, clocks. With `bench.parity` it is in a row's code hash.

The package can be called: ``bench.measure(model)`` is `bench.run.once.measure`, for whoever measures from Python.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    """A module that is a function too. What it calls lies above this room, and is imported when it is called."""

    def __call__(self, *what: Any, **options: Any) -> Any:
        return import_module("bench.run.once").measure(*what, **options)


sys.modules[__name__].__class__ = _Called
