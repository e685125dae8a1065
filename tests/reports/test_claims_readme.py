"""README's ratios on the H100: each belongs to a claim whose rows give it to the digits printed. The rows decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dig.environment import ROOT
from reports.claims.errors import ClaimError
from reports.claims.evaluate import judge
from reports.claims.finding import Finding
from reports.claims.numbers import measured
from reports.claims.prose import HOLE, README
from reports.claims.readme import HEADING, Section, read_readme
from reports.claims.rows import ROWS, Files, published
from reports.claims.spec import Claims, Crossover, Ratio, read_claims
from reports.claims.subject import Subject


@pytest.fixture(scope="module")
def claims() -> Claims:
    return read_claims()


@pytest.fixture(scope="module")
def files(claims: Claims) -> Files:
    return Files(published(), claims.files)


def of_readme(claims: Claims) -> list[Ratio | Crossover]:
    return [claim for claim in claims.claims if isinstance(claim, Ratio | Crossover) and claim.finds_its_words]


def uncovered(claims: Claims, readme: Section) -> list[str]:
    return readme.uncovered(claim.line for claim in claims.of(Ratio) if claim.line)


def page(old: str = "", new: str = "") -> Section:
    """README's section, with one thing changed."""
    text = README.read_text(encoding="utf-8")
    assert text.count(old) == 1 or not old, old
    return Section.of(text.replace(old, new) if old else text)


def test_every_lead_in_readmes_tables_belongs_to_a_claim(claims: Claims) -> None:
    assert uncovered(claims, read_readme()) == [], "a line of leads that no claim in reports/claims.toml tests: add one"


def test_the_rows_give_every_ratio_in_readme(claims: Claims, files: Files) -> None:
    found = [judge(claim, files, read_readme()) for claim in of_readme(claims)]
    wrong = [each for each in found if each.verdict != "holds"]
    if wrong:
        lines = (f"README says: {each.said}; the rows: {each.measured}, {'; '.join(each.notes)}" for each in wrong)
        pytest.fail("\n".join(lines), pytrace=False)


def test_a_lead_without_a_claim_is_found(claims: Claims) -> None:
    added = page(LINE, f"  | 768 | 3.30 | 4.99, FA4 | 1.51 | 0.7, 0.8 |\n{LINE}")
    assert uncovered(claims, added) == ["training step: 768"]


def lead(claims: Claims) -> Ratio:
    """The claim of the first table's line at 1792 pixels."""
    return next(claim for claim in claims.of(Ratio) if claim.id == "readme-lead-train-s-1792")


LINE = next(line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("  | 1792 |"))
CELLS = [cell.strip() for cell in LINE.strip().strip("|").split("|")]


def changed(index: int, old: str, new: str) -> Section:
    """The section with one cell of that line changed."""
    cells = list(CELLS)
    assert old in cells[index]
    cells[index] = cells[index].replace(old, new)
    return page(LINE, f"  | {' | '.join(cells)} |")


def shifted(text: str) -> str:
    """The number with another last digit."""
    return text[:-1] + str((int(text[-1]) + 2) % 10)


@pytest.mark.parametrize("index", [1, 3])
def test_a_time_or_a_lead_off_by_two_in_its_last_digit_does_not_hold(claims: Claims, files: Files, index: int) -> None:
    finding = judge(lead(claims), files, changed(index, CELLS[index], shifted(CELLS[index])))
    assert finding.verdict == "does not hold"


def test_what_else_the_line_says_is_tested_too(claims: Claims, files: Files) -> None:
    def verdict(section: Section) -> Finding:
        return judge(lead(claims), files, section)

    assert verdict(page()).verdict == "holds"
    way = CELLS[2].rpartition(", ")[2]
    other = verdict(changed(2, way, "cuDNN, whole"))
    assert other.verdict == "does not hold"
    assert any(f"cuDNN, whole, the rows {CELLS[2]}" in note for note in other.notes)
    ours, peer = CELLS[4].split(", ")
    for text in (ours, peer):
        assert verdict(changed(4, text, shifted(text))).verdict == "does not hold"
    number = CELLS[1].rstrip("ᵗᵘ")
    assert verdict(changed(1, CELLS[1], f"{number}ᵗᵘ")).verdict == "does not hold"


def test_words_that_readme_no_longer_has_are_named(claims: Claims, files: Files) -> None:
    claim = replace(lead(claims), line=(), quote="it never said {} times")
    with pytest.raises(ClaimError, match=r"README.md no longer says 'it never said \{\} times'"):
        judge(claim, files, page())
    with pytest.raises(ClaimError, match="README has no line '3000'"):
        judge(replace(claim, quote="", line=("training step", "3000")), files, page())
    with pytest.raises(ClaimError, match="no section"):
        Section.of("# Nothing\n")


def test_a_number_is_read_whole() -> None:
    section = Section.of("## What the cards say\nIt is 12.5 times as fast, in 94% less.\n")
    assert section.quoted("It is {} times")[1] == "12.5"
    with pytest.raises(ClaimError):
        section.quoted("12.{} times")


def test_a_said_value_must_be_readmes(claims: Claims, files: Files) -> None:
    claim = next(claim for claim in claims.of(Ratio) if claim.id == "fig1-speed-published")
    for number, verdict in ((claim.value, "holds"), (shifted(claim.value), "does not hold")):
        section = Section.of(f"{HEADING}\n{claim.quote.replace(HOLE, number)}\n")
        assert judge(claim, files, section).verdict == verdict


def test_a_claim_reads_the_file_that_it_names(claims: Claims) -> None:
    only = Files([ROWS / "rows.jsonl"], claims.files)
    assert judge(lead(claims), only, page()).verdict == "not measured"
    assert Path("best.jsonl").name in claims.files


def test_the_choice_of_a_model_says_what_readmes_leads_are(claims: Claims, files: Files) -> None:
    """`docs/start.md` gives them as ranges."""
    leads: dict[tuple[int, str], list[float]] = {}
    for claim in claims.of(Ratio):
        if claim.line:
            case = Subject.parse(claim.under).case
            leads.setdefault((case.resolution, case.mode), []).append(
                float(judge(claim, files, page()).measured.split()[0])
            )

    def between(resolution: int, *modes: str) -> str:
        found = [lead for mode in modes for lead in leads[(resolution, mode)]]
        return f"{min(found):.1f} to {max(found):.1f}"

    both = ("train", "forward")
    ours, peer = (
        measured(f"samples of {model}@256 in ../h200/sampling-best.jsonl", "", files)[0]
        for model in ("DiG-XL/2", "Flash-DiT-XL/2:sdpa-cudnn")
    )
    ahead = ours / peer
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    for said in (
        f"{between(512, *both)} times the best Flash-DiT at 512, {between(1024, *both)} at 1024, "
        f"{between(2048, *both)} at 2048",
        f"{between(256, 'train')} times; without a graph",
        f"DiG is {100 * (ahead - 1):.0f}% ahead of Flash-DiT compiled whole",
    ):
        assert said in text, said
