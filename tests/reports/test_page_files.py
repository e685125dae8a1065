"""The page, its Markdown and its files: whole, the same each time, and with nothing on them that is not meant."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.store.profiles import ProfileRow
from bench.store.rows import ResultError, read_results
from dig.environment import ROOT
from reports.page.__main__ import app
from reports.page.claims import Claim, counted, read_claims
from reports.page.commands import scaling_command
from reports.page.entries import entries
from reports.page.evidence import Evidence, Probe, gather
from reports.page.html import NEEDED, page
from reports.page.markdown import markdown
from reports.page.sections import NAMES, figures
from tests.reports.page_rows import HOSTILE, profiled, step_rows, timed, write_everything


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Evidence:
    return gather([write_everything(tmp_path_factory.mktemp("rows"))])


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result) -> str:
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line


class Elements(HTMLParser):
    """What is an element of a page, and what is text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(tmp_path: Path, text: str) -> None:
    evidence = gather([write_everything(tmp_path, text)])
    found = Elements(page(evidence, figures(evidence), text))
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert [script["type"] for script in scripts] == ["application/json", "module", "module"]
    names = {name for _, attributes in found.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not {tag for tag, _ in found.tags} & {"b", "iframe"}
    links = [attributes.get("href", "") for tag, attributes in found.tags if tag == "a"]
    assert all(link.startswith("#") for link in links)
    assert [attributes for tag, attributes in found.tags if tag == "img"] == []
    assert any(text in each for each in found.texts)
    data = next(each for each in found.texts if each.startswith('{"charts"'))
    assert "<" not in data
    assert text in {entry["message"] for entry in json.loads(data)["entries"]}
    pulled = markdown(evidence, figures(evidence), text)
    outside = re.sub(r"```.*?```", "", pulled, flags=re.DOTALL)
    assert not re.search(r"<(script|img|b|a)\b", outside)


def test_the_page_asks_for_nothing(evidence: Evidence) -> None:
    text = page(evidence, figures(evidence))
    found = Elements(text)
    for tag, attributes in found.tags:
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert tag not in ("link", "iframe", "object", "embed")
    (policy,) = [
        attributes["content"] for _, attributes in found.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]  # fmt: skip
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "@import" not in text
    assert "url(" not in text.partition("</style>")[0]


def test_the_page_has_every_figure_claim_and_row(evidence: Evidence) -> None:
    found = Elements(page(evidence, figures(evidence)))
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert {f"figure-{name}" for name in NAMES} <= ids
    assert {"claims", "explore", "rows"} <= ids
    assert sum("data-i" in attributes for _, attributes in found.tags) == len(evidence.rows)
    words = " ".join(found.texts)
    assert "does not hold" in words
    assert "[9.50, 9.70]" in words
    copied = [attributes["data-command"] for _, attributes in found.tags if "data-command" in attributes]
    measured = "python -m bench run --suite paper && python -m reports.claims out/results.jsonl --id speed"
    assert measured in copied
    again = "python -m reports.claims rows.jsonl --id speed"
    assert again in copied
    # What each of the two lines is for stands above it.
    following = dict(zip(found.texts, found.texts[1:], strict=False))
    assert (following["Measure and judge it"], following["Judge these rows alone"]) == (measured, again)
    pulled = markdown(evidence, figures(evidence))
    assert f"\n{measured}\n" in pulled
    assert f"\n{again}\n" in pulled


def test_without_claims_there_is_no_section_for_them(tmp_path: Path) -> None:
    folder = write_everything(tmp_path)
    (folder / "claims.json").unlink()
    evidence = gather([folder])
    ids = {attributes.get("id") for _, attributes in Elements(page(evidence, figures(evidence))).tags}
    assert "claims" not in ids
    assert "## Claims" not in markdown(evidence, figures(evidence))


@pytest.mark.parametrize(
    ("verdict", "tone"),
    [("holds", "good"), ("does not hold", "bad"), ("fails", "bad"), ("not measured", "open"), ("", "open"),
     ("holds in part", "open"), ("ambiguous", "open"), ("not told apart", "open")],
)  # fmt: skip
def test_a_verdicts_tone(verdict: str, tone: str) -> None:
    assert Claim(id="x", verdict=verdict).tone == tone


def test_markdown_has_the_same_numbers(evidence: Evidence) -> None:
    text = markdown(evidence, figures(evidence))
    assert "## Claims and verdicts" in text
    assert "| 256 |" in text
    assert "![Speed against resolution, size S/2](figures/fig1a.png)" in text
    assert "OOM" in text
    for found in figures(evidence):
        assert found.command in text


# Files


@pytest.mark.slow
def test_it_writes_the_page_its_markdown_and_every_figure(tmp_path: Path) -> None:
    folder, out = write_everything(tmp_path / "rows"), tmp_path / "new" / "out"
    result = run(folder, "--out", out, "--title", "A title of my own")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"index.html", "report.md", "rows.csv", "figures"}
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}.{ending}" for name in NAMES for ending in ("png", "svg", "csv")
    }
    assert "<title>A title of my own</title>" in (out / "index.html").read_text()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(folder, "--out", out, "--title", "A title of my own").exit_code == 0
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_figures_can_be_chosen(tmp_path: Path) -> None:
    folder, out = write_everything(tmp_path / "rows"), tmp_path / "out"
    assert run(folder / "rows.jsonl", "--out", out, "--figure", "fig1b", "--figure", "memory").exit_code == 0
    assert {path.name for path in out.rglob("*.png")} == {"fig1b.png", "memory.png"}
    assert not (out / "index.html").exists()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(timed("DiG", "triton", "S", 512, 1.0, mode="train").to_json() + "\n")
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "lead.png").touch()
    result = run(path, "--out", tmp_path / "out", "--figure", "lead")
    assert result.exit_code == 0
    assert "did not write lead: no file has both" in result.stdout
    assert "lead.png there is from an earlier run" in result.stdout


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "rows")
    empty = tmp_path / "empty"
    empty.mkdir()
    alien = tmp_path / "alien.jsonl"
    alien.write_text('{"kind": "something"}\n')
    torn = tmp_path / "claims.json"
    torn.write_text('[{"said": "no name"}]')
    out = tmp_path / "out"
    assert "cannot read" in one_line(run(tmp_path / "none.jsonl", "--out", out))
    assert one_line(run(empty, "--out", out)) == f"error: no rows in {empty}; run the benchmark first"
    assert "is no row of the benchmark" in one_line(run(alien, "--out", out))
    assert "did you mean fig1b?" in one_line(run(folder, "--out", out, "--figure", "fig1"))
    assert "not a file of claims: claim 1 lacks id" in one_line(run(folder, "--out", out, "--claims", torn))
    torn.write_text('[{"id": 1}]')
    assert "claim 1 says nothing" in one_line(run(folder, "--out", out, "--claims", torn))
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("\n")
    assert one_line(run(nothing, "--out", out)) == f"error: no rows in {nothing}; run the benchmark first"
    assert "choose another --out" in one_line(run(folder, "--out", alien))
    assert not out.exists()


def test_rows_without_memory_leave_out_its_figure_alone(tmp_path: Path) -> None:
    rows = [replace(row, memory=None) for row in step_rows()]
    (tmp_path / "rows.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    result = run(tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "did not write fig1b: no row of size S and patch 2 says what memory it took" in result.output
    assert (tmp_path / "out" / "figures" / "fig1a.png").is_file()


def test_of_a_folder_other_files_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "rows")
    (folder / "train.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    evidence = gather([folder])
    assert any("train.jsonl: left out" in warning for warning in evidence.warnings)


def test_runs_that_are_drawn_are_not_said_to_be_left_out(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "rows")
    published = ROOT / "results" / "h100" / "ablation.jsonl"
    (folder / "ablation.jsonl").write_text(published.read_text())
    result = run(folder, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "wrote" in result.output
    assert "ablation.png" in result.output
    assert "left out; its first line" not in result.output
    assert f"Drawn from the logs in {folder / 'ablation.jsonl'}." in (tmp_path / "out" / "report.md").read_text()
    again = run(folder, "--out", tmp_path / "one", "--figure", "ablation", "--figure", "fashion")
    assert "did not write fashion: no folder" in again.output
    names = {path.name for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert names == {"ablation.png", "ablation.svg", "ablation.csv"}
    (folder / "ablation.jsonl").write_text('{"experiment": "srem"}\n')
    result = run(folder, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"warning: no picture of {folder / 'ablation.jsonl'}: " in result.output


def test_an_interval_without_width_is_none(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    claims = [{"id": "peak", "interval": [94.4, 94.4]}, {"id": "time", "interval": [1, 2]}]
    path.write_text(json.dumps([{**claim, "said": "so"} for claim in claims]))
    assert [claim.interval for claim in read_claims(path)] == [None, (1, 2)]


def test_verdicts_are_counted_in_their_own_words() -> None:
    verdicts = ("not measured", "holds in part", "holds", "holds", "does not hold", "odd", "")
    claims = [Claim(id=str(place), verdict=verdict) for place, verdict in enumerate(verdicts)]
    assert (
        counted(claims) == "7 claims: 2 hold, 1 holds in part, 1 does not hold, 2 not measured, 1 with another verdict."
    )
    assert counted([]) == ""


def test_a_profiles_row_survives_the_disk() -> None:
    row = profiled()
    assert ProfileRow.from_json(row.to_json()) == row
    with pytest.raises(ResultError, match="parts must be products, heart, rest"):
        ProfileRow.from_json(row.to_json().replace('"heart"', '"rest"'))


def test_probes_of_before_are_read_too() -> None:
    line = '{"model": "DiG-XL/2", "options": {"recurrence": "triton"}, "mode": "train", "resolution": 256, "batch": 8, '
    probe = Probe.from_json(line + '"fits": true, "peak": 5}')
    assert probe.case.options == (("backend", "triton"),)
    assert (probe.case.batch, probe.fits, probe.peak) == (8, True, 5)
    with pytest.raises(ResultError, match="not a probe"):
        Probe.from_json('{"fits": "yes"}')


def test_the_page_needs_no_torch() -> None:
    code = "import sys, reports.page.__main__; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_it_says_to_install_is_what_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert NEEDED in project["project"]["optional-dependencies"]["report"]
    assert NEEDED in project["dependency-groups"]["test"]


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    from reports.page import html

    html.library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    line = one_line(run(write_everything(tmp_path / "rows"), "--out", tmp_path / "out"))
    assert line.startswith("error: the page needs vl-convert-python; pip install")
    html.library.cache_clear()


def test_rows_of_several_gpus_are_listed_with_their_own_command() -> None:
    path = ROOT / "results" / "h100" / "scaling.jsonl"
    cases = {row.case for row in read_results(path).rows if row.case.parallel}
    listed = {entry.command: entry for entry in entries(gather([path])) if "GPUs by" in entry.way}
    assert {scaling_command(case) for case in cases} == set(listed)
    for case in cases:
        entry = listed[scaling_command(case)]
        assert entry.batch == case.batch * case.processes
        assert entry.command.startswith("python -m bench scaling --models ")
        assert f" --parallel {case.parallel} " in entry.command


def test_runs_of_equal_seconds_alone_are_no_picture_and_no_error(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "rows")
    (folder / "ablation.jsonl").write_text((ROOT / "results" / "h200" / "ablation.jsonl").read_text())
    result = run(folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "ablation.png" not in result.output
