"""How a case is compiled: the model that is timed, and its operation when that is checked alone."""

from __future__ import annotations

from typing import Any

BACKEND = "inductor"
AUTOTUNE = "max-autotune-no-cudagraphs"
"""Inductor's mode: the graph is the benchmark's own."""


def compile_options(*, max_autotune: bool) -> dict[str, Any]:
    """Arguments of `torch.compile`."""
    return {"backend": BACKEND, **({"mode": AUTOTUNE} if max_autotune else {})}
