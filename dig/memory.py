"""What a size needs, and what there is: asked before, because a process that the kernel kills says nothing."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

GIB = 2**30
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class TooLargeError(ValueError):
    """More memory or disk is needed than there is; the message has both figures."""


def available_memory(device: str) -> int:
    """Bytes that a process could still get: of a GPU what is free, of a host what is free or can be freed."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        found.append(1024 * int(fields["MemAvailable"][0]))
    except (OSError, KeyError, ValueError, IndexError):
        pass  # Not Linux: then all that is built in.
    for path in _CGROUP_LIMITS:
        try:
            found.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # No such limit, or "max".
    return min(found)


def peak_memory(device: str) -> int:
    """Bytes that this process has had at most: of a GPU allocated by PyTorch, of a host resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        # Linux' ru_maxrss is never less than what the process had that started this one.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Bytes on macOS.


def check_memory(needs: Mapping[str, int], *, device: str, advice: str, estimate: bool = False) -> None:
    """Raise `TooLargeError` where the needs together are more than there is.

    Args:
        needs: What for, to bytes: a lower bound each.
        device: Where, ``cuda`` or ``cpu``.
        advice: What would need less.
        estimate: Whether they are no bounds, but what it is likely to be.
    """
    there, total = available_memory(device), sum(needs.values())
    if total > there:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in needs.items() if size)
        where = "the host's memory" if device == "cpu" else "the GPU's memory"
        least = "about" if estimate else "at least"
        raise TooLargeError(f"{least} {_gib(total)} are needed ({parts}) of {where}, {_gib(there)} are free: {advice}")


def check_disk(folder: Path, needed: int, what: str, advice: str) -> None:
    """Raise `TooLargeError` where the disk of a folder that exists has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TooLargeError(f"{what} need {_gib(needed)} in {folder}, where {_gib(free)} are free: {advice}")


def in_bytes(size: int) -> str:
    """A size for people, in KiB, MiB or GiB."""
    if size < 2**20:
        return f"{size / 2**10:,.3g} KiB"
    return f"{size / 2**20:,.3g} MiB" if size < GIB else _gib(size)


def _gib(size: int) -> str:
    return f"{size / GIB:,.3g} GiB"
