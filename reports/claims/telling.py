"""Findings for people: lines for a terminal, Markdown for a page, JSON for what draws one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from bench.messages import cell, visible
from reports.cells import MISSING
from reports.claims.finding import VERDICTS, Finding

AGAIN = (
    "`python -m bench run` appends rows to out/results.jsonl; `python -m reports.claims out/results.jsonl` tests the "
    "claims on them."
)
MANY = {"holds": "hold", "holds in part": "hold in part", "does not hold": "do not hold"}
"""Of several; of what was not measured the words are the same."""


def counted(findings: Sequence[Finding]) -> str:
    """``100 claims: 68 hold, 1 holds in part, ...``, as one line."""
    counts = Counter(finding.verdict for finding in findings)
    said = [f"{counts[one]} {one if counts[one] == 1 else MANY.get(one, one)}" for one in VERDICTS if counts[one]]
    return f"{len(findings)} claim{'' if len(findings) == 1 else 's'}: {', '.join(said)}"


def _interval(finding: Finding) -> str:
    if finding.interval is None:
        return ""
    low, high = (f"{end:.4g}" for end in finding.interval)
    return f"[{low}, {high}]" if low != high else ""


def to_text(findings: Sequence[Finding]) -> str:
    """Four lines a claim, by source."""
    lines = [counted(findings), AGAIN.replace("`", "")]
    source = ""
    for finding in findings:
        if finding.source != source:
            source = finding.source
            lines += ["", source]
        lines += [f"  {finding.verdict.upper()}: {finding.said}  ({finding.id})"]
        if finding.measured:
            lines.append(f"    measured: {finding.measured} {_interval(finding)}".rstrip())
        lines += [f"    {note}" for note in finding.notes]
        lines.append(f"    $ {finding.steps}")
    return "\n".join(map(visible, lines))


def to_markdown(findings: Sequence[Finding]) -> str:
    """A table, then notes and commands by id."""
    lines = [
        "# Claims",
        "",
        f"{counted(findings)}. {AGAIN} docs/method.md says how intervals are taken.",
        "",
        "| claim | said | measured | interval | verdict |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for each in findings:
        measured = cell(each.measured) or MISSING
        interval = cell(_interval(each)) or MISSING
        lines.append(f"| {cell(each.id)} | {cell(each.said)} | {measured} | {interval} | {each.verdict} |")
    lines += ["", "## What measures them, and where they are from"]
    for each in findings:
        lines += ["", f"- {cell(each.id)} ({cell(each.source)}): `{each.steps.replace('`', '')}`"]
        lines += [f"  - these rows alone: `{each.again.replace('`', '')}`"] if each.again else []
        lines += [f"  - {cell(note)}" for note in each.notes]
    return "\n".join(lines) + "\n"


def to_json(findings: Sequence[Finding]) -> str:
    """A list of records."""
    return json.dumps([finding.record() for finding in findings], ensure_ascii=False, indent=1) + "\n"
