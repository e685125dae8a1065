"""Numbers in prose: README's are each a claim's, a query's of rows, or declared to be no measurement; rows decide."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from bench.store.rows import Row
from reports.claims import numbers
from reports.claims.declared import Number, read_declared, restated
from reports.claims.errors import ClaimError
from reports.claims.numbers import measured
from reports.claims.prose import NUMBER, README, prose, quoted, read_page, unexplained
from reports.claims.rows import Files, published
from reports.claims.spec import Claim, read_claims

NUMBERS, PLAIN = read_declared()
CLAIMS = read_claims()
DECLARE = (
    "say what gives it: quote it in a claim of reports/claims.toml, or add it to reports/prose.toml, as [[number]] "
    "with a query of rows or as [[plain]] with why it is no measurement"
)
DIG = "DiG-S/2:triton:variant=release"
OPTIONS = (("backend", "triton"), ("variant", "release"))
PLAIN_DIT = (("backend", "materialized"),)


@pytest.fixture(scope="module")
def files() -> Files:
    return Files(published(), CLAIMS.files | {entry.rows for entry in NUMBERS})


def queries(claim: Claim) -> str:
    return " ".join(getattr(claim, name, "") for name in ("over", "under", "ours", "peer"))


def undeclared(page: str) -> list[str]:
    quotes = [(claim.quote, queries(claim)) for claim in CLAIMS.claims if getattr(claim, "quote", "")]
    quotes += [(entry.words, " ".join(entry.of)) for entry in NUMBERS if entry.page == README.name]
    return unexplained(prose(page), quotes, [words for entry in PLAIN for words in entry.words])


def test_every_number_in_readmes_prose_is_explained() -> None:
    if found := undeclared(read_page(README)):
        pytest.fail("\n".join(f"README: nothing explains {each}; {DECLARE}" for each in found), pytrace=False)


@pytest.mark.parametrize("entry", NUMBERS, ids=lambda entry: entry.words[:40])
def test_the_rows_give_what_a_page_says(entry: Number, files: Files) -> None:
    try:
        said, now = restated(entry, files)
        wrong = f"{entry.page} says: {said}\n{'the rows give':>{len(entry.page) + 5}}: {now}" if said != now else ""
    except ClaimError as error:
        wrong = f"reports/prose.toml: {error}"
    if wrong:
        pytest.fail(wrong, pytrace=False)


@pytest.mark.parametrize("section", ["## Models\n", "## Measuring\n", "## Folders\n"])
def test_a_new_number_is_found_in_any_section(section: str) -> None:
    page = read_page(README)
    assert page.count(section) == 1
    added = "It trains 7.5 times as fast, 12% leaner, in [4,000 ms](docs/log.md), at 1024 in 8.\n\n"
    before = undeclared(page)
    found = [each for each in undeclared(page.replace(section, f"{added}{section}")) if each not in before]
    assert [each.partition(" ")[0] for each in found] == ["7.5", "12", "4,000", "1024", "8"]
    assert "It trains 7.5 times" in found[0]


def test_prose_is_without_code_tables_links_and_names() -> None:
    page = """# 1 H100
2. It is **2.5 times** as `fast 3` as [DiG-S/2 at .4](docs/5.md) e2f723b, see https://x.org/6
<!-- 7 -->
| 8 | 9 |
```
10
```
At 11-12 of 13×14.
"""
    found = [each.partition(" ")[0] for each in unexplained(prose(page), [], [])]
    assert found == ["1", "2.5", "4", "11", "12", "13", "14"]
    assert "| 8 | 9 |" in prose(page, tables=True)


def test_words_explain_their_holes_and_the_numbers_that_a_query_asks_for() -> None:
    text = "At 1024 it takes 9.05 ms, 3 of them alone; and 1024 times 10."
    words = "At 1024 it takes {} ms, 3 of them"
    found = unexplained(text, [(words, "DiG-S/2@1024:train")], ["times 10"])
    assert [each.partition(" ")[0] for each in found] == ["3", "1024"]
    # 10 is not explained by words that only begin it.
    assert len(unexplained("times 10 and times 100", [], ["times 10"])) == 1


@pytest.mark.parametrize("text", ["It takes 8 ms.", "It takes 9 ms. It takes 9 ms.", "It takes 99 ms in 9 ms."])
def test_words_must_stand_once(text: str) -> None:
    words = "It takes {} ms." if "8" not in text else "It took {} ms."
    with pytest.raises(ClaimError, match=r"README.md (no longer says|says 2 times) 'It t"):
        quoted(text, words)


def test_plain_words_that_explain_nothing_are_refused() -> None:
    with pytest.raises(ClaimError, match="'at 512'; take it out"):
        unexplained("at 256", [], ["at 512"])


@pytest.mark.parametrize(
    ("ms", "printed", "now"),
    [
        (3.849, "3.85", "3.85"),
        (3.91, "3.85", "3.91"),
        (10.14, "9.85", "10.1"),
        (4.36, "4.4", "4.4"),
        (4.34, "4.4", "4.3"),
        (61.2, "59", "61"),
        (4803.4, "4,796", "4,803"),
        (987.0, "1,002", "987"),
    ],
)
def test_a_number_is_restated_as_it_was_printed(
    make_row: Callable[..., Row], write_rows: Callable[..., Path], ms: float, printed: str, now: str
) -> None:
    path = write_rows([make_row("DiG-S/2", ms=ms, options=OPTIONS, mode="train")])
    entry = Number(words="in {} ms", of=(f"{DIG}@1024:train",), rows="rows.jsonl")
    text = f"It is done in {printed} ms."
    assert restated(entry, Files([path], ["rows.jsonl"]), text) == (f"in {printed} ms", f"in {now} ms")


def test_a_line_of_a_table_has_its_rows_marks(make_row: Callable[..., Row], write_rows: Callable[..., Path]) -> None:
    path = write_rows([make_row("DiG-S/2", ms=9.0, gib=1.5, options=OPTIONS, marks=("throttled",))])
    entry = Number(words="| XL | {} · {} |", of=(f"{DIG}@1024:train", "its memory"), rows="rows.jsonl")
    given = Files([path], ["rows.jsonl"])
    assert restated(entry, given, "| XL | 9.00ᵗ · 1.5 |") == ("| XL | 9.00ᵗ · 1.5 |", "| XL | 9.00ᵗ · 1.5 |")
    assert restated(entry, given, "| XL | 9.00ᵘ · 1.6 |")[1] == "| XL | 9.00ᵗ · 1.5 |"


def test_queries(
    make_row: Callable[..., Row],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {256: (2.0, 1.0, 1.0, 0.5), 512: (4.0, 3.0, 1.5, 2.0), 1024: (9.0, 10.0, 2.0, 4.0)}
    rows = [
        row
        for resolution, (own, other, own_gib, other_gib) in times.items()
        for row in (
            make_row("DiG-S/2", resolution, own, gib=own_gib, options=OPTIONS),
            make_row("DiT-S/2", resolution, other, gib=other_gib, options=PLAIN_DIT),
        )
    ]
    rows.append(make_row("DiT-S/2", 2048, options=PLAIN_DIT, status="oom", started_at="2026-11-22T10:12:30Z"))
    (tmp_path / "log.jsonl").write_text(json.dumps({"speed": 1.0}) + "\n" + json.dumps({"speed": 7.5}) + "\n")
    (tmp_path / "empty.jsonl").touch()
    probes = ({"batch": 3, "fits": True}, {"batch": 4, "fits": False}, {"batch": 2, "fits": True})
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    own, other, *rest = (numbers.ROWS / "sampling-best.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "samples.jsonl").write_text("".join(f"{line}\n" for line in (own, other, own, *rest)))
    monkeypatch.setattr(numbers, "ROWS", tmp_path)
    given = Files([write_rows(rows)], ["rows.jsonl"])

    def value(query: str) -> float:
        return measured(query, "rows.jsonl", given)[0]

    ours, peer = f"{DIG}@*:train", "DiT-S/2@*:train"
    assert value(f"{DIG}@512:train") == 4.0
    assert value("best DiT-S/2@512:train in rows.jsonl") == 3.0
    assert value(f"memory of {DIG}@512:train") == 1.5
    assert value(f"lead of {DIG}@512:train than DiT-S/2@512:train") == 0.75
    assert value(f"last slower of {ours} than {peer}") == 512
    assert value(f"first leaner of {ours} than {peer}") == 512
    assert value("cases of rows.jsonl") == 7
    assert value("minutes of rows.jsonl") == 12.5
    assert value("speed of log.jsonl") == 7.5
    of_one = median(32 / seconds for seconds in json.loads(other)["seconds"])
    assert value("samples of Flash-DiT-XL/2@256 in samples.jsonl") == pytest.approx(of_one)
    of_two = median(4 / seconds for seconds in json.loads(rest[1])["seconds"])
    assert value("samples of Flash-DiT-XL/2:sdpa-cudnn@1024 in samples.jsonl") == pytest.approx(of_two)
    assert value("most batch of probes.jsonl") == 3
    assert value("gmac of DiG-S/8") == pytest.approx(0.363, abs=0.001)
    assert value("least share of DiG than DiT") < 100 < value("largest share of DiG than DiT")
    for query, why in {
        "DiT-S/2@2048:train": "DiT-S/2 at 2048 in rows.jsonl: OOM",
        f"{DIG}@768:train": "nothing",
        f"{DIG}@512:train in none.jsonl": "no file 'none.jsonl' of rows",
        f"first leaner of {peer} than {ours}": "do not change places",
        f"{DIG}@512:training": "did you mean train",
        "samples of DiG-XL/2@256 in samples.jsonl": "samples.jsonl has 2 speeds of DiG-XL/2@256, not one",
        "samples of DiG-XL/2@512 in samples.jsonl": "has 0 speeds",
        "samples of Flash-DiT-XL/2@1024 in samples.jsonl": "has 2 speeds",
        "samples of Flash-DiT-XL/2:flash-attn@1024 in samples.jsonl": "has 0 speeds",
        "speed of none.jsonl": "cannot read",
        "haste of log.jsonl": "haste",
        "speed of empty.jsonl": "list index",
        "gmac of DoG-S/8": "DoG",
    }.items():
        with pytest.raises(ClaimError, match=why):
            value(query)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[[number]]\nwords = "in {} ms"\nof = []', "of is empty"),
        ('[[number]]\nwords = "in 5 ms"\nof = ["DiT-S/2@256"]', "as many {} as of has queries"),
        ('[[number]]\nwords = "in {} GiB"\nof = ["its memory"]', "of the case before it"),
        ('[[plain]]\nwhy = " "\nwords = ["Tab. 2"]', "why is empty"),
        ('[[plain]]\nwhy = "a name"\nwords = ["Tab. two"]', "'Tab. two' holds no number"),
        ('[[plain]]\nwhy = "a name"\nwords = ["Tab. 2 {}"]', "has a {}"),
        ('[[figure]]\nwhy = "a name"', "there are [[number]], [[plain]]"),
    ],
)
def test_bad_declarations_are_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "prose.toml"
    path.write_text(text)
    with pytest.raises(ClaimError) as error:
        read_declared(path)
    assert why in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_what_is_measured_is_not_said_in_words() -> None:
    """No row is held against "ten times": README's results have digits."""
    counts = "two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|a hundred"
    ratio = re.compile(
        rf"\b(twice|thrice|double[sd]?|halve[sd]?|half the|a (third|quarter|fifth) |({counts}) times)", re.I
    )
    results = prose(README.read_text().partition("## What the cards say")[2].partition("## Models")[0])
    assert len(results) > 4_000
    assert ratio.findall(results) == []
    assert ratio.search("It is ten times as fast, and takes a third of the memory.")


def test_a_commit_is_no_number() -> None:
    said = "at 05fefd7 and 9328b3a, 1234567 rows, 12.5 of 0998e9f0, 3e4"
    assert NUMBER.findall(said) == ["1234567", "12.5", "0998", "3"]
