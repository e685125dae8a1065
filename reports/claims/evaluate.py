"""Every claim's verdict."""

from __future__ import annotations

from dataclasses import replace

from reports.ablation_runs import RUNS
from reports.claims.commands import MEASURED, from_root, judging
from reports.claims.counts import judge_count
from reports.claims.curves import judge_crossover, judge_exponent
from reports.claims.finding import Finding
from reports.claims.ratios import judge_ratio
from reports.claims.readme import Section
from reports.claims.rows import Files
from reports.claims.runs import judge_order
from reports.claims.spec import CLAIMS, Claim, Claims, Count, Crossover, Exponent, Order, Ratio, names_of


def judge(claim: Claim, files: Files, readme: Section) -> Finding:
    """The verdict on a claim of whatever kind.

    Raises:
        ClaimError: README doesn't say what it is said to, or there is no such model.
        ResultError: A file cannot be read.
    """
    match claim:
        case Ratio():
            return judge_ratio(claim, files, readme)
        case Count():
            return judge_count(claim)
        case Order():
            return judge_order(claim, files)
        case Crossover():
            return judge_crossover(claim, files, readme)
        case Exponent():
            return judge_exponent(claim, files)
    raise TypeError(type(claim).__name__)


def judge_all(claims: Claims, files: Files, readme: Section) -> list[Finding]:
    """Of all, those of one source together, in their order, each with the commands that judge it.

    Raises:
        ClaimError: README doesn't say what it is said to, or there is no such model.
        ResultError: A file cannot be read.
    """
    sources = list(dict.fromkeys(claim.source for claim in claims.claims))
    ordered = sorted(claims.claims, key=lambda claim: sources.index(claim.source))
    options = [] if claims.path == CLAIMS else ["--claims", from_root(claims.path)]
    return [_with_judging(claim, judge(claim, files, readme), files, options) for claim in ordered]


def _with_judging(claim: Claim, finding: Finding, files: Files, options: list[str]) -> Finding:
    # A claim's own command may write anywhere.
    own = bool(getattr(claim, "command", ""))
    if isinstance(claim, Count):
        # Models are counted anew each time: there are no rows in between.
        return replace(finding, judging="" if own else judging(claim.id, options=options))
    rows = files.read_for(*names_of(claim), runs=isinstance(claim, Order))
    measured = RUNS if isinstance(claim, Order) else MEASURED
    return replace(
        finding,
        judging="" if own else judging(claim.id, [measured], options),
        again=judging(claim.id, map(from_root, rows), options) if rows else "",
    )
