"""What a case raised, as a row says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.cases.jobs import CaseJob
from bench.store.rows import Row, Status
from dig.packages import MissingPackageError

_FULL = (
    "out of memory", "can't allocate memory", "alloc_failed",
    # More than any address: torch's words, and NumPy's.
    "size calculation overflow", "integer multiplication overflow", "array is too big", "maximum allowed dimension",
)  # fmt: skip


def failure(error: BaseException) -> tuple[Status, str]:
    """A row's status and message for what a case raised."""
    if isinstance(error, MissingPackageError):
        return "unsupported", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "oom", str(error).split("\n")[0]
    if isinstance(error, MemoryError):
        return "oom", str(error) or "out of host memory"
    text = f"{type(error).__name__}: {error}"
    # cuDNN, cuBLAS and the CPU allocator report a full memory as a plain RuntimeError.
    return "oom" if any(words in text.lower() for words in _FULL) else "error", text


def failed_row(job: CaseJob, status: Status, message: str, *, started_at: str, environment: Mapping[str, Any]) -> Row:
    """The row of a case that has no figures."""
    return Row(
        case=job.case,
        status=status,
        started_at=started_at,
        message=message,
        environment=environment,
        launch=job.launch,
        key=job.key,
    )
