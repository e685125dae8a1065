"""What tests of the harness share: a small case, the shortest measuring, and the processes that one began."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.cases.case import Case
from bench.cases.jobs import Budget, Limits

QUICK = Budget(settle_s=0.0, settle_max_s=0.0, least_s=0.0, min_samples=2, target_s=0.0, max_samples=2)
TWO_MINUTES = Limits(prepare=120, measure=120)


def small(model: str = "DiT-S/8", **changes: Any) -> Case:
    """A case of a fraction of a second on a CPU."""
    return Case(**{"model": model, "resolution": 64, "mode": "forward", "dtype": "fp32", "device": "cpu", **changes})


def children(process_id: int) -> set[int]:
    """Process ids of all descendants (Linux)."""
    found, queue = set(), [process_id]
    while queue:
        parent = queue.pop()
        with suppress(FileNotFoundError, ProcessLookupError):  # It, or a thread of it, has ended meanwhile.
            for task in Path(f"/proc/{parent}/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):
                    fresh = {int(word) for word in (task / "children").read_text().split()} - found
                    found |= fresh
                    queue += fresh
    return found


def alive(process_id: int) -> bool:
    """Whether a process runs still (Linux)."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
