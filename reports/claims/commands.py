"""The commands that measure a claim's cases again, and that judge it from rows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cases.case import Case
from bench.cases.suites import PAPER_RESOLUTIONS
from bench.messages import visible
from dig.environment import ROOT
from dig.family import BACKEND
from reports.claims.subject import Subject

ATTENTION = ("Flash-DiT:sdpa-cudnn", "Flash-DiT:flash-attn-4")
"""What a set of Flash-DiT's ways is measured by, where no row says which was the best."""

MEASURED = "out/results.jsonl"
"""Where ``bench run`` leaves its rows, unless it is told otherwise."""


def judging(id: str, rows: Iterable[str] = (), options: Sequence[str] = ()) -> str:
    """``python -m reports.claims`` of one claim, to be run in the project's folder.

    Args:
        id: The claim's.
        rows: Results files as they are called there; of none those that are published.
        options: Others of the command.
    """
    return visible(shlex.join(["python", "-m", "reports.claims", *rows, *options, "--id", id]))


def from_root(path: Path) -> str:
    """How a file is called in the project's folder; one outside as it was named."""
    whole = Path(os.path.abspath(path))
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else str(path)


def _joined(values: Iterable[object]) -> str:
    return ",".join(dict.fromkeys(map(str, values)))


def _model(family: str, options: Iterable[tuple[str, str]]) -> str:
    named = dict(options)
    backend = named.pop(BACKEND, "")
    return ":".join([family, *([backend] if backend else []), *(f"{key}={word}" for key, word in named.items())])


def measuring(cases: Sequence[Case], *, resolutions: Sequence[int] = (), models: Sequence[str] = ()) -> str:
    """``python -m bench run`` of these cases, and of whatever else the same axes make.

    Args:
        cases: At least one; of one batch, patch, dtype and device.
        resolutions: In place of theirs.
        models: In place of theirs.
    """
    first = cases[0]
    executions = _joined(case.execution for case in cases)
    words = [
        "python", "-m", "bench", "run",
        "--models", _joined(models or (_model(case.source or case.family, case.options) for case in cases)),
        "--sizes", _joined(case.size for case in cases),
        "--resolutions", _joined(resolutions or sorted({case.resolution for case in cases})),
        "--modes", _joined(case.mode for case in cases),
        "--executions", executions,
    ]  # fmt: skip
    words += ["--patch", str(first.patch)] if first.patch != 2 else []
    words += ["--batch", str(first.batch)] if first.batch != 1 else []
    scope = next((case.scope for case in cases if case.scope not in ("", "block")), "")
    words += ["--compile-scope", scope] if scope else []
    words += ["--weights", _joined(case.weights for case in cases)] if first.weights != "fp32" else []
    words += ["--dtype", first.dtype] if first.dtype != "bf16" else []
    words += ["--max-autotune"] if any(case.max_autotune for case in cases) else []
    return visible(shlex.join(words))


def measuring_each(cases: Iterable[Case]) -> str:
    """`measuring`, a command for each way of compiling among the cases: one ``bench run`` compiles in one way.

    Cases that don't compile are in the first command.

    Args:
        cases: At least one; of one batch, patch, dtype and device.
    """
    listed = list(cases)
    ways = list(dict.fromkeys((case.scope, case.max_autotune) for case in listed if case.scope))
    groups: list[list[Case]] = [[] for _ in range(max(1, len(ways)))]
    for case in listed:
        groups[ways.index((case.scope, case.max_autotune)) if case.scope else 0].append(case)
    return " && ".join(map(measuring, groups))


def measuring_subjects(subjects: Sequence[Subject]) -> str:
    """The command for what has no rows: of a set, its usual ways, compiled and in a graph."""
    models: list[str] = []
    executions: list[str] = []
    for subject in subjects:
        own = [_model(subject.case.family, subject.options if subject.best else subject.case.options)]
        ways = subject.best and not subject.options and subject.case.family == "Flash-DiT"
        models += ATTENTION if ways else own
        executions += ["graph", "compiled-graph"] if subject.best else [subject.case.execution]
    every = any(subject.every for subject in subjects)
    text = measuring([s.case for s in subjects], resolutions=PAPER_RESOLUTIONS if every else (), models=models)
    return text.replace(
        f"--executions {_joined(subject.case.execution for subject in subjects)}", f"--executions {_joined(executions)}"
    )
