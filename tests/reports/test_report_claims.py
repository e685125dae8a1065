"""Claims against rows: verdicts, intervals, crossovers, exponents; and every ratio of the README has its claim."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.store.lines import ResultError
from bench.store.rows import Row
from dig.environment import ROOT
from reports.claims.__main__ import app, exponents
from reports.claims.curves import crossover, exponent
from reports.claims.found import FAILS, HOLDS, OPEN, PART, UNMEASURED, Evidence, Finding, find, printed
from reports.claims.said import Pattern, Statement, read_statements
from tests.reports.conftest import build_row
from tests.reports.test_report_ablation import DISTANCES, srem
from tests.test_models import GMAC_TABLE_1, PAPER

H100 = ROOT / "results" / "h100"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
SECTION = README[README.index("## What the H100 says") : README.index("## Models")]
TABLE_ROW = re.compile(r"\| [\w/, ]+? \| [\d.]+ᵗ?(?: ms)? \| [\d.]+ᵗ?(?: ms)?, [\w, ]+? \| [\d.]+ \| [\d., GiB]+? \|")
OURS, FLASH = {"options": (("backend", "triton"),)}, {"options": (("backend", "sdpa-cudnn"),)}


def write(folder: Path, rows: list[Row], name: str = "rows.jsonl") -> Evidence:
    (folder / name).write_text("".join(row.to_json() + "\n" for row in rows))
    return Evidence(folder)


def statement(**changes: Any) -> Statement:
    given = {
        "id": "a", "source": "somebody", "said": "twice", "kind": "ratio", "of": "DiG-S/2:triton@1024:train",
        "than": "Flash-DiT-S/2@1024:train", "value": 2.0,
    }  # fmt: skip
    return Statement(**{**given, **changes})


def steps(middle: float, half: float = 0.0) -> tuple[float, ...]:
    """Forty steps between two ends."""
    return tuple(middle + half * (i - 19.5) / 19.5 for i in range(40))


def pair(ours: tuple[float, ...], peer: tuple[float, ...]) -> list[Row]:
    return [
        build_row("DiG-S/2", samples_ms=ours, gib=1.0, **OURS),
        build_row("Flash-DiT-S/2", samples_ms=peer, gib=4.0, **FLASH),
    ]


@pytest.mark.parametrize(("peer", "verdict"), [(25.0, HOLDS), (20.0, OPEN), (15.0, FAILS)])
def test_a_ratio_holds_where_all_of_its_interval_does(peer: float, verdict: str, tmp_path: Path) -> None:
    found = find(statement(), write(tmp_path, pair(steps(10.0, 0.5), steps(peer, 1.0))))
    assert found.verdict == verdict
    assert found.interval is not None
    assert found.interval[0] < peer / 10 < found.interval[1]
    assert found.command.count("python -m bench run") == 2


def test_a_claim_without_rows_says_what_measures_it(tmp_path: Path) -> None:
    found = find(statement(), write(tmp_path, pair(steps(10), steps(20))[:1]))
    assert (found.verdict, found.command) == (UNMEASURED, "python -m bench run --suite paper --resume")
    assert "No row of Flash-DiT-S/2@1024:train" in found.notes


def test_the_fastest_of_what_a_name_means_counts(tmp_path: Path) -> None:
    """And of memory the leanest, whatever its time; what failed never."""
    rows = [
        *pair(steps(10), steps(30)),
        build_row("Flash-DiT-S/2", ms=25.0, gib=5.0, options=(("backend", "flash-attn-4"),)),
        build_row("Flash-DiT-S/2", status="error", options=(("backend", "flash-attn"),)),
        build_row("Flash-DiT-S/2", ms=5.0, batch=2, **FLASH),
    ]
    evidence = write(tmp_path, rows)
    assert find(statement(), evidence).measured == "2.50 times"
    assert find(statement(figure="memory"), evidence).measured == "4.00 times"
    assert find(statement(figure="memory", form="saving", value=0.75), evidence).verdict == HOLDS


def test_a_printed_number_must_be_what_the_rows_give(tmp_path: Path) -> None:
    evidence = write(tmp_path, pair(steps(10.0), steps(25.4)))
    verdicts = {
        quoted: find(statement(value=None, quoted=quoted), evidence).verdict for quoted in ("2.5", "2.54", "2.6")
    }
    assert verdicts == {"2.5": HOLDS, "2.54": HOLDS, "2.6": FAILS}
    assert (printed(0.154, "15%", "behind"), printed(0.944, "94%", "saving")) == ("15%", "94%")


def line_of(power: float, factor: float, model: str, options: Any) -> dict[int, Row]:
    sides = (256, 512, 1024, 2048)
    return {side: build_row(model, side, ms=factor * (side / 1000) ** (2 * power), **options) for side in sides}


def test_a_crossover_lies_where_two_powers_meet() -> None:
    """Of 10 s and 8 s^2, with s tokens over those of 1000 pixels: at the root of 10 / 8."""
    of, than = line_of(1, 10.0, "DiG-S/2", OURS), line_of(2, 8.0, "Flash-DiT-S/2", FLASH)
    found = crossover(of, than)
    assert found is not None
    assert found.side is not None
    assert found.side.value == pytest.approx(1000 * (10 / 8) ** 0.5)
    ahead = crossover(line_of(1, 0.1, "DiG-S/2", OURS), than)
    assert ahead is not None
    assert ahead.words == "ahead from 256, the smallest measured"
    never = crossover(than, line_of(1, 0.1, "DiG-S/2", OURS))
    assert never is not None
    assert never.words == "not ahead at 2048, the largest measured"


def test_a_crossovers_interval_is_where_the_ratios_intervals_cross() -> None:
    of = {side: build_row("DiG-S/2", side, samples_ms=steps(10, 0.5), **OURS) for side in (512, 1024)}
    than = {side: build_row("DiT-S/2", side, samples_ms=steps(ms, 0.5)) for side, ms in ((512, 8), (1024, 12))}
    found = crossover(of, than)
    assert found is not None
    assert found.side is not None
    assert found.side.low is not None
    assert found.side.high is not None
    assert 512 < found.side.low < found.side.value < found.side.high < 1024


def test_an_exponent_is_a_slope_with_its_interval() -> None:
    assert exponent({side: 3.0 * side**2 for side in (1024, 1536, 2048)}) is not None
    found = exponent({1024: 1.0, 1536: 2.4, 2048: 3.9})
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    two = exponent({1024: 1.0, 2048: 4.0**1.5})
    assert two is not None
    assert (two.value, two.low) == (pytest.approx(1.5), None)


def test_orders_of_the_ablation_give_a_verdict(tmp_path: Path) -> None:
    order = Statement(id="a", source="paper", said="each part helps", kind="order", group="srem")
    assert find(order, Evidence(tmp_path)).verdict == UNMEASURED
    (tmp_path / "ablation.jsonl").write_text("".join(text + "\n" for text in srem(DISTANCES)))
    found = find(order, Evidence(tmp_path))
    assert found.verdict == PART
    assert "bidirectional better than causal: holds" in found.measured


def published() -> list[tuple[Statement, Finding]]:
    evidence = Evidence(H100)
    return [(one, find(one, evidence)) for one in read_statements()]


def test_every_ratio_of_the_readme_is_what_its_rows_give() -> None:
    of_readme = [(one, found) for one, found in published() if one.source.startswith("README")]
    assert [one.id for one, _ in of_readme if one.said not in README] == []
    assert {one.id: found.measured for one, found in of_readme if found.verdict != HOLDS} == {}


def test_every_ratio_of_the_readme_has_a_claim() -> None:
    """A number of times, a percentage and a row of the tables of leads: each stands in what some claim says."""
    said = [one.said for one in read_statements()]
    numbers = [found[0] for found in re.finditer(r"\d[\d.]* times|\d[\d.]*%", SECTION)]
    assert len(numbers) >= 6
    assert [number for number in numbers if not any(number in words for words in said)] == []
    rows = TABLE_ROW.findall(SECTION)
    assert len(rows) == 14
    assert [row for row in rows if row not in said] == []


def test_counts_are_what_the_tests_of_models_count() -> None:
    counts = {one.id: one.counts for one in read_statements() if one.counts}
    parameters, flops = (counts[name] or {} for name in ("paper-parameters", "paper-flops"))
    assert {size: pair[1] for size, pair in parameters.items()} == {k: round(v / 2**20, 3) for k, v in PAPER.items()}
    assert {size: pair[1] for size, pair in flops.items()} == {k: GMAC_TABLE_1[f"DiG-{k}/4"] for k in PAPER}


def test_every_claim_of_the_paper_has_a_verdict_or_a_command() -> None:
    assert [found.id for _, found in published() if not found.command] == []
    assert {found.verdict for _, found in published()} <= {HOLDS, FAILS, PART, OPEN, UNMEASURED}


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ('[[claim]]\nid = "a"\nsource = "b"\nsaid = "c"\nkind = "guess"', "kind must be one of ratio"),
        ('[[claim]]\nid = "a"\nsource = "b"\nsaid = "c"\nkind = "ratio"\nof = "DiG-S/2@256"', "needs than"),
        ('[[claim]]\nid = "a"\nsource = "b"\nsaid = "c"', "kind is missing"),
        ('[[claim]]\nid = "a"\nvalue = "two"\nsource = "b"\nsaid = "c"\nkind = "ratio"', "value must be"),
        ('[[claim]]\nid = "a"\nsays = "b"', "unknown key 'says'"),
        ("claim = 1", "has no"),
        ("[[claim", "is not TOML"),
    ],
)
def test_a_wrong_claim_is_one_line(claim: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(claim)
    with pytest.raises(ResultError, match=re.escape(message)):
        read_statements(path)
    done = CliRunner().invoke(app, [str(tmp_path), "--claims", str(path)])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)


def test_names_of_cases_are_read_or_refused() -> None:
    case = build_row("DiG-S/2", 256, batch=32, **OURS).case
    assert Pattern.parse("DiG-S/2:triton@256:train:graph:batch=32").fits(case)
    for other in ("DiG-S/2@256", "DiG-S/2:fla@256:batch=32", "DiG-S/2@256:forward:batch=32", "DiG-S/2@512:batch=32"):
        assert not Pattern.parse(other).fits(case)
    for wrong in ("DiG-S/2", "DiG-S/2@big", "DiG-S/2@256:batch=x"):
        with pytest.raises(ValueError, match="got"):
            Pattern.parse(wrong)


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(H100), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "claims.json").read_text())
    assert [one["id"] for one in found] == [one.id for one in read_statements()]
    told = (tmp_path / "claims.md").read_text()
    assert "| train, S/2, batch 1 | DiG (fla) | the best Flash-DiT | from 13" in told
    assert exponents(Evidence(H100))["model"].tolist()[0] == "DiG (triton)"
    # What is committed is of today's rows: `nox -s report` writes it.
    assert told == (H100 / "claims.md").read_text()
