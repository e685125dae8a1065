"""Who may encode into a folder at once: the ranks of one job, each of them once, and nobody else."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dig.locks import LockedError, lock_file


@contextmanager
def sharing(folder: Path, rank: int, world_size: int) -> Iterator[None]:
    """Hold a folder as one rank of a job, however the process ends.

    All ranks of a job share the lock of the folder, whose file holds their number; the first one there writes it. Each
    has a lock of its own beside it.

    Raises:
        LockedError: The folder is held by a job of another size, or by another process of this rank.
    """
    busy = f"another process is encoding into {folder}; wait for it, or choose another folder"
    own = lock_file(folder / f".lock-{rank}-of-{world_size}", busy)
    try:
        path = folder / ".lock"
        try:
            shared = lock_file(path, busy)
        except LockedError:
            shared = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        else:
            os.ftruncate(shared, 0)
            os.pwrite(shared, str(world_size).encode(), 0)
        try:
            # Waits while the first one writes.
            fcntl.flock(shared, fcntl.LOCK_SH)
            theirs = os.pread(shared, 20, 0).decode("ascii", "replace")
            if theirs != str(world_size):
                raise LockedError(f"another job, of {theirs} ranks, is encoding into {folder}; wait for it")
            yield
        finally:
            os.close(shared)
    finally:
        os.close(own)
