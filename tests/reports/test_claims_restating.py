"""`python -m reports.claims --restate`: pages get the rows' numbers, where they stand, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.store.rows import Row
from reports.claims import __main__ as command
from reports.claims import restating
from reports.claims.declared import Number, read_declared
from reports.claims.errors import ClaimError
from reports.claims.prose import located, prose
from reports.claims.restating import applied, changes, read_pages
from reports.claims.rows import Files, published
from reports.claims.spec import Claims, Ratio, read_claims

DIG, PEER = "DiG-S/2:triton:variant=release", "Flash-DiT-S/2"
OPTIONS = (("backend", "triton"), ("variant", "release"))
NUMBERS = [
    Number(words="DiG takes {} ms, on the", of=(f"{DIG}@1024:train",), rows="rows.jsonl"),
    Number(words="| S/2 | {} · {} |", of=(f"{DIG}@1024:train", "its memory"), rows="rows.jsonl", page="docs/other.md"),
]


def ratio(name: str, **words: Any) -> Ratio:
    over, under = f"best {PEER}@1024:train", f"{DIG}@1024:train"
    return Ratio(**{"id": name, "source": "README", "over": over, "under": under, "rows": "rows.jsonl", **words})


CLAIMS = Claims(
    claims=(
        ratio("lead", line=("training step", "S/2"), relation="printed"),
        ratio("sentence", quote="faster by {} times than", relation="printed"),
        ratio("papers", quote="said to be {} times", value="2.5", relation="at least"),
    )
)
README = """# Speed 5.00
DiG takes 5.00 ms, off the [page](5.00).
## What the cards say
**DiG takes
[5.00](x) ms, on the** card, `faster by 3.00 times than`, and is faster by 3.00
times than *that*, which is said to be 2.5 times; 5.00 remains.

  | training step | DiG | Flash-DiT at its best | DiG's lead | memory at the leanest: DiG, Flash-DiT |
  | --- | --- | --- | --- | --- |
  | S/2 | 5.00ᵘ ms | 9.00 ms, FA4 | **3.00** | 0.50, 0.75 GiB |
"""
RESTATED = """# Speed 5.00
DiG takes 5.00 ms, off the [page](5.00).
## What the cards say
**DiG takes
[4.00](x) ms, on the** card, `faster by 3.00 times than`, and is faster by 2.50
times than *that*, which is said to be 2.5 times; 5.00 remains.

  | training step | DiG | Flash-DiT at its best | DiG's lead | memory at the leanest: DiG, Flash-DiT |
  | --- | --- | --- | --- | --- |
  | S/2 | 4.00ᵗ ms | 10.0 ms, cuDNN | 2.50 | 1.50, 2.25 GiB |
"""
OTHER = "Text.\n| S/2 | 5.00ᵘ · 0.5 |\n| S/2, more | 5.00 · 0.5 |\n"


@pytest.fixture
def files(make_row: Callable[..., Row], write_rows: Callable[..., Path]) -> Files:
    ours = make_row("DiG-S/2", ms=4.0, gib=1.5, options=OPTIONS, mode="train", marks=("throttled",))
    peer = make_row("Flash-DiT-S/2", ms=10.0, gib=2.25, options=(("backend", "sdpa-cudnn"),), mode="train")
    return Files([write_rows([ours, peer])], ["rows.jsonl"])


def test_numbers_are_written_where_they_stand_and_nothing_else_is(files: Files) -> None:
    pages = {"README.md": README, "docs/other.md": OTHER}
    found = changes(pages, CLAIMS, NUMBERS, files)
    assert applied(README, found["README.md"]) == RESTATED
    assert applied(OTHER, found["docs/other.md"]) == OTHER.replace("| 5.00ᵘ · 0.5 |", "| 4.00ᵗ · 1.5 |")
    again = {name: applied(page, found[name]) for name, page in pages.items()}
    assert changes(again, CLAIMS, NUMBERS, files) == {"README.md": [], "docs/other.md": []}


def test_a_number_in_parts_is_refused(files: Files) -> None:
    page = README.replace("[5.00](x)", "[5](x).00")
    with pytest.raises(ClaimError, match=r"README.md: '5.00' is in parts"):
        changes({"README.md": page, "docs/other.md": OTHER}, CLAIMS, NUMBERS, files)


def test_each_character_of_prose_has_its_place() -> None:
    page = "  # One\n\n1. **two**  <!-- no -->three [four](five)\n| x |\n```\ncode\n```\nend\n "
    text, places = located(page)
    assert text == prose(page) == "# One two three four end"
    assert len(places) == len(text)
    assert "".join(page[place] for place in places).split() == text.split()


def test_this_projects_pages_are_as_the_rows_say_and_become_it_again() -> None:
    claims, (numbers, _) = read_claims(), read_declared()
    files = Files(published(), claims.files | {entry.rows for entry in numbers})
    pages = read_pages(numbers)
    assert not any(changes(pages, claims, numbers, files).values())
    (line,) = (line for line in pages["README.md"].splitlines() if line.startswith("  | 1792 |"))
    wrong = line.replace(line.split(" | ")[3], "9.99").replace(", FA4", ", cuDNN, whole")
    assert wrong != line
    pages["README.md"], right = pages["README.md"].replace(line, wrong), pages["README.md"]
    assert applied(pages["README.md"], changes(pages, claims, numbers, files)["README.md"]) == right


def test_the_command_writes_the_pages_and_says_what_it_changed(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    (tmp_path / "docs" / "other.md").write_text(OTHER, encoding="utf-8")
    for module in (command, restating):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(command, "read_claims", lambda path: CLAIMS)
    monkeypatch.setattr(command, "read_declared", lambda: (NUMBERS, []))
    rows = files.paths("rows.jsonl")[0]
    done = CliRunner().invoke(command.app, [str(rows), "--restate"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == RESTATED
    assert "README.md, line 5: 5.00 -> 4.00\n" in done.output
    assert "wrote docs/other.md: read its words again" in done.output
    assert CliRunner().invoke(command.app, [str(rows), "--restate"]).output == "every number is as the rows give it\n"
    refused = CliRunner().invoke(command.app, [str(rows), "--restate", "--out", str(tmp_path)])
    assert (refused.exit_code, refused.output.count("\n")) == (2, 1)
    assert "give one of them" in refused.output
