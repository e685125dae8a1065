"""Who may encode into a folder at once: the ranks of one job, each of them once, and nobody else."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
    with lock_file(folder / f".lock-{rank}-of-{world_size}", busy), _shared(folder / ".lock", world_size) as shared:
        # Waits while the first one writes.
        fcntl.flock(shared, fcntl.LOCK_SH)
        theirs = os.pread(shared.fileno(), 20, 0).decode("ascii", "replace")
        if theirs != str(world_size):
            raise LockedError(f"another job, of {theirs} ranks, is encoding into {folder}; wait for it")
        yield


def _shared(path: Path, world_size: int) -> IO[bytes]:
    """The lock of the folder, with the number of ranks in it if this process is the first one there."""
    try:
        file = lock_file(path, "")
    except LockedError:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    file.truncate(0)
    os.pwrite(file.fileno(), str(world_size).encode(), 0)
    return file
