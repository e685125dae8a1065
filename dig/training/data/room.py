"""Whether there is room: what is going to be held or written is counted first, and refused in words."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int:
    """Bytes of RAM that a process can have now: the machine's, or its container's limit."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):
        available = min(available, int(_LIMIT.read_text()))
    return available


def require_memory(needed: int, purpose: str, advice: str) -> None:
    """Raise ValueError where more bytes are needed than there are; ``advice`` says what to do.

    ``needed`` is a lower bound: passing says that the attempt is not absurd.
    """
    available = available_memory()
    if needed > available:
        raise ValueError(f"{purpose} needs {size(needed)} of memory, and {size(available)} are free; {advice}")


def require_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raise ValueError where more bytes are needed than the disk of an existing folder has free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{purpose} takes {size(needed)} in {folder}, and {size(free)} are free there; choose another place"
        )


def size(count: int) -> str:
    """``3.2 GiB``, or MiB below one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
