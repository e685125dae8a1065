"""Operations that are imported when they are first called: the packages around them do without Triton until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from dig.packages import require

P = ParamSpec("P")
R = TypeVar("R")


def from_triton(load: Callable[[], Callable[P, R]]) -> Callable[P, R]:
    """The operation that ``load`` imports and returns, as an operation that imports it when it is called.

    The import stands in ``load`` as a plain statement, for torch.compile traces that, but no search for a module by its
    name.

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
