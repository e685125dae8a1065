"""Tab. 1: parameters and multiply-adds, counted from the models. That takes torch, which no other claim does."""

from __future__ import annotations

import shlex
from functools import cache

from bench.inspect.counts import Counts, count
from dig.family import FamilyError, UnknownModelError
from dig.registry import find_family
from reports.claims.errors import ClaimError
from reports.claims.finding import Finding, about, together
from reports.claims.spec import Count

MEBI = 2**20
UNITS = {"parameters": "× 2^20", "paper gmac": "GMAC", "gmac": "GMAC", "paper share": "%", "share": "%"}


@cache
def counts_of(name: str, options: str = "") -> Counts:
    """A model's counts.

    Args:
        name: ``DiG-S/4``.
        options: As in a case, ``fla:variant=release``.

    Raises:
        ClaimError: No such model.
        ImportError: torch is not installed.
    """
    try:
        family = find_family(name.rpartition("-")[0])
        return count(name, family.read_words([word for word in options.split(":") if word]))
    except (UnknownModelError, FamilyError) as error:
        raise ClaimError(f"{name}: {error}") from None


def _figure(claim: Count, index: int) -> float:
    own = counts_of(claim.models[index], claim.options)
    macs = own.paper_macs if claim.what.startswith("paper") else own.macs
    if claim.what == "parameters":
        return own.parameters / MEBI
    if macs is None:
        raise ClaimError(f"{claim.id}: the paper counts DiG alone, not {claim.models[index]}")
    return 100 * macs / counts_of(claim.peers[index]).macs if claim.peers else macs / 1e9


def judge_count(claim: Count) -> Finding:
    """The verdict on counts: each of them within so many percent of what is said.

    Raises:
        ClaimError: No such model.
    """
    command = claim.command or shlex.join(
        ["python", "-m", "bench", "list", *dict.fromkeys(name.partition("/")[0] for name in claim.models + claim.peers)]
    )
    try:
        found = [_figure(claim, index) for index in range(len(claim.models))]
    except ImportError:
        return Finding(
            id=claim.id,
            source=claim.source,
            said=claim.said,
            verdict="not measured",
            command=command,
            notes=("models are counted with torch, which is not installed here",),
        )
    verdicts = [about(x, x, text, claim.within) for x, text in zip(found, claim.values, strict=True)]
    return Finding(
        id=claim.id,
        source=claim.source,
        said=claim.said,
        verdict=together(verdicts),
        measured=f"{', '.join(map(_to_digits, found, claim.values))} {UNITS[claim.what]}",
        command=command,
        notes=(f"{', '.join(claim.models)}; each may be {claim.within:g}% off",),
    )


def _to_digits(value: float, said: str) -> str:
    """To a digit more than was said, so that it can be held against that."""
    return f"{value:.{len(said.partition('.')[2]) + 1}f}"
