"""One process at a time at an output, however a process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LockedError(ValueError):
    """Another process is at work there; the message says so."""


def lock_file(path: Path, message: str) -> int:
    """Keep other processes out until the descriptor is closed, or this process gone, however it ends.

    Args:
        path: A file of nothing but this use; made if it is not there, and left there.
        message: Of the error.

    Returns:
        The open descriptor.

    Raises:
        LockedError: Another process holds it.
        OSError: It can't be opened. A link is not followed: what it points at is not a lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LockedError(message) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def only_process(path: Path, message: str) -> Iterator[None]:
    """`lock_file` for a block, by a file that is gone afterwards (a kill leaves it, which does no harm)."""
    while True:
        descriptor = lock_file(path, message)
        # Between opening and locking, the process before may have removed the file: then it is another's now.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
