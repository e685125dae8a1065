"""How the reports' commands refuse a file that is not what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.messages import refuse


@contextmanager
def refusing(*errors: type[Exception], folder: Path, hint: str = "") -> Iterator[None]:
    """End with exit status 2 and one message on these errors, and where something in ``folder`` can't be written.

    Args:
        *errors: Whose messages say what is wrong and what to do.
        folder: Named where the system doesn't say which file it was.
        hint: What to do about a file that cannot be written.
    """
    try:
        yield
    except errors as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"cannot write {error.filename or folder}: {error.strerror}{hint}")
