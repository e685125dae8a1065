"""Operations that are imported when they are first called: the packages around them do without Triton until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dig.packages import require

P = ParamSpec("P")
R = TypeVar("R")


def from_triton(load: Callable[[], Callable[P, R]]) -> Callable[P, R]:
    """An operation whose import waits for its first call: ``load`` imports and returns it.

    ``load`` imports by a plain statement: torch.compile traces that, but no import by a module's name.

    Raises:
        MissingPackageError: Triton is not installed; when called.
    """

    def operation(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            function = load()
        except ImportError:
            require("triton", "implementation 'triton'")
            raise
        return function(*arguments, **options)

    return operation
