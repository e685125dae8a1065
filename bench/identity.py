"""The content address of a measurement: case, code and environment. No torch here.

A resumed run leaves a case alone only where its file has a row with the same address. What was measured with other
code, other versions or under other circumstances (threads, CPUs, limits, variables that change what runs) is another
measurement, whatever its commit was called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.environment import CIRCUMSTANCES
from bench.jobs import Budget
from bench.results import Case

FOLDERS = ("dig", "baselines")
MEASURING = (
    "flops", "gate", "jobs", "kernels", "memory", "models", "nvml", "preload", "statistics", "steps", "timing",
    "worker",
)  # fmt: skip
"""Modules of ``bench`` whose change can change a number; the command line's cannot."""

VERSIONS = ("gpu_name", "driver", "torch", "triton", "packages", "python", "cpu")
"""Keys of `bench.environment.describe_environment` that count, beside its `CIRCUMSTANCES`. Two cards of one name are
one environment."""


def code_hash(root: Path) -> str:
    """SHA-256 over names and contents of the source files that a measurement runs, in a checkout."""
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    files += [path for name in MEASURING if (path := root / "bench" / f"{name}.py").exists()]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def measurement_key(case: Case, *, code: str, environment: Mapping[str, Any], budget: Budget) -> str:
    """The address of a case measured with some code, somewhere, for so long: 32 hexadecimal digits.

    Args:
        case: What is measured.
        code: By `code_hash`.
        environment: By `bench.environment.describe_environment`.
        budget: How long it is sampled.
    """
    content = {
        "case": dataclasses.asdict(case),
        "code": code,
        "environment": {name: environment.get(name) for name in (*VERSIONS, *CIRCUMSTANCES)},
        "budget": dataclasses.asdict(budget),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
