"""What was claimed: ``claims.toml``, read and checked. Cases are named as ``python -m bench regression --case`` does.

What a name leaves out may be anything: of ``Flash-DiT-S/2@1792:train`` the fastest row counts, whatever its attention
and execution.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from bench.cases.case import Case
from bench.store.files import read_file
from bench.store.lines import ResultError
from dig.family import BACKEND

Kind = Literal["ratio", "count", "order", "crossover"]
Figure = Literal["time", "memory"]
Form = Literal["times", "saving", "behind"]
Group = Literal["", "srem", "sizes", "tokens"]
ANY = "*"
FILE = Path(__file__).with_name("claims.toml")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The cases that a name means.

    Attributes:
        text: The name.
        model: Family, size and patch.
        options: Those that it names; others may be anything.
        resolution: Pixels; None for any.
        words: Mode, execution, scope, precision: each must be the case's.
        batch: Images.
    """

    text: str
    model: str
    options: Mapping[str, str]
    resolution: int | None
    words: frozenset[str]
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``DiG-S/2:fla:variant=release@1792:train:graph:batch=32``. Raises ValueError."""
        name, at, rest = text.rpartition("@")
        resolution, *words = rest.split(":")
        if not (at and name and (resolution.isdecimal() or resolution == ANY)):
            raise ValueError(f"a case is MODEL[:OPTIONS]@RESOLUTION[:WORDS], the resolution may be {ANY}; got {text!r}")
        model, *options = name.split(":")
        batches = [word.removeprefix("batch=") for word in words if word.startswith("batch=")]
        if len(batches) > 1 or not all(word.isdecimal() for word in batches):
            raise ValueError(f"batch must be one whole number; got {text!r}")
        pairs = [word.partition("=") for word in options]
        return cls(
            text=text,
            model=model,
            options={key if equals else BACKEND: value if equals else key for key, equals, value in pairs},
            resolution=None if resolution == ANY else int(resolution),
            words=frozenset(word for word in words if not word.startswith("batch=")),
            batch=int(batches[0]) if batches else 1,
        )

    def fits(self, case: Case) -> bool:
        """Whether it means this case."""
        known = {case.mode, case.execution, case.scope, case.precision}
        return (
            (case.model, case.batch) == (self.model, self.batch)
            and self.resolution in (None, case.resolution)
            and self.words <= known
            and case.processes == 1
            and all(dict(case.options).get(key) == value for key, value in self.options.items())
        )


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A claim as it was made.

    Attributes:
        id: Its name.
        source: Who makes it, where.
        said: In its words; of the README, as they stand there.
        kind: ``ratio`` compares two cases; ``count`` compares counts that tests recompute; ``order`` is of the
            ablation; ``crossover`` is the resolution from which on one model takes less time than another.
        of: The case that the claim is about.
        than: The one that it is compared with.
        figure: Of a ratio: ``time`` of a step or ``memory`` at its peak.
        form: ``times``, than over of; ``saving``, the share that ``of`` takes less; ``behind``, the share that it
            takes more.
        value: The least that was claimed. Of a ``quoted`` claim left out.
        quoted: The number as printed, which the rows must give to as many digits.
        rows: The file of rows that it is read from.
        beside: Another case for ``of``, whose number goes into the notes, with its name: ``NAME=CASE``.
        counts: Of a count: what was said and what is counted, by name.
        group: Of an order: which of `reports.ablation.orders`.
        notes: What else to know.
    """

    id: str
    source: str
    said: str
    kind: Kind
    of: str = ""
    than: str = ""
    figure: Figure = "time"
    form: Form = "times"
    value: float | None = None
    quoted: str = ""
    rows: str = "rows.jsonl"
    beside: str = ""
    counts: Mapping[str, Any] | None = None
    group: Group = ""
    notes: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError on what can't be tested."""
        for name, kinds in (("kind", Kind), ("figure", Figure), ("form", Form), ("group", Group)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(filter(None, get_args(kinds)))}")
        needs = {"ratio": ("of", "than"), "crossover": ("of", "than"), "count": ("counts",), "order": ("group",)}
        if missing := [name for name in needs[self.kind] if not getattr(self, name)]:
            raise ValueError(f"a claim of kind {self.kind} needs {missing[0]}")
        if self.kind == "ratio" and (self.value is None) == (not self.quoted):
            raise ValueError("a ratio has a value or is quoted")
        for text in filter(None, (self.of, self.than, self.beside.partition("=")[2])):
            if (Pattern.parse(text).resolution is None) != (self.kind == "crossover"):
                raise ValueError(f"a resolution stands in a ratio and {ANY} in a crossover; got {text!r}")


def read_statements(path: Path = FILE) -> list[Statement]:
    """All claims, in the order of the file.

    Raises:
        ResultError: It can't be read, or a claim is wrong; the message names it.
    """
    try:
        content = tomllib.loads(read_file(path).decode())
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ResultError(f"{path} is not TOML: {error}") from None
    claims = content.get("claim")
    if not isinstance(claims, list) or not claims:
        raise ResultError(f"{path} has no [[claim]]")
    found = [_statement(claim, f"{path}, claim {number}") for number, claim in enumerate(claims, 1)]
    twice = {one.id for one in found if sum(other.id == one.id for other in found) > 1}
    if twice:
        raise ResultError(f"{path}: two claims are called {min(twice)!r}")
    return found


def _statement(claim: Any, where: str) -> Statement:
    known, kinds = {field.name: field for field in fields(Statement)}, get_type_hints(Statement)
    if not isinstance(claim, dict):
        raise ResultError(f"{where}: not a table")
    where = f"{where} ({claim.get('id', 'without an id')})"
    if unknown := claim.keys() - known.keys():
        raise ResultError(f"{where}: unknown key {min(unknown)!r}; there are {', '.join(known)}")
    if missing := [name for name, one in known.items() if one.default is MISSING and name not in claim]:
        raise ResultError(f"{where}: {missing[0]} is missing")
    for name, value in claim.items():
        good = (
            isinstance(value, dict) if name == "counts"
            else isinstance(value, int | float) and not isinstance(value, bool) if name == "value"
            else isinstance(value, str)
        )  # fmt: skip
        if not good:
            raise ResultError(f"{where}: {name} must be {kinds[name]}; got {value!r:.60}")
    try:
        return Statement(**claim)
    except ValueError as error:
        raise ResultError(f"{where}: {error}") from None
