"""Where something was measured or trained: commit, versions, device. No torch here, so that a harness asks at once."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from dig.nvml import Gpu
from dig.packages import DISTRIBUTIONS

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "DIG_COMMIT"
"""Names the commit (``<hash>`` or ``<hash>-dirty``) where the code runs without its .git folder."""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> dict[str, Any]:
    if given := os.environ.get(COMMIT_VARIABLE):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    # Only code counts: a results file being written does not make the measured code another.
    changed = _git("status", "--porcelain", "--", "*.py", "pyproject.toml")
    return {"commit": commit, "dirty": bool(changed)}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux: platform knows a name too, if a shorter one.
    return platform.processor() or platform.machine()


def gpu_present() -> bool:
    """Say whether NVML finds an NVIDIA GPU, without starting CUDA in this process."""
    return Gpu.open() is not None


def describe_environment() -> dict[str, Any]:
    """What the ``environment`` of a row or a run holds; a key is None or absent where there is nothing to say."""
    gpu = Gpu.open()
    return {
        **_commit(),
        **(gpu.describe() if gpu is not None else {}),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "packages": {name: version for name in sorted(DISTRIBUTIONS.values()) if (version := _version(name))},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
