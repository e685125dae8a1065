"""The content address of a measurement: case, code and environment. No torch here.

A resumed run leaves a case alone only where its file has a row with the same address. What was measured with other
code, other versions or under other circumstances (threads, CPUs, limits, variables that change what runs) is another
measurement, whatever its commit was called.

The code has two parts. The harness and ``dig``, which every model stands on, are in every row's address (`code_hash`).
A family's own files, with those of the family that it is compared with, are in its rows' addresses alone
(`family_hash`): who changes one model measures that model again, and not the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.cases.case import Case
from bench.cases.jobs import Budget
from dig.environment import CIRCUMSTANCES
from dig.family import Family
from dig.packages import DISTRIBUTIONS
from dig.registry import find_family, load_source
from dig.source_files import MODELS, digest_of, family_files, sources_of

MEASURING = (MODELS, "bench/measure", "bench/parity")
"""Folders whose change can change a number; that of the command line, the runner and the judge cannot."""

VERSIONS = ("gpu_name", "driver", "torch", "triton", "packages", "python", "cpu")
"""Keys of `dig.environment.describe_environment` that count, beside its `CIRCUMSTANCES`. Two cards of one name are
one environment."""


def code_hash(root: Path) -> str:
    """SHA-256 over names and contents of the source files that every measurement runs, in a checkout."""
    return digest_of(entry for folder in MEASURING for entry in sources_of(root / folder, root))


def _package_versions(family: Family) -> dict[str, str | None]:
    """Versions of the packages that a family needs, but for those that `describe_environment` has."""
    versions: dict[str, str | None] = {}
    for module in {module for modules in family.packages.values() for module in modules} - DISTRIBUTIONS.keys():
        try:
            versions[module] = metadata.version(module)
        except metadata.PackageNotFoundError:
            versions[module] = None  # Not installed, or by another name than it is imported by.
    return versions


def family_hash(case: Case) -> str:
    """SHA-256 over the source files of a case's family and of its reference's, and the versions of what they need.

    They are read once in a process, as they are when it first asks.
    """
    return _family_hash(case.family, case.source)


@functools.cache
def _family_hash(name: str, source: str) -> str:
    load_source(source)
    family = find_family(name)
    peer = family.reference.partition(":")[0] if family.reference is not None else family.name
    both = {one.name: one for one in (family, find_family(peer))}
    content = {
        name: [digest_of(family_files(one)), sorted(_package_versions(one).items())]
        for name, one in sorted(both.items())
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def measurement_key(case: Case, *, code: str, environment: Mapping[str, Any], budget: Budget) -> str:
    """The address of a case measured with some code, somewhere, for so long: 32 hexadecimal digits.

    Args:
        case: What is measured. Its family's files are read.
        code: By `code_hash`.
        environment: By `dig.environment.describe_environment`.
        budget: How long it is sampled.
    """
    content = {
        "case": dataclasses.asdict(case),
        "code": code,
        "family": family_hash(case),
        "environment": {name: environment.get(name) for name in (*VERSIONS, *CIRCUMSTANCES)},
        "budget": dataclasses.asdict(budget),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
