"""Claims: how they are read, what their verdicts are, where curves cross and how they grow."""

from __future__ import annotations

import json
import math
import runpy
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench.cases.suites import sweep
from bench.store.rows import ResultError, Row
from dig.environment import ROOT
from reports.claims import __main__ as command
from reports.claims.commands import measuring_each
from reports.claims.errors import ClaimError
from reports.claims.evaluate import judge, judge_all
from reports.claims.finding import about, at_least, at_most, half_digit, same_as_printed, together
from reports.claims.ratio import ratio_of
from reports.claims.readme import Section, read_readme
from reports.claims.rows import ROWS, Files, published
from reports.claims.runs import judge_order, read_runs
from reports.claims.spec import Count, Crossover, Exponent, Order, Ratio, names_of, read_claims
from reports.claims.subject import Subject
from reports.claims.telling import to_json, to_markdown, to_text
from reports.series import merge_launches

runner = CliRunner()
NOTHING = Section(prose="", tables=())
CLAIM = """
[[ratio]]
id = "faster"
source = "the paper"
said = "twice as fast"
value = "2.0"
over = "DiT-S/2@1024:train"
under = "DiG-S/2:triton@1024:train"
rows = "rows.jsonl"
"""
TRITON, PLAIN = (("backend", "triton"),), (("backend", "materialized"),)
CUDNN = (("backend", "sdpa-cudnn"),)
Rows = Callable[..., Path]


def ratio(**changes: Any) -> Ratio:
    fields: dict[str, Any] = {
        "id": "faster", "source": "the paper", "said": "twice as fast", "value": "2.0", "rows": "rows.jsonl",
        "over": "DiT-S/2@1024:train", "under": "DiG-S/2:triton@1024:train",
    }  # fmt: skip
    return Ratio(**{**fields, **changes})


def pair(make_row: Callable[..., Row], over: Any, under: Any, **changes: Any) -> list[Row]:
    """DiT's row and DiG's."""
    return [
        make_row("DiT-S/2", samples_ms=over, options=PLAIN, **changes),
        make_row("DiG-S/2", samples_ms=under, options=TRITON, **changes),
    ]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"2.0"', '"two"', "value must be a number in quotes, as it is printed; got 'two'"),
        ('"2.0"', "2.0", "ratio 'faster'.value must be of type str"),
        ("@1024:train", "@1024:training", "did you mean train"),
        ("DiT-S/2@", "DoT-S/2@", "over is [best ]MODEL"),
        ("@1024:train", "@*:train", "over must be of one resolution"),
        ('said = "twice as fast"', "", "said is empty"),
        ('source = "the paper"', 'source = " "', "source is empty"),
        ('rows = "rows.jsonl"', "", "ratio 'faster' lacks rows"),
        ("rows =", "file =", "field that this schema does not know: 'file'"),
        ("[[ratio]]", "[[ratios]]", "unknown table 'ratios'"),
        ("[[ratio]]", "[ratio]", "ratio must be written [[ratio]]"),
        ('"faster"', '"Faster!"', "id is of small letters"),
        ('"2.0"', '"2.0"\nrelation = "about"', "within is of relation about"),
        ('"2.0"', '"2.0"\nrelation = "roughly"', "relation must be one of at least, at most, about, printed"),
        ('"2.0"', '"2.0"\nquote = "by times"', "quote needs {} once"),
        ("[[ratio]]", "[[ratio", "not TOML"),
        (CLAIM, "", "it holds no claims"),
        (CLAIM, CLAIM + CLAIM, "two claims have the id 'faster'"),
    ],
)
def test_bad_claims_are_refused_in_one_line(tmp_path: Path, old: str, new: str, why: str) -> None:
    path = tmp_path / "claims.toml"
    assert old in CLAIM
    path.write_text(CLAIM.replace(old, new))
    with pytest.raises(ClaimError) as error:
        read_claims(path)
    assert why in str(error.value)
    assert str(error.value).startswith(str(path))
    result = runner.invoke(command.app, ["--claims", str(path)])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for words in (["--claims", str(tmp_path)], [str(tmp_path / "none.jsonl")], [str(tmp_path)]):
        result = runner.invoke(command.app, words)
        assert result.exit_code == 2, words
        assert ("no .jsonl files in" if words == [str(tmp_path)] else "cannot read") in result.stderr


def test_the_projects_claims_are_whole() -> None:
    claims = read_claims()
    assert {"rows.jsonl", "best.jsonl", "ablation.jsonl"} <= claims.files
    for kind in (Ratio, Count, Order, Crossover, Exponent):
        assert claims.of(kind)


def test_printed_digits_say_how_exact_a_value_is() -> None:
    assert [half_digit(text) for text in ("94", "2.5", "1.33")] == pytest.approx([0.5, 0.05, 0.005])
    assert same_as_printed(2.4501, "2.5")
    assert not same_as_printed(2.4499, "2.5")
    assert at_least(1.76, 1.79, "1.8") == "holds"
    assert at_least(1.70, 1.79, "1.8") == "holds in part"
    assert at_least(1.70, 1.74, "1.8") == "does not hold"
    assert at_most(1.0, 1.06, "1") == "holds"
    assert at_most(1.6, 1.7, "1") == "does not hold"
    assert about(99.0, 101.0, "100.0", 2) == "holds"
    assert about(99.0, 103.0, "100.0", 2) == "holds in part"
    assert together(["holds", "does not hold"]) == "holds in part"
    assert together(["holds", "not measured"]) == "not measured"
    assert together([]) == "not measured"


def test_a_ratios_interval_holds_both_medians(make_row: Callable[..., Row]) -> None:
    over, under = pair(
        make_row, tuple(20.0 + i / 10 for i in range(-20, 21)), tuple(10.0 + i / 100 for i in range(-20, 21))
    )
    found = ratio_of(over, under, "time")
    assert found is not None
    assert found.ratio == pytest.approx(2.0)
    # Of 41 values the 97.5% interval of the median goes from the 13th to the 29th; another launch differs by 0.5%.
    assert found.low == pytest.approx(19.2 / 10.08 / 1.005)
    assert found.high == pytest.approx(20.8 / 9.92 * 1.005)
    launched = [replace(row, case=replace(row.case, execution="eager")) for row in (over, under)]
    found = ratio_of(*launched, "time")
    assert found is not None
    assert found.high == pytest.approx(20.8 / 9.92 * 1.1)


def test_over_several_launches_the_interval_is_of_launches(make_row: Callable[..., Row]) -> None:
    # Steps of one launch are alike, launches are not: an interval of steps would be far too narrow.
    merged = [
        merge_launches(make_row(model, options=options, samples_ms=(ms,) * 50, launch=n) for n, ms in enumerate(times))
        for model, options, times in (
            ("DiT-S/2", PLAIN, (19.0, 19.5, 20.0, 20.5, 21.0)),
            ("DiG-S/2", TRITON, (9.9, 9.95, 10.0, 10.05, 10.1)),
        )
    ]
    found = ratio_of(merged[0], merged[1], "time")
    assert found is not None
    assert found.ratio == pytest.approx(2.0, rel=0.01)
    assert found.low < 1.95
    assert found.high > 2.05


def test_memory_is_exact(make_row: Callable[..., Row]) -> None:
    over, under = make_row("DiT-S/2", gib=8.0), make_row("DiG-S/2", gib=2.0)
    found = ratio_of(over, under, "memory")
    assert found is not None
    assert (found.ratio, found.low, found.high) == (4.0, 4.0, 4.0)
    assert ratio_of(make_row(status="oom"), under, "time") is None


def test_a_ratio_is_judged_with_its_marks(make_row: Callable[..., Row], write_rows: Rows) -> None:
    rows = pair(make_row, (20.0,) * 9, (10.0,) * 9, marks=("throttled", "unsteady"))
    finding = judge(ratio(), Files([write_rows(rows)], {"rows.jsonl"}), NOTHING)
    assert finding.verdict == "holds"
    assert finding.interval == pytest.approx((2.0 / 1.005, 2.0 * 1.005))
    assert sum("clock was held down" in note or "had not settled" in note for note in finding.notes) == 2
    slower = judge(ratio(value="2.2"), Files([write_rows(rows)], {"rows.jsonl"}), NOTHING)
    assert slower.verdict == "does not hold"
    less = ratio(value="50", form="percent less", figure="time", over="DiG-S/2:triton@1024:train", under="DiT-S/2@1024")
    assert judge(less, Files([write_rows(rows)], {"rows.jsonl"}), NOTHING).measured == "50.0%"


def test_the_best_is_the_fastest_way_and_of_memory_the_leanest(make_row: Callable[..., Row], write_rows: Rows) -> None:
    ways = [
        make_row("Flash-DiT-S/2", ms=9.0, gib=3.0, options=(("backend", "sdpa-cudnn"),)),
        make_row("Flash-DiT-S/2", ms=7.0, gib=4.0, options=(("backend", "flash-attn"),), execution="compiled-graph"),
        make_row("Flash-DiT-S/2", ms=5.0, gib=1.0, options=(("backend", "flash-attn"),), resolution=512),
        make_row("Flash-DiT-S/2", ms=5.0, gib=1.0, options=(("backend", "flash-attn"),), mode="forward"),
        make_row("Flash-DiT-S/2", ms=5.0, gib=1.0, options=(("backend", "flash-attn"),), batch=2),
    ]
    source = Files([write_rows(ways)], {"rows.jsonl"}).source("rows.jsonl")
    assert source is not None
    best = Subject.parse("best Flash-DiT-S/2@1024:train")
    assert source.find(best) is not None
    assert [getattr(source.find(best, figure), "median_ms", None) for figure in ("time", "memory")] == [7.0, 9.0]
    named = source.find(Subject.parse("best Flash-DiT-S/2:sdpa-cudnn@1024:train"))
    assert named is not None
    assert named.median_ms == 9.0
    assert source.find(Subject.parse("Flash-DiT-S/2:flash-attn@1024:train")) is None  # In a graph it was not measured.


def test_what_was_not_measured_says_with_what_command_it_would_be(
    make_row: Callable[..., Row], write_rows: Rows
) -> None:
    path = write_rows([make_row("DiT-S/2", options=PLAIN, status="oom"), make_row("DiG-S/2", options=TRITON)])
    finding = judge(ratio(), Files([path], {"rows.jsonl"}), NOTHING)
    assert finding.verdict == "not measured"
    assert finding.notes == ("DiT-S/2 (backend=materialized) 1024px train graph bf16 batch 1 on cuda: OOM",)
    assert finding.command.startswith("python -m bench run --models DiT:materialized,DiG:triton --sizes S")
    empty = judge(ratio(), Files([], {"rows.jsonl"}), NOTHING)
    assert empty.notes[0] == "no row of DiT-S/2 at 1024 in rows.jsonl"


def test_ones_own_file_is_read_in_place_of_the_published_ones(make_row: Callable[..., Row], write_rows: Rows) -> None:
    own = write_rows(pair(make_row, (30.0,) * 9, (10.0,) * 9), "mine.jsonl")
    assert judge(ratio(), Files([own], {"rows.jsonl"}), NOTHING).measured == "3.00 times"
    published = write_rows(pair(make_row, (20.0,) * 9, (10.0,) * 9))
    assert judge(ratio(), Files([own, published], {"rows.jsonl"}), NOTHING).measured == "2.00 times"


def cases_of(text: str) -> list[Any]:
    """What ``bench run`` commands measure."""
    found = []
    for part in text.split(" && "):
        words = shlex.split(part)
        assert words[:4] == ["python", "-m", "bench", "run"]
        given = dict(zip(words[4::2], words[5::2], strict=True))
        lists = {name: given[f"--{name}"].split(",") for name in ("models", "sizes", "modes", "executions")}
        found += sweep(
            lists.pop("models"), resolutions=[int(x) for x in given["--resolutions"].split(",")],
            batch=int(given.get("--batch", "1")), scope=given.get("--compile-scope", "block"),  # type: ignore[arg-type]
            weights=given.get("--weights", "fp32").split(","), **lists,  # type: ignore[arg-type]
        )  # fmt: skip
    return found


def test_every_command_measures_the_cases_of_its_claim() -> None:
    claims = read_claims()
    files = Files(published(), claims.files)
    for claim in claims.of(Ratio):
        cases = cases_of(judge(claim, files, read_readme()).command)
        source = files.source(claim.rows)
        for words in (claim.over, claim.under):
            row = source and source.find(Subject.parse(words), claim.figure)
            assert row, words
            assert row.case in cases, claim.id


def test_every_command_measures_what_its_curve_was_drawn_through() -> None:
    claims = read_claims()
    files = Files(published(), claims.files)
    found = [(claim, judge(claim, files, read_readme())) for claim in claims.claims]
    curves = [(claim, finding) for claim, finding in found if isinstance(claim, Crossover | Exponent)]
    compared = 0
    for claim, finding in curves:
        cases = cases_of(finding.command)
        source = files.source(*names_of(claim))
        if finding.verdict == "not measured" or source is None:
            continue
        subjects = [claim.ours, claim.peer] if isinstance(claim, Crossover) else [claim.of]
        figure = claim.figure if isinstance(claim, Exponent) else "time"
        for words in subjects:
            for size in {case.resolution for case in cases}:
                row = source.find(Subject.parse(words).at(size), figure)
                assert row is not None
                assert row.case in cases, claim.id
                compared += 1
    assert compared > len(curves)


def test_ways_of_compiling_take_a_command_each(make_row: Callable[..., Row]) -> None:
    def case(execution: str, **changes: Any) -> Any:
        return make_row("Flash-DiT-S/2", options=CUDNN, execution=execution, **changes).case

    plain, whole = case("graph"), case("compiled-graph", scope="model")
    assert measuring_each([plain]).endswith("--executions graph")
    assert measuring_each([plain, whole]).endswith("--executions graph,compiled-graph --compile-scope model")
    several = [
        whole,
        plain,
        case("compiled-graph", scope="block"),
        case("compiled-graph", scope="block", max_autotune=True),
    ]
    first, blocks, tuned = measuring_each(several).split(" && ")
    assert first.endswith("--executions compiled-graph,graph --compile-scope model")
    assert blocks.endswith("--executions compiled-graph")
    assert tuned.endswith("--executions compiled-graph --max-autotune")


def write_runs(path: Path, arms: dict[str, list[float]], **changes: Any) -> Path:
    path.write_text(
        "".join(
            json.dumps({"experiment": "srem", "arm": arm, "seed": seed, "frechet": value, "loss": 0.1, **changes})
            + "\n"
            for arm, values in arms.items()
            for seed, value in enumerate(values)
        )
    )
    return path


def order(*arms: str) -> Order:
    return Order(
        id="order",
        source="Tab. 2",
        said="in order",
        experiment="srem",
        arms=arms,
        measure="frechet",
        rows="ablation.jsonl",
    )


def test_an_order_of_arms(tmp_path: Path) -> None:
    path = write_runs(
        tmp_path / "ablation.jsonl",
        {
            "best": [10.0, 10.1, 9.9],
            "middle": [20.0, 20.3, 19.8],
            "same": [20.1, 19.9, 20.0],
            "worst": [40.0, 41.0, 40.5],
        },
    )
    files = Files([path], {"ablation.jsonl"})
    assert judge_order(order("best", "middle", "worst"), files).verdict == "holds"
    assert judge_order(order("middle", "best"), files).verdict == "does not hold"
    assert judge_order(order("middle", "same"), files).verdict == "not told apart"
    assert judge_order(order("best", "middle", "same"), files).verdict == "holds in part"
    absent = judge_order(order("best", "gone"), files)
    assert absent.verdict == "not measured"
    assert absent.command.endswith("--experiments srem --arms best,gone --seeds 3")
    assert absent.notes == ("no runs of gone in ablation.jsonl",)
    assert judge_order(order("best", "middle"), Files([], {"ablation.jsonl"})).verdict == "not measured"


def test_an_orders_ratio_is_the_geometric_mean_that_its_interval_is_around(tmp_path: Path) -> None:
    """It stands beside means: a median of three seeds may lie on the other side of theirs."""
    path = write_runs(tmp_path / "ablation.jsonl", {"better": [10.0, 10.0, 10.0], "worse": [10.0, 10.0, 13.31]})
    finding = judge_order(order("better", "worse"), Files([path], {"ablation.jsonl"}))
    assert finding.measured == "1.10 times (Fréchet distance: better 10.0, worse 11.1)"
    assert finding.interval is not None
    assert math.sqrt(finding.interval[0] * finding.interval[1]) == pytest.approx(1.1)


@pytest.mark.parametrize("differs", ["steps", "batch", "samples", "sampling_steps"])
def test_runs_of_different_length_are_no_order(tmp_path: Path, differs: str) -> None:
    path = write_runs(tmp_path / "ablation.jsonl", {"best": [10.0, 10.1]}, **{differs: 100})
    more = write_runs(tmp_path / "more.jsonl", {"worst": [20.0, 20.1]}, **{differs: 200})
    path.write_text(path.read_text() + more.read_text())
    finding = judge_order(order("best", "worst"), Files([path], {"ablation.jsonl"}))
    assert finding.verdict == "not measured"
    assert finding.notes == ("runs that differ in steps, batch or samples can't be compared in ablation.jsonl",)


def test_an_orders_command_trains_its_arms_as_long_as_they_were() -> None:
    claims = read_claims()
    file = ROWS / "ablation.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    script = runpy.run_path(str(ROOT / "examples" / "ablation.py"))
    for claim in claims.of(Order):
        finding = judge_order(claim, Files([file], claims.files))
        program, name, *words = shlex.split(finding.command)
        assert (program, name) == ("python", "examples/ablation.py")
        given = typer.main.get_command(script["app"]).make_context(name, words).params
        own = [each for each in records if each["experiment"] == claim.experiment and each["arm"] in claim.arms]
        assert {arm.name for arm, _ in script["_chosen"](given["experiments"], given["arms"], 1)} == set(claim.arms)
        if finding.verdict == "not measured":
            continue
        assert {each["seed"] for each in own} == set(range(given["seeds"]))
        for option in ("batch", "samples", "sampling_steps", *(["steps"] if claim.experiment != "seconds" else [])):
            assert {each[option] for each in own} == {given[option]}, (claim.id, option)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[]", "no object"),
        ("{", "not JSON"),
        ('{"experiment": "srem", "arm": 1, "seed": 0}', "arm must be str"),
        ('{"experiment": "srem", "arm": "a", "seed": 0, "frechet": -1}', "frechet must be above 0"),
        ('{"experiment": "srem", "arm": "a", "seed": 0, "frechet": NaN}', "NaN is no number of JSON"),
        ('{"experiment": "srem", "arm": "a", "seed": 0, "steps": "800"}', "steps must be a count"),
    ],
)
def test_lines_that_are_no_runs_are_refused(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "ablation.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ResultError, match=why):
        read_runs([path])


def test_counts_of_tab_1() -> None:
    claims = {claim.id: claim for claim in read_claims().of(Count)}
    small = Count(
        id="small", source="Tab. 1", said="1.09", what="paper gmac", models=("DiG-S/4",), values=("1.09",), within=0.1
    )
    assert judge(small, Files([], []), NOTHING).verdict == "holds"
    wrong = Count(
        id="small", source="Tab. 1", said="31.6", what="parameters", models=("DiG-S/4",), values=("31.6",), within=0.1
    )
    assert judge(wrong, Files([], []), NOTHING).verdict == "does not hold"
    assert {"tab1-parameters", "tab1-gflops", "tab1-share"} <= claims.keys()
    with pytest.raises(ClaimError, match="DoG"):
        judge(
            Count(id="a", source="b", said="c", what="gmac", models=("DoG-S/4",), values=("1",), within=1),
            Files([], []),
            NOTHING,
        )


def test_it_is_told_as_text_markdown_and_json(make_row: Callable[..., Row], write_rows: Rows, tmp_path: Path) -> None:
    rows = write_rows(pair(make_row, (20.0,) * 9, (10.0,) * 9))
    path = tmp_path / "claims.toml"
    path.write_text(CLAIM.replace("twice as fast", "twice | `as` <b>fast</b>"))
    result = runner.invoke(command.app, [str(rows), "--claims", str(path)])
    assert result.exit_code == 0
    assert "1 claim: 1 holds\n" in result.output
    assert runner.invoke(command.app, [str(rows.parent), "--claims", str(path)]).output == result.output
    assert "$ python -m bench run" in result.output
    out = tmp_path / "out"
    assert runner.invoke(command.app, [str(rows), "--claims", str(path), "--out", str(out)]).exit_code == 0
    (record,) = json.loads((out / "claims.json").read_text())
    judged = ("command", "judging", "again")
    assert set(record) == {"id", "source", "said", "measured", "interval", "verdict", *judged, "notes"}
    assert (record["measured"], record["interval"], record["verdict"]) == ("2.00 times", [1.99, 2.01], "holds")
    markdown = (out / "claims.md").read_text()
    assert "<b>" not in markdown
    assert next(line for line in markdown.splitlines() if line.startswith("| faster")).count("|") == 6


def test_the_published_report_is_of_the_published_rows() -> None:
    stored = {record["id"]: record for record in json.loads((ROWS.parent / "claims.json").read_text())}
    claims = read_claims()
    cheap = type(claims)(claims=tuple(claim for claim in claims.claims if not isinstance(claim, Count)))
    found = judge_all(cheap, Files(published(), claims.files), read_readme())
    assert stored.keys() == {claim.id for claim in claims.claims}
    for finding in found:
        assert stored[finding.id] == json.loads(to_json([finding]))[0], "nox -s report writes it again"
    assert to_text(found).count("\n    $ ") == len(found)
    assert to_markdown(found).startswith("# Claims")
