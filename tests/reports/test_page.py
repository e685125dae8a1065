"""The page and its figures say what the rows say, and nothing that no row says."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.suites import sweep
from bench.cli.main import app as bench
from bench.store.profiles import ProfileRow
from bench.store.rows import ResultError, read_results
from dig.environment import ROOT
from dig.registry import families
from reports.looks import Looks
from reports.page.__main__ import app
from reports.page.chart import Chart, Missing
from reports.page.claims import Claim
from reports.page.colors import DARK_PAGE, LEAST_CONTRAST, contrast, luminance, on_dark
from reports.page.commands import run_command
from reports.page.drawn import PART_COLORS, draw
from reports.page.evidence import Evidence, Probe, gather
from reports.page.html import NEEDED, PARTS_ON_DARK, page
from reports.page.markdown import markdown
from reports.page.sections import NAMES, figures
from tests.reports.page_rows import HOSTILE, profiled, step_rows, timed, write_everything

ROWS = sorted((ROOT / "results").rglob("*.jsonl"))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Evidence:
    return gather([write_everything(tmp_path_factory.mktemp("rows"))])


def chart(evidence: Evidence, name: str) -> Chart:
    (found,) = figures(evidence, [name])
    assert isinstance(found, Chart)
    return found


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result) -> str:
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line


# Commands


def parsed(command: str) -> dict:
    program, flag, package, name, *words = shlex.split(command)
    assert (program, flag, package) == ("python", "-m", "bench")
    found = typer.main.get_command(bench).commands[name]
    return found.make_context(name, words).params


def cases_of(command: str, device: str) -> list[Case]:
    given = parsed(command)
    return sweep(
        given["models"].split(","), sizes=given["sizes"].split(","), patch=given["patch"],
        resolutions=list(map(int, given["resolutions"].split(","))), modes=given["modes"].split(","),
        executions=given["executions"].split(","), scope=given["compile_scope"], max_autotune=given["max_autotune"],
        batch=given["batch"], dtype=given["dtype"] or ("bf16" if device == "cuda" else "fp32"),
        weights=given["weights"].split(","), device=device,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["rows.jsonl", "best.jsonl", "extra.jsonl"])
def test_a_rows_command_measures_its_case_and_no_other(path: str) -> None:
    cases = {row.case for row in read_results(ROOT / "results" / "h100" / path).rows}
    assert cases
    for case in cases:
        assert cases_of(run_command([case]), case.device) == [case], case.describe()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_figure_is_one(evidence: Evidence, name: str) -> None:
    for found in figures(evidence, [name]):
        commands = [found.command]
        if isinstance(found, Chart):
            commands += [command for _, command in found.missing]
            commands += [each.command for panel in found.panels for each in panel.data]
        for command in dict.fromkeys(commands):
            for part in command.split(" && "):
                assert parsed(part)


def test_a_figures_command_measures_what_it_shows(evidence: Evidence) -> None:
    found = chart(evidence, "fig1a")
    cases = {(case.resolution, case.family, case.options) for case in cases_of(found.command, "cuda")}
    assert len(cases) == len(found.panels[0].data)


# Numbers


def test_figure_1_has_every_rows_speed_with_its_interval(evidence: Evidence) -> None:
    rows = [row for row in step_rows() if row.case.mode == "train" and row.case.size == "S"]
    found = {(each.series, each.x): each for each in chart(evidence, "fig1a").panels[0].data}
    assert len(found) == len(rows)
    for row in rows:
        label = next(name for series, name in evidence.labels.items() if series.options == row.case.options)
        each = found[label, float(row.case.resolution)]
        if row.status == "ok":
            assert each.y == pytest.approx(row.fps)
            assert each.low < each.y < each.high
        else:
            assert (each.y, each.word) == (None, "OOM")


def test_the_lead_is_attentions_time_over_digs(evidence: Evidence) -> None:
    (panel,) = chart(evidence, "lead").panels
    assert [each.x for each in panel.data] == [256.0, 1024.0]
    assert [each.y for each in panel.data] == pytest.approx([3.0 / 2.1, 16 * 3.0 / (4 * 2.1)])
    assert all(each.low < each.y < each.high for each in panel.data)
    assert {each.label for each in panel.data} == {"FA4"}


def test_a_steps_parts_add_up_to_the_eager_step(evidence: Evidence) -> None:
    panel = next(each for each in chart(evidence, "parts").panels if each.name.startswith("S/2 training step at 1024"))
    ours = {each.part: each.y for each in panel.data if each.x == "DiG (triton)"}
    # 2 ms at 256 are 8 at 1024; the profile's quarters and half of it, and 30 ms of launches.
    assert ours == pytest.approx({"products": 2.0, "attention or recurrence": 4.0, "the rest": 2.0, "launches": 30.0})
    theirs = {each.part: each.y for each in panel.data if each.x == "DiT (materialized)"}
    assert theirs == pytest.approx({"all kernels": 320.0, "launches": 30.0})
    missing = [command for _, command in chart(evidence, "parts").missing]
    assert any("bench profile --model DiT-S/2:materialized" in command for command in missing)


def test_the_ledgers_parts_add_up_to_the_peak(evidence: Evidence) -> None:
    rows = {row.case: row for row in step_rows() if row.status == "ok"}
    found = chart(evidence, "memory")
    assert found.panels
    for panel in found.panels:
        for bar in {each.x for each in panel.data}:
            total = sum(each.y for each in panel.data if each.x == bar)
            peaks = {row.memory.peak / 2**30 for case, row in rows.items() if f" at {case.resolution}," in panel.name}
            assert any(total == pytest.approx(peak) for peak in peaks)


def test_the_roofline_is_the_profiles(evidence: Evidence) -> None:
    (panel,) = chart(evidence, "roofline").panels
    assert [each.x for each in panel.data] == [1000.0, 1000.0]
    assert [each.y for each in panel.data] == pytest.approx([250.0, 250.0])
    assert (panel.roof.flop_rate, panel.roof.byte_rate) == (6e14, 3e12)
    assert "42% of the roof" in panel.data[0].text


def test_what_fits_is_the_largest_that_did(evidence: Evidence) -> None:
    (panel,) = chart(evidence, "capacity").panels
    (datum,) = panel.data
    assert datum.y == 48
    assert "49 does not fit" in datum.text
    assert panel.name.startswith("Largest batch at 256 pixels")


def test_sampling_has_the_medians_and_what_failed(evidence: Evidence) -> None:
    small, large = chart(evidence, "sampling").panels
    assert [(each.y, each.low, each.high) for each in small.data] == [(16.0, 12.8, 16.0), (8.0, 6.4, 8.0)]
    assert [each.word for each in large.data] == ["", "oom"]
    assert "2 (1.6 to 2.5) times" in small.data[0].text


def test_machines_and_files_are_held_against_each_other(evidence: Evidence) -> None:
    found = chart(evidence, "beside")
    names = [panel.name for panel in found.panels]
    assert "NVIDIA H200 over NVIDIA H100 80GB HBM3" in names or "NVIDIA H100 80GB HBM3 over NVIDIA H200" in names
    assert any(name.endswith("rows.jsonl") or name.startswith("rows.jsonl") for name in names)
    assert all(each.low < each.y < each.high for panel in found.panels for each in panel.data)


@pytest.mark.parametrize("name", NAMES)
def test_without_data_a_figure_says_so_and_how_to_measure_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(timed("DiG", "triton", "L", 512, 1.0, mode="train").to_json() + "\n")
    (found,) = figures(gather([path]), [name])
    assert isinstance(found, Missing)
    assert found.why
    assert found.command.startswith("python -m ")


@pytest.mark.parametrize("name", NAMES)
def test_a_figures_data_are_what_it_draws(evidence: Evidence, name: str, tmp_path: Path) -> None:
    found = chart(evidence, name)
    lines = list(csv.DictReader(found.csv().splitlines()))
    assert len(lines) == sum(len(panel.data) for panel in found.panels)
    assert [line["y"] for line in lines] == [
        "" if each.y is None else str(each.y) for panel in found.panels for each in panel.data
    ]
    assert draw(found).rendered("png", dpi=30).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_captions_say_where_numbers_are_from(evidence: Evidence, name: str) -> None:
    caption = " ".join(chart(evidence, name).caption)
    assert "NVIDIA H" in caption
    assert "commit 0123456789" in caption


# Looks


def differ_in_grey(one, other) -> bool:
    shades = abs(luminance(one.color) - luminance(other.color)) > 0.1
    return shades or (one.marker, str(one.dashes), one.hollow) != (other.marker, str(other.dashes), other.hollow)


@pytest.mark.parametrize("name", NAMES)
def test_series_can_be_told_apart_in_grey(evidence: Evidence, name: str) -> None:
    for one, other in combinations(chart(evidence, name).styles.values(), 2):
        assert differ_in_grey(one, other)


def test_a_series_looks_the_same_in_every_figure(evidence: Evidence) -> None:
    looks: dict[str, set] = {}
    for found in figures(evidence):
        if found.name != "lead":
            for series, style in found.styles.items():
                looks.setdefault(series, set()).add(str(style))
    assert all(len(found) == 1 for found in looks.values())
    assert chart(evidence, "fig1a").styles["DiG (triton)"].width > chart(evidence, "fig1a").styles["DiG (fla)"].width


def test_stacked_parts_differ_in_grey() -> None:
    for colors in (PART_COLORS, PARTS_ON_DARK):
        shades = [luminance(color) for color in colors]
        assert shades in (sorted(shades), sorted(shades, reverse=True))
        assert all(contrast(*pair) > 1.25 for pair in pairwise(colors))


def test_every_colour_is_seen_on_a_dark_page() -> None:
    for family in families().values():
        looks = Looks(series=[(family.name, (("backend", word),)) for word in family.backends])
        for word in family.backends:
            color = looks.of(family.name, (("backend", word),)).color
            assert contrast(on_dark(color), DARK_PAGE) >= LEAST_CONTRAST
    assert on_dark("#D55E00") == "#D55E00"
    assert min(contrast(color, DARK_PAGE) for color in PARTS_ON_DARK) > 1.8


# The page


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
    assert not {tag for tag, _ in found.tags} & {"b", "iframe"} - {"b"}
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
    assert "python -m bench run --suite paper" in copied


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
     ("holds in part", "good"), ("ambiguous", "open")],
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
    assert "not a file of claims: claim 1: " in one_line(run(folder, "--out", out, "--claims", torn))
    assert "choose another --out" in one_line(run(folder, "--out", alien))
    assert not out.exists()


def test_of_a_folder_other_files_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "rows")
    (folder / "train.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    evidence = gather([folder])
    assert any("train.jsonl: left out" in warning for warning in evidence.warnings)


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
    assert project["project"]["optional-dependencies"]["report"] == [NEEDED]
    assert NEEDED in project["dependency-groups"]["test"]


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    from reports.page import html

    html.library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    line = one_line(run(write_everything(tmp_path / "rows"), "--out", tmp_path / "out"))
    assert line.startswith("error: the page needs vl-convert-python; pip install")
    html.library.cache_clear()
