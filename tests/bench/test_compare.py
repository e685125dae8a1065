"""Two results files: verdicts, exit statuses, and a summary that cannot be broken by what it quotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cli import main as cli
from bench.judge.compare import (
    INCONCLUSIVE,
    NO_REGRESSION,
    REGRESSION,
    Thresholds,
    ambiguous_cases,
    compare_rows,
    exit_status,
    marks_of,
    to_markdown,
)
from bench.judge.regression import Plan, gpu_suite, quick_suite
from bench.messages import cell
from bench.store.ledgers import Checks, Memory
from bench.store.migrations import SCHEMA
from bench.store.rows import Row, read_results
from bench.store.selection import differences, newest

CASE = Case(model="DiG-S/2", resolution=256)
STEADY = (10.0, 10.01, 9.99, 10.02, 9.98)
runner = CliRunner()


def rows(times: Sequence[float], *, case: Case = CASE, peak: int = 10**9, **changes: object) -> list[Row]:
    memory = Memory(parameters=1, allocator_peak=peak)
    return [
        Row(case=case, status="ok", started_at="", samples_ms=(ms,), memory=memory, launch=i, **changes)
        for i, ms in enumerate(times)
    ]


def scaled(factor: float) -> list[float]:
    return [factor * ms for ms in STEADY]


def failed(status: str = "error", message: str = "broke") -> list[Row]:
    return [Row(case=CASE, status=status, started_at="", message=message)]


def write(path: Path, content: Sequence[Row]) -> str:
    path.write_text("".join(row.to_json() + "\n" for row in content))
    return str(path)


@pytest.mark.parametrize(
    ("change", "time", "memory", "status"),
    [
        (rows(scaled(1.0)), "same", "same", 0),
        (rows(scaled(1.05)), "slower", "same", 1),
        (rows(scaled(0.9)), "faster", "same", 0),
        (rows(scaled(1.0), peak=11 * 10**8), "same", "slower", 1),
        (rows(scaled(1.0), peak=9 * 10**8), "same", "faster", 0),
        (rows([10.0, 10.6, 9.6, 10.5, 9.9]), "ambiguous", "same", 3),
        (rows([10.5]), "ambiguous", "same", 3),
        (rows([10.5], peak=2 * 10**9), "ambiguous", "slower", 1),
    ],
)
def test_verdicts_and_status(change: list[Row], time: str, memory: str, status: int) -> None:
    findings = compare_rows(rows(STEADY), change, Thresholds())
    assert {f.metric: f.verdict for f in findings} == {"time": time, "memory": memory}
    assert exit_status(findings) == status


def test_a_change_that_fails_where_the_base_ran_is_a_regression() -> None:
    (finding,) = compare_rows(rows(STEADY), failed("oom", "CUDA out of memory"), Thresholds())
    assert exit_status([finding]) == 1
    assert "the change failed: oom: CUDA out of memory" in finding.note


@pytest.mark.parametrize(
    ("base", "change", "alone", "beside", "words"),
    [
        (failed("oom", "full"), failed("oom", "full"), 3, 0, "neither side ran; the base: oom: full; the change: oom"),
        (failed("oom"), failed("error"), 3, 0, "neither side ran"),
        (failed("timeout"), failed("timeout"), 3, 0, "neither side ran"),
        (failed("oom"), rows(STEADY), 3, 0, "the base failed (oom: broke), the change did not"),
        (failed("error"), rows(STEADY), 3, 3, "the base failed (error: broke), the change did not"),
        (rows(STEADY), failed("oom"), 1, 1, "the change failed"),
    ],
)
def test_a_case_without_two_sides_counts_only_where_it_may_hide_something(
    base: list[Row], change: list[Row], alone: int, beside: int, words: str
) -> None:
    findings = compare_rows(base, change, Thresholds())
    assert words in findings[0].note
    assert exit_status(findings) == alone
    other = Case(model="DiT-S/2", resolution=256)
    more = [compare_rows(rows(STEADY, case=other), rows(scaled(f), case=other), Thresholds()) for f in (1.0, 1.05)]
    assert exit_status([*findings, *more[0]]) == beside
    assert exit_status([*findings, *more[1]]) == 1


def test_the_summary_lists_what_ran_on_neither_side() -> None:
    other = Case(model="DiT-S/2", resolution=256)
    same = [*rows(STEADY, case=other)]
    findings = compare_rows([*failed("oom"), *same], [*failed("oom"), *same], Thresholds())
    text = to_markdown(findings, Thresholds(), title="a against b")
    assert text.startswith("## No regression: ")
    assert "unmeasured: neither side ran" in text
    assert "count for nothing: 1" in text
    alone = to_markdown(findings[:1], Thresholds(), title="a against b")
    assert alone.startswith("## Nothing was measured: ")


def test_launches_of_the_change_that_fail_are_not_passed_over() -> None:
    change = rows(STEADY[:4])
    change.append(Row(case=CASE, status="error", started_at="", message="not finite", launch=4))
    findings = compare_rows(rows(STEADY), change, Thresholds())
    assert exit_status(findings) == 1
    assert "1 of 5 launches of the change failed" in findings[-1].note
    both = compare_rows(change, change, Thresholds())
    assert not any(finding.broken for finding in both)
    assert exit_status(compare_rows(change, rows(STEADY), Thresholds())) != 1


@pytest.mark.parametrize(("peak", "verdict"), [(1.05, "same"), (1.2, "slower"), (0.8, "faster")])
def test_on_a_cpu_a_peak_is_the_whole_process_and_counts_from_a_tenth(peak: float, verdict: str) -> None:
    case = replace(CASE, device="cpu", execution="eager")
    sides = [rows(STEADY, case=case, peak=bytes_) for bytes_ in (10**9, int(peak * 10**9))]
    assert {f.metric: f.verdict for f in compare_rows(*sides, Thresholds())}["memory"] == verdict


def test_other_inputs_are_not_comparable() -> None:
    sides = [rows(STEADY, checks=Checks(inputs=digest, tokens=4)) for digest in ("aa", "bb")]
    (finding,) = compare_rows(*sides, Thresholds())
    assert "other inputs" in finding.note
    assert exit_status([finding]) == 3


def test_a_noise_floor_stands_in_for_launches_and_raises_the_least_effect() -> None:
    one = Thresholds(noise=0.01)
    assert [f.verdict for f in compare_rows(rows([10.0]), rows([10.5]), one)] == ["slower", "same"]
    loud = Thresholds(noise=0.08)
    assert loud.least_time == 0.08
    assert compare_rows(rows(STEADY), rows(scaled(1.05)), loud)[0].verdict == "same"


def test_only_undecided_numbers_are_worth_measuring_again() -> None:
    noisy = compare_rows(rows(STEADY), rows([10.0, 10.6, 9.6, 10.5, 9.9]), Thresholds())
    assert ambiguous_cases(noisy) == [CASE]
    assert ambiguous_cases(compare_rows(failed(), failed(), Thresholds())) == []


def test_the_summary_says_what_changed_first_and_escapes_what_it_quotes() -> None:
    evil = "| x | </details> <script>alert(1)</script> ](http://x) `@someone\n\n# heading"
    other = Case(model="DiT-S/2", resolution=256)
    findings = compare_rows(
        [*rows(STEADY), *rows(STEADY, case=other)], [*failed(message=evil), *rows(STEADY, case=other)], Thresholds()
    )
    text = to_markdown(findings, Thresholds(), title="a against b", notes=[evil])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert text.startswith("## Regression: ")
    assert {line.count("|") for line in table} == {8}
    assert "broken" in table[2]
    assert not {"<script>", "](http", "@someone", "\n# heading"} & {
        part for part in ("<script>", "](http", "@someone", "\n# heading") if part in text
    }
    assert cell("a_b*c _d_ #1 $x$ &#35;") == "a_b&#42;c &#95;d&#95; &#35;1 &#36;x&#36; &amp;&#35;35;"


def test_marks_are_counted_by_launch_and_only_of_rows_that_count() -> None:
    hot = rows(STEADY, marks=("throttled",))
    cooled = [replace(hot[0], marks=("measured-again",))]
    assert marks_of([*hot, *cooled], hot) == [
        "1 launches are marked measured-again",
        "9 launches are marked throttled",
    ]
    assert marks_of(rows(STEADY), []) == []


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.05, 1), (0.9, 0)])
def test_the_command_ends_with_the_status(factor: float, status: int, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", rows(STEADY)), write(tmp_path / "b.jsonl", rows(scaled(factor)))]
    result = runner.invoke(cli.app, ["compare", *files, "--out", str(tmp_path / "s.md")])
    assert result.exit_code == status, result.output
    assert (tmp_path / "s.md").read_text() == result.output
    assert "DiG-S/2" in result.output


def test_nothing_in_common_is_inconclusive(tmp_path: Path) -> None:
    other = Case(model="DiT-S/2", resolution=256)
    files = [write(tmp_path / "a.jsonl", rows(STEADY)), write(tmp_path / "b.jsonl", rows(STEADY, case=other))]
    result = runner.invoke(cli.app, ["compare", *files])
    assert result.exit_code == 3
    assert "Nothing was measured" in result.output
    assert "1 cases are only in a.jsonl" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--least-effect", "two"], "--least-effect takes a percentage"),
        (["--least-effect", "0"], "--least-effect takes a percentage"),
        (["--noise", "200%"], "--noise takes a percentage"),
        (["--out", "a.jsonl/s.md"], "cannot write a.jsonl/s.md: Not a directory; choose another --out"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", rows(STEADY))
    result = runner.invoke(cli.app, ["compare", path, path, *options])
    assert result.exit_code == 2
    assert message in result.output


def test_unreadable_files(tmp_path: Path) -> None:
    newer = tmp_path / "b.jsonl"
    newer.write_text(rows(STEADY)[0].to_json().replace(f'"schema":{SCHEMA}', '"schema":9') + "\n")
    path = write(tmp_path / "a.jsonl", rows(STEADY))
    for other, message in ((tmp_path / "absent", "cannot read"), (newer, "update the project to read the file")):
        result = runner.invoke(cli.app, ["compare", path, str(other)])
        assert result.exit_code == 2
        assert message in result.output


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_export_keeps_the_figures(format: str, tmp_path: Path) -> None:
    content = [*rows(STEADY, marks=("throttled",), environment={"gpu_name": "H100"}), *failed("oom")]
    path = write(tmp_path / "a.jsonl", content)
    result = runner.invoke(cli.app, ["export", path, "--format", format])
    assert result.exit_code == 0, result.output
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv}[format]
    frame = read(tmp_path / f"a.{format}")
    assert list(frame["median_ms"][:5]) == list(STEADY)
    assert list(frame["status"]) == ["ok"] * 5 + ["oom"]
    assert frame["memory.allocator_peak"][0] == 10**9
    assert frame["marks"][0] == "throttled"
    assert frame["case.model"][0] == "DiG-S/2"
    assert frame["environment.gpu_name"][0] == "H100"


def test_export_refuses_other_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(STEADY))
    assert "choose parquet or csv" in runner.invoke(cli.app, ["export", path, "--format", "xls"]).output
    empty = write(tmp_path / "empty.jsonl", [])
    assert "holds no rows" in runner.invoke(cli.app, ["export", empty]).output


def test_launches_that_waited_for_other_work_raise_no_alarm() -> None:
    base = rows([13.3, 13.7, 14.1, 202.4, 46.3, 328.0])
    change = rows([14.0, 14.1, 38.7, 880.0, 369.0, 402.5])
    assert all(slower.median_ms > row.median_ms for row, slower in zip(base, change, strict=True))
    (time, _) = compare_rows(base, change, Plan(cases=(CASE,)).judged_by)
    assert time.interval is not None
    assert time.interval.low < 1 < time.interval.high
    assert time.verdict == "ambiguous"
    assert "the machine was busy" in time.note
    assert ambiguous_cases([time]) == [CASE]
    assert exit_status([time]) == INCONCLUSIVE


def test_a_change_that_made_launches_erratic_is_still_judged() -> None:
    base = rows([10.0, 10.1, 10.0, 9.9, 10.0, 10.1])
    change = rows([12.0, 15.0, 20.0, 12.0, 25.0, 14.0])
    (time, _) = compare_rows(base, change, Thresholds())
    assert time.verdict == "slower"


PUBLISHED = Path(__file__).parents[1] / "data" / "regression"


@pytest.mark.parametrize(
    ("run", "status"), [*((f"itself-{i}", NO_REGRESSION) for i in range(10)), ("slowed", REGRESSION)]
)
def test_published_runs_on_the_h100_are_judged_as_the_docs_say(run: str, status: int) -> None:
    base, change = (read_results(PUBLISHED / run / f"{side}.jsonl").rows for side in ("base", "change"))
    assert exit_status(compare_rows(base, change, Plan(cases=tuple(quick_suite())).judged_by)) == status


def test_a_published_case_that_the_host_disturbs_is_left_undecided_and_near_one() -> None:
    base, change = (read_results(PUBLISHED / "gate" / f"{side}.jsonl").rows for side in ("base", "change"))
    findings = compare_rows(base, change, Plan(cases=tuple(gpu_suite())).judged_by)
    (open_case,) = [f for f in findings if f.verdict != "same"]
    assert (open_case.verdict, open_case.case.execution, open_case.launches) == ("ambiguous", "eager", (18, 18))
    assert open_case.interval is not None
    assert open_case.interval.ratio == pytest.approx(1, abs=1e-3)


def test_the_newest_measurement_of_each_side_is_judged(tmp_path: Path) -> None:
    """30 launches of one key, then 5 of a newer one that are a tenth slower: they are what the file says now."""
    old = rows([10.0 + 0.01 * (i % 3) for i in range(30)], key="old")
    mixed = write(tmp_path / "b.jsonl", [*old, *rows(scaled(1.1), key="new")])
    result = runner.invoke(cli.app, ["compare", write(tmp_path / "a.jsonl", old), mixed])
    assert result.exit_code == 1, result.output
    assert "**slower**" in result.output
    assert "b.jsonl: rows left out: 30 of older code" in result.output
    exported = runner.invoke(cli.app, ["export", mixed])
    assert "not newest: 30 of older code" in exported.output
    frame = pd.read_parquet(tmp_path / "b.parquet")
    assert list(frame["newest"]) == [False] * 30 + [True] * 5


def test_two_cards_in_one_file_are_compared_each_with_itself(tmp_path: Path) -> None:
    cards = [{"gpu_name": "H100"}, {"gpu_name": "H200"}]
    base = [*rows(STEADY, environment=cards[0]), *rows(scaled(0.5), environment=cards[1])]
    change = [*rows(scaled(1.1), environment=cards[0]), *rows(scaled(0.5), environment=cards[1])]
    findings = compare_rows(base, change, Thresholds())
    assert [(f.machine, f.verdict) for f in findings if f.metric == "time"] == [("H100", "slower"), ("H200", "same")]
    text = to_markdown(findings, Thresholds(), title="a against b")
    assert "on cuda, H200 | time" in text
    only = runner.invoke(
        cli.app, ["compare", write(tmp_path / "a.jsonl", base), write(tmp_path / "b.jsonl", change[:5])]
    )
    assert "1 cases are on H200 in a.jsonl alone: left out there" in only.output


def test_two_machines_get_a_ratio_and_a_verdict_only_if_asked(tmp_path: Path) -> None:
    versions = [{"gpu_name": "H100", "torch": "2.11"}, {"gpu_name": "A100", "torch": "2.13"}]
    files = [
        write(tmp_path / name, rows(scaled(factor), environment=environment))
        for name, factor, environment in zip(("a.jsonl", "b.jsonl"), (1.0, 1.5), versions, strict=True)
    ]
    result = runner.invoke(cli.app, ["compare", *files])
    assert result.exit_code == INCONCLUSIVE
    assert "1.5000 [" in result.output
    assert "measured on two machines; --across-machines judges all the same" in result.output.replace("&#45;", "-")
    for line in ("differs: machine: H100 in a.jsonl; A100 in b.jsonl", "differs: torch: 2.11 in a.jsonl; 2.13 in b.j"):
        assert line in result.output
    assert runner.invoke(cli.app, ["compare", *files, "--across-machines"]).exit_code == REGRESSION


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    shared = {"cpu": "X", "cpus": "0-1", "packages": {"fla": "1"}, "commit": "a" * 40}
    one = rows(STEADY, environment={**shared, "variables": {"OMP_NUM_THREADS": "2"}})
    # The harness writes a failed row, and knows less than a worker.
    other = rows(STEADY, environment={**shared, "variables": {}, "cpus": "0", "cuda": "13.0"})
    output = runner.invoke(
        cli.app, ["compare", write(tmp_path / "a.jsonl", one), write(tmp_path / "b.jsonl", other)]
    ).output
    found = [line for line in output.splitlines() if "differs" in line]
    assert found == [
        "- differs: cpus: 0-1 in a.jsonl; 0 in b.jsonl",
        "- differs: variable OMP_NUM_THREADS: 2 in a.jsonl; none in b.jsonl",
    ]


def test_a_ratio_is_shown_even_without_a_verdict() -> None:
    findings = compare_rows(rows([10.0]), rows([12.0]), Thresholds())
    assert "| 1.2000 |" in to_markdown(findings, Thresholds(), title="x")
    assert findings[0].verdict == "ambiguous"


def test_launches_that_failed_on_the_base_are_told_too(tmp_path: Path) -> None:
    base = [*rows(STEADY), Row(case=CASE, status="timeout", started_at="", launch=5)]
    files = [write(tmp_path / "a.jsonl", base), write(tmp_path / "b.jsonl", rows(STEADY))]
    output = runner.invoke(cli.app, ["compare", *files]).output
    assert "- a.jsonl: launches that failed, and are in no median: 1 timeout" in output


def test_what_was_measured_last_is_newest_in_whatever_order_a_file_was_put_together() -> None:
    old = [replace(row, started_at="2026-11-21T00:00:00+00:00") for row in rows(scaled(1.0), key="old")]
    new = [replace(row, started_at="2026-11-23T00:00:00+00:00") for row in rows(scaled(1.1), key="new")]
    for content in (old + new, new + old):
        assert {row.key for row in newest(content).rows} == {"new"}


def test_two_cards_of_one_name_and_their_hosts_are_named() -> None:
    here, there = ({"gpu_name": "H100", "gpu_uuid": f"GPU-{x}", "cpu": f"CPU {x}"} for x in "ab")
    sides = [("A", rows(scaled(1.0), environment=here)), ("B", rows(scaled(1.0), environment=there))]
    assert differences(sides) == ["card: GPU-a in A; GPU-b in B", "host processor: CPU a in A; CPU b in B"]
