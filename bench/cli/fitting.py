"""One line where a case that a command runs in its own process does not fit in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.cases.case import Case
from bench.messages import refuse


@contextlib.contextmanager
def fitting(case: Case) -> Iterator[None]:
    """End the command with one line where a case that it runs in its own process does not fit in memory."""
    try:
        yield
    except Exception as error:
        from bench.measure.failures import failure

        status, message = failure(error)
        if status != "oom":
            raise
        refuse(f"{case.describe()} does not fit in memory; choose a smaller --batch or --resolution ({message:.200})")
