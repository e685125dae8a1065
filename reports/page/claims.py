"""Claims and what became of them, as ``reports.claims`` writes them: said, measured, interval, verdict, command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.store.decoding import decode_dataclass, parse_json
from bench.store.files import read_file
from bench.store.lines import ResultError
from reports.claims.finding import VERDICTS, both
from reports.claims.telling import MANY


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    Attributes:
        id: Its name.
        source: Who makes it, where.
        said: What was said.
        measured: What was measured; empty where nothing was.
        interval: Ends of the measured value's interval; None without one.
        verdict: ``holds``, ``fails``, ``open``, say.
        command: What measures it again.
        judging: What judges what that measured; empty where nobody said.
        again: What gives this verdict once more, from the rows that it is of; likewise.
        notes: What else to know.
    """

    id: str
    source: str = ""
    said: str = ""
    measured: str = ""
    interval: tuple[float, ...] | None = None
    verdict: str = ""
    command: str = ""
    judging: str = ""
    again: str = ""
    notes: str = ""

    @property
    def steps(self) -> str:
        """What measures it and judges it, as one line for a shell."""
        return both(self.command, self.judging)

    @property
    def group(self) -> str:
        """Who makes it, without the place; nobody of the paper's, which stand first: ``""``."""
        who = self.source.partition(",")[0].partition(":")[0].strip()
        return "" if "paper" in who.lower() else who

    @property
    def tone(self) -> str:
        """How the verdict looks: ``good``, ``bad`` or ``open``."""
        words = self.verdict.lower().replace("-", " ").split()
        if "part" in words or {"told", "apart"} <= set(words):
            return "open"
        if not words or {"not", "no", "fails", "failed", "false", "refuted", "wrong"} & set(words):
            measured = "measured" in words or not words
            return "open" if measured else "bad"
        return "good" if {"holds", "held", "true", "yes", "supported", "confirmed"} & set(words) else "open"


def read_claims(path: Path) -> tuple[Claim, ...]:
    """Read a JSON list of claims.

    Raises:
        ResultError: It cannot be read, or is no such list; the message says which entry is wrong.
    """
    try:
        content = read_file(path).decode()
        found = parse_json(content)
        if isinstance(found, dict):
            found = found.get("claims")
        if not isinstance(found, list):
            raise ValueError("expected a list of claims")
        claims = tuple(decode_dataclass(Claim, _words(each), f"claim {i}") for i, each in enumerate(found, 1))
        for i, claim in enumerate(claims, 1):
            if not claim.said.strip():
                raise ValueError(f"claim {i} says nothing: give what is claimed as said")
        return claims
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path}: not a file of claims: {error}") from None


def _words(claim: Any) -> Any:
    """Numbers where words are expected, and null, as words; what a page has no place for is left out."""
    if not isinstance(claim, dict):
        return claim
    known = {field.name for field in fields(Claim)} - {"interval"}
    words = {
        name: "" if value is None else f"{value:g}" if isinstance(value, int | float) else value
        for name, value in claim.items()
        if name in known
    }
    interval = claim.get("interval")
    # What is the same in every launch, as a peak is, has none: its ends are the value itself.
    same = isinstance(interval, list) and len(interval) == 2 and interval[0] == interval[1]
    return {**words, "interval": None if same else interval}


def counted(claims: Sequence[Claim]) -> str:
    """How many have which verdict, in the words of ``reports.claims``; empty without claims."""
    counts = Counter(claim.verdict or "not measured" for claim in claims)
    named = [f"{counts[one]} {one if counts[one] == 1 else MANY.get(one, one)}" for one in VERDICTS if counts[one]]
    # Somebody's own words are any text, which a sentence has no place for.
    others = sum(count for verdict, count in counts.items() if verdict not in VERDICTS)
    said = ", ".join([*named, *([f"{others} with another verdict"] if others else [])])
    return f"{len(claims)} claim{'' if len(claims) == 1 else 's'}: {said}." if claims else ""
