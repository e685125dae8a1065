"""``claims.toml``: what is claimed and what tests it, read and checked. Its head says how a claim is written."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench.store.decoding import decode_dataclass, require
from bench.store.files import read_file
from dig.family import nearest
from reports.claims.errors import ClaimError
from reports.claims.prose import HOLE
from reports.claims.ratio import Figure
from reports.claims.subject import NOTATION, Subject

CLAIMS = Path(__file__).resolve().parents[1] / "claims.toml"
Form = Literal["times", "percent more", "percent less"]
Relation = Literal["at least", "at most", "about", "printed"]
Counted = Literal["parameters", "paper gmac", "gmac", "paper share", "share"]
_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_NUMBER = re.compile(r"\d+(\.\d+)?")


def _number(text: str, name: str) -> None:
    require(_NUMBER.fullmatch(text) is not None, f"{name} must be a number in quotes, as it is printed; got {text!r}")


def _subject(text: str, name: str, *, every: bool) -> None:
    try:
        subject = Subject.parse(text)
    except ValueError as error:
        raise ValueError(f"{name} is {NOTATION}: {error}") from None
    require(subject.every == every, f"{name} must be {'of every resolution, @*' if every else 'of one resolution'}")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What every kind of claim says.

    Attributes:
        id: Its own name.
        source: Who says it, and where.
        said: The sentence.
    """

    id: str
    source: str
    said: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError on what cannot be tested."""
        require(_ID.fullmatch(self.id) is not None, f"id is of small letters, digits, points and dashes: {self.id!r}")
        require(bool(self.source.strip()), "source is empty: say who claims it, and where")
        require(bool(self.said.strip()) or self.finds_its_words, "said is empty: give the sentence")

    @property
    def finds_its_words(self) -> bool:
        """Whether the sentence is looked up elsewhere."""
        return False


@dataclass(frozen=True, kw_only=True)
class Ratio(Claim):
    """One case's time or memory over another's.

    Attributes:
        value: The number, as it is printed: its digits say how exact it is. Of README it is found there.
        relation: What the ratio must be to it; ``printed``: the same, to the digits that are printed.
        within: With ``about``: percent.
        form: Times; or percent more, or less, that the first takes.
        figure: ``time`` or ``memory``.
        over, under: The first and the second, as `Subject.parse` reads them.
        rows: Name of the results file.
        quote: README's words, ``{}`` where the number stands.
        line: README's line of a table: the table's first heading, the line's first cell.
        command: What measures it and judges it; made from the cases where it is empty.
    """

    over: str
    under: str
    rows: str
    value: str = ""
    relation: Relation = "at least"
    within: float = 0.0
    form: Form = "times"
    figure: Figure = "time"
    quote: str = ""
    line: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("over", "under"):
            _subject(getattr(self, name), name, every=False)
        require(not (self.quote and self.line), "quote and line are two places of README; give one")
        require(self.quote.count(HOLE) == bool(self.quote), "quote needs {} once, where the number stands")
        require(len(self.line) in (0, 2), "line is a table's first heading and a line's first cell")
        if self.value or not self.finds_its_words:
            _number(self.value, "value")
        require(bool(self.value) or self.relation == "printed", "without a value relation must be printed")
        require((self.within > 0) == (self.relation == "about"), "within is of relation about, and above 0")

    @property
    def finds_its_words(self) -> bool:
        """Whether README says it."""
        return bool(self.quote or self.line)


@dataclass(frozen=True, kw_only=True)
class Count(Claim):
    """Parameters or multiply-adds of models, counted.

    Attributes:
        what: ``parameters`` in units of 2^20; ``gmac`` in full, or as the paper counts; percent of the peers'.
        models: Names.
        options: Of all of them.
        peers: With a share: what each is compared with.
        values: One each, as printed.
        within: Percent that each may be off.
    """

    what: Counted
    models: tuple[str, ...]
    values: tuple[str, ...]
    within: float
    options: str = ""
    peers: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.models), "models is empty")
        require(len(self.values) == len(self.models), "values must be as many as models")
        shares = self.what in ("paper share", "share")
        require(len(self.peers) == (len(self.models) if shares else 0), "peers are of a share, as many as models")
        for value in self.values:
            _number(value, "values")
        require(self.within > 0, "within must be above 0")


@dataclass(frozen=True, kw_only=True)
class Order(Claim):
    """Arms of training runs, the better first.

    Attributes:
        experiment: As the runs' lines name it.
        arms: The better first.
        measure: ``frechet`` or ``loss``: less is better.
        rows: Name of the file of runs.
    """

    experiment: str
    arms: tuple[str, ...]
    measure: Literal["frechet", "loss"]
    rows: str
    command: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(set(self.arms)) == len(self.arms) >= 2, "arms must be two or more, each once")


@dataclass(frozen=True, kw_only=True)
class Crossover(Claim):
    """From which resolution on one case is faster than another.

    Attributes:
        ours, peer: Of every resolution, as ``DiG-S/2:fla@*:train``.
        rows: Name of the results file.
        also: Names of files that have other resolutions of them, of the same machine.
        quote: README's words, ``{}`` where the resolution stands.
    """

    ours: str
    peer: str
    rows: str
    also: tuple[str, ...] = ()
    quote: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ours", "peer"):
            _subject(getattr(self, name), name, every=True)
        require(self.quote.count(HOLE) == bool(self.quote), "quote needs {} once, where the resolution stands")

    @property
    def finds_its_words(self) -> bool:
        """Whether README says it."""
        return bool(self.quote)


@dataclass(frozen=True, kw_only=True)
class Exponent(Claim):
    """To which power of the tokens a case's time or memory grows.

    Attributes:
        of: Of every resolution.
        figure: ``time`` or ``memory``.
        theory: The power, which it must not exceed.
        rows: Name of the results file.
    """

    of: str
    figure: Figure
    theory: float
    rows: str
    command: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _subject(self.of, "of", every=True)
        require(self.theory > 0, "theory must be above 0")


KINDS: dict[str, type[Claim]] = {
    "ratio": Ratio,
    "count": Count,
    "order": Order,
    "crossover": Crossover,
    "exponent": Exponent,
}


C = TypeVar("C", bound=Claim)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Claims:
    """All claims of a file, in its order of kinds.

    Attributes:
        claims: They.
        path: The file.
    """

    claims: tuple[Claim, ...]
    path: Path = CLAIMS

    def of(self, kind: type[C]) -> list[C]:
        """Those of a kind."""
        return [claim for claim in self.claims if isinstance(claim, kind)]

    def only(self, ids: Sequence[str]) -> Claims:
        """Those of these ids.

        Raises:
            ClaimError: There is no such claim.
        """
        known = [claim.id for claim in self.claims]
        for id in ids:
            if id not in known:
                near = nearest(id, known)
                hint = f"did you mean {near}?" if near is not None else f"such as {known[0]}"
                raise ClaimError(f"{self.path}: no claim has the id {id!r:.80}; {hint}")
        return replace(self, claims=tuple(claim for claim in self.claims if claim.id in ids))

    @property
    def files(self) -> set[str]:
        """Names of the files that they are tested on."""
        return {name for claim in self.claims for name in names_of(claim)}


def names_of(claim: Claim) -> tuple[str, ...]:
    """Names of the files that a claim is tested on; none of a count."""
    rows = getattr(claim, "rows", "")
    return (rows, *getattr(claim, "also", ())) if rows else ()


def read_claims(path: Path = CLAIMS) -> Claims:
    """Read a file of claims.

    Raises:
        ClaimError: It cannot be read, or a claim in it cannot be tested.
    """
    claims = read_tables(path, KINDS)
    repeated = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
    if repeated:
        raise ClaimError(f"{path}: two claims have the id {min(repeated)!r}")
    if not claims:
        raise ClaimError(f"{path}: it holds no claims")
    return Claims(claims=tuple(claims), path=path)


def read_tables(path: Path, kinds: Mapping[str, type[T]]) -> list[T]:
    """Read a TOML file of tables that are written ``[[name]]``, each a dataclass by its name.

    Raises:
        ClaimError: It cannot be read, or says something else.
    """
    try:
        record = tomllib.loads(read_file(path).decode())
    except OSError as error:
        raise ClaimError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ClaimError(f"{path}: not TOML: {error}") from None
    try:
        return list(_decoded(record, kinds))
    except ValueError as error:
        raise ClaimError(f"{path}: {error}") from None


def _decoded(record: dict[str, Any], kinds: Mapping[str, type[T]]) -> Iterator[T]:
    for name, entries in record.items():
        require(name in kinds, f"unknown table {name!r:.80}; there are {', '.join(f'[[{kind}]]' for kind in kinds)}")
        require(isinstance(entries, list), f"{name} must be written [[{name}]], one for each")
        for index, entry in enumerate(entries, 1):
            where = f"{name} {index}"
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                where = f"{name} {entry['id']!r:.80}"
            try:
                yield decode_dataclass(kinds[name], entry, where)
            except ValueError as error:
                raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
