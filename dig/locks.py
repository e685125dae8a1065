"""One process at a time at an output, however a process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


class LockedError(ValueError):
    """Another process is at work there; the message says so."""


def lock_file(path: Path, message: str) -> IO[bytes]:
    """Keep other processes out until the file is closed, or this process gone, however it ends.

    Args:
        path: A file of nothing but this use; made if it is not there, and left there.
        message: Of the error.

    Returns:
        The open file.

    Raises:
        LockedError: Another process holds it.
        OSError: It can't be opened. A link is not followed: what it points at is not a lock.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LockedError(message) from None
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def only_process(path: Path, message: str) -> Iterator[None]:
    """`lock_file` for a block, by a file that is gone afterwards (a kill leaves it, which does no harm)."""
    while True:
        file = lock_file(path, message)
        # Between opening and locking, the process before may have removed the file: then it is another's now.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False)):
                break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
