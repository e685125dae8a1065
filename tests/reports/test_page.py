"""The page and its figures say what the rows say, and nothing that no row says."""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import typer.main

from bench.cases.case import Case
from bench.cases.suites import sweep
from bench.cli.main import app as bench
from bench.store.rows import read_results
from dig.environment import ROOT
from dig.registry import families
from reports import layout
from reports.looks import Looks
from reports.page.chart import Chart, Missing
from reports.page.colors import DARK_PAGE, LEAST_CONTRAST, contrast, luminance, on_dark
from reports.page.commands import run_command
from reports.page.drawn import MOST_BARS, PART_COLORS, draw
from reports.page.evidence import Evidence, gather
from reports.page.html import PARTS_ON_DARK
from reports.page.markdown import markdown
from reports.page.said import provenance
from reports.page.sections import NAMES, figures
from tests.reports.conftest import GPU, build_row
from tests.reports.page_rows import CARD, probes, step_rows, timed, write_everything

ROWS = sorted((ROOT / "results").rglob("*.jsonl"))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Evidence:
    return gather([write_everything(tmp_path_factory.mktemp("rows"))])


@pytest.fixture(scope="module")
def published() -> Evidence:
    return gather([ROOT / "results" / "h100"])


def chart(evidence: Evidence, name: str) -> Chart:
    (found,) = figures(evidence, [name])
    assert isinstance(found, Chart)
    return found


# Commands


COMMANDS = typer.main.get_command(bench).commands


@functools.cache
def parsed(command: str) -> dict:
    program, flag, package, name, *words = shlex.split(command)
    assert (program, flag, package) == ("python", "-m", "bench")
    return COMMANDS[name].make_context(name, words).params


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
            for part in re.split(r" && |; ", command):
                assert part.startswith("python -m reports.page ") or parsed(part)


def test_a_figures_command_measures_what_it_shows(evidence: Evidence) -> None:
    found = chart(evidence, "fig1a")
    cases = {(case.resolution, case.family, case.options) for case in cases_of(found.command, "cuda")}
    assert len(cases) == len(found.panels[0].data)


# Numbers


def test_figure_1_has_every_rows_speed_with_its_interval(evidence: Evidence) -> None:
    of_size = [row for row in step_rows() if row.case.mode == "train" and row.case.size == "S"]
    rows = [row for row in of_size if row.case.execution == "graph"]
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


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_files_with_as_many_points_the_newer_is_drawn(turned: bool) -> None:
    """Whatever their order."""
    folders = ["h100", "h200"]
    paths = [ROOT / "results" / name / "best.jsonl" for name in (folders[::-1] if turned else folders)]
    found = chart(gather(paths), "lead")
    assert sum(len(panel.data) for panel in found.panels) == 14
    assert "NVIDIA H200" in found.caption[0]


def test_a_figure_of_a_cpu_says_so() -> None:
    rows = [build_row("DiG-S/2", 256, device=device) for device in ("cpu", "cuda")]
    assert provenance(rows[:1]).partition(" · ")[0].endswith("(CPU, not a GPU result)")
    assert "not a GPU result" not in provenance(rows[1:])


def test_memory_has_no_intervals_of_steps(evidence: Evidence) -> None:
    speed, memory = (" ".join(chart(evidence, name).caption) for name in ("fig1a", "fig1b"))
    assert "10th to 90th percentile" in speed
    assert "10th to 90th percentile" not in memory
    assert "a launch has one peak" in memory


def test_a_steps_parts_add_up_to_the_eager_step(evidence: Evidence) -> None:
    panel = next(each for each in chart(evidence, "parts").panels if each.name.startswith("S/2 training step at 1024"))
    ours = {each.part: each.y for each in panel.data if each.x == "DiG (triton)"}
    # 2 ms at 256 are 8 at 1024, and steps get slower; the profile's quarters and half of it, and 30 ms of launches.
    ms = 8 * 1.045
    quarters = {"products": ms / 4, "attention or recurrence": ms / 2, "the rest": ms / 4, "launches": 30.0}
    assert ours == pytest.approx(quarters)
    theirs = {each.part: each.y for each in panel.data if each.x == "DiT (materialized)"}
    assert theirs == pytest.approx({"all kernels": 320.0 * 1.045, "launches": 30.0})
    assert len(panel.data) == 4 + 2 * 5
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


def capacity_of(tmp_path: Path, *groups: tuple[dict, int]) -> Chart:
    """Of searches for the largest batch, each in an environment: of which batch on nothing fits there."""
    lines = [
        {**probe, "environment": where, "fits": (batch := probe["case"]["batch"]) < fails,
         "peak": batch * 2**30 if batch < fails else None}
        for where, fails in groups
        for probe in probes()
    ]  # fmt: skip
    path = tmp_path / "capacity.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return chart(gather([path]), "capacity")


def test_a_bar_of_what_fits_names_its_machine(tmp_path: Path) -> None:
    found = capacity_of(tmp_path, (GPU, 49))
    assert found.caption[0].startswith(f"{GPU['gpu_name']} · commit 0123456789 · 5 probes")
    assert found.panels[0].data[0].text.endswith(f" · {GPU['gpu_name']}")
    assert f"49 does not fit · {GPU['gpu_name']} |" in markdown(gather([tmp_path]), [found])
    drawn = [text.get_text() for text in draw(found).figure.texts]
    assert any(GPU["gpu_name"] in text for text in drawn)


@pytest.mark.parametrize(
    ("other", "called"),
    [
        (CARD, "NVIDIA H200"),
        # Neither says what GPU it has.
        ({}, "a machine that was not recorded"),
        ({"commit": "fedcba"}, "unnamed GPU"),
    ],
)
def test_no_bar_of_what_fits_is_of_two_machines(tmp_path: Path, other: dict, called: str) -> None:
    found = capacity_of(tmp_path, (GPU, 33), (other, 49))
    first, second = found.panels
    assert first.name.endswith(f", {GPU['gpu_name']}")
    assert second.name.endswith(f", {called}")
    assert [panel.data[0].y for panel in (first, second)] == [32, 48]
    assert found.caption[0].startswith(f"{GPU['gpu_name']} (5 probes) and {called} (5 probes) · ")


def test_two_cards_of_one_name_are_said(tmp_path: Path) -> None:
    found = capacity_of(tmp_path, ({**GPU, "gpu_uuid": "GPU-a"}, 33), ({**GPU, "gpu_uuid": "GPU-b"}, 49))
    assert len(found.panels) == 1
    assert f"2 cards are named {GPU['gpu_name']}; bars are of all of them." in found.caption


@pytest.mark.parametrize("changes", [{"weights": "bf16"}, {"execution": "compiled-graph", "scope": "model"}])
def test_no_bar_of_what_fits_is_of_two_ways(tmp_path: Path, changes: dict) -> None:
    lines = probes()
    lines += [{**line, "case": {**line["case"], "mode": "forward", **changes}} for line in lines]
    lines += [{**line, "case": {**line["case"], "mode": "forward"}, "fits": False, "peak": None} for line in lines[:5]]
    (tmp_path / "capacity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = chart(gather([tmp_path]), "capacity")
    assert len({panel.name for panel in found.panels}) == len(found.panels) == 3


def test_counts_are_written_in_full() -> None:
    evidence = gather([ROOT / "results" / "h100" / "capacity.jsonl"])
    found = chart(evidence, "capacity")
    assert [panel.data[0].y for panel in found.panels] == [301, 4608]
    assert [texts_at_bars(found, place) for place in (0, 1)] == [["301"], ["4608"]]
    assert "| 4608 | peak 72.8 GiB" in markdown(evidence, [found])


def texts_at_bars(found: Chart, place: int) -> list[str]:
    return [each.get_text() for each in draw(found).figure.axes[place].texts]


@pytest.mark.parametrize("name", ["sampling", "capacity", "beside"])
def test_no_name_or_title_of_a_figure_is_cut(published: Evidence, name: str) -> None:
    found = chart(published, name)
    # Every panel once, though a file has the first ones alone: their names are as long as measured ones get.
    for panels in (found.panels, *((panel, found.panels[0]) for panel in found.panels[1:])):
        drawn = draw(replace(found, panels=panels)).figure
        edges = drawn.bbox
        (legend,) = drawn.legends
        boxes = [legend.get_window_extent()]
        for axis, panel in zip(drawn.axes, panels, strict=False):
            (title,) = [text for text in (axis.title, axis._left_title) if text.get_text()]
            assert same_words(title.get_text(), panel.name)
            boxes.append(title.get_window_extent())
            labels = [label for label in axis.get_yticklabels() if label.get_visible()]
            names = list(dict.fromkeys(str(each.x) for each in panel.data))
            shown = [label.get_text() for label in labels]
            assert all(map(same_words, shown, names))
            assert len(labels) == min(len(names), MOST_BARS) or (axis is drawn.axes[1] and not labels)
            boxes += [label.get_window_extent() for label in labels]
            boxes += [axis.get_window_extent()]
        for box in boxes:
            assert edges.x0 <= box.x0 < box.x1 <= edges.x1
            assert edges.y0 <= box.y0 < box.y1 <= edges.y1
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def same_words(shown: str, meant: str) -> bool:
    return shown.split() == meant.split()


def test_a_text_is_broken_between_words_or_within_one_that_is_too_wide() -> None:
    assert layout.wrap("Flash-DiT (sdpa-cudnn)", 9.0, 7.5) == "Flash-DiT (sdpa-cudnn)"
    assert layout.wrap("Flash-DiT (sdpa-cudnn)", 0.8, 7.5) == "Flash-DiT\n(sdpa-cudnn)"
    lines = layout.wrap(f"of {'x' * 30}", 1.0, 7.5).split("\n")
    assert "".join(lines) == f"of{'x' * 30}"
    assert all(layout.text_inches(line, 7.5) <= 1.0 for line in lines)
    endless = layout.wrap("word " * 300, 1.0, 7.5)
    assert endless.endswith("…")
    assert endless.count("\n") == layout.MOST_LINES - 1


def test_sampling_has_the_medians_and_what_failed(evidence: Evidence) -> None:
    small, large = chart(evidence, "sampling").panels
    assert [(each.y, each.low, each.high) for each in small.data] == [(16.0, 12.8, 16.0), (8.0, 6.4, 8.0)]
    assert [each.word for each in large.data] == ["", "oom"]
    assert "2 (1.6 to 2.5) times" in small.data[0].text
    # A panel's name is cut where a picture has no room: it begins with what tells it from the others.
    assert [small.name, large.name] == ["256 px: 32 at once", "1024 px: 4 at once"]
    assert any("ddim, 50 steps, guidance 1.5" in text for text in chart(evidence, "sampling").caption)


def test_settings_of_sampling_are_told_apart() -> None:
    files = [ROOT / "results" / "h100" / name for name in ("sampling.jsonl", "sampling-best.jsonl")]
    names = [panel.name for panel in chart(gather(files), "sampling").panels]
    assert sorted(names) == [
        "1024 px: 4 at once, bf16", "1024 px: 4 at once, bf16 weights",
        "256 px: 32 at once, bf16", "256 px: 32 at once, bf16 weights",
    ]  # fmt: skip


def test_machines_and_files_are_held_against_each_other(evidence: Evidence) -> None:
    found = chart(evidence, "beside")
    names = [panel.name for panel in found.panels]
    assert "NVIDIA H200 over NVIDIA H100 80GB HBM3" in names or "NVIDIA H100 80GB HBM3 over NVIDIA H200" in names
    assert any(name.endswith("rows.jsonl") or name.startswith("rows.jsonl") for name in names)
    assert all(each.low < each.y < each.high for panel in found.panels for each in panel.data)


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_files_of_a_machine_the_newer_row_is_held_against_the_other(tmp_path: Path, turned: bool) -> None:
    """Whatever the files' order."""
    old, new, other = (
        replace(
            timed("DiG", "triton", "S", 512, ms, mode="train"), started_at=f"2026-11-2{day}T00:00:00+00:00",
            environment={"gpu_name": card},
        )
        for day, ms, card in ((1, 8.0, "NVIDIA H100"), (2, 4.0, "NVIDIA H100"), (3, 2.0, "NVIDIA H200"))
    )  # fmt: skip
    paths = []
    for name, row in (("a", new if turned else old), ("b", old if turned else new), ("c", other)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text(row.to_json() + "\n")
    (panel,) = (
        panel for panel in chart(gather(paths), "beside").panels if panel.name == "NVIDIA H200 over NVIDIA H100"
    )
    assert [datum.y for datum in panel.data] == [pytest.approx(0.5, rel=0.05)]


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


def test_on_a_cpu_the_figures_are_of_its_small_sweep(make_row, write_rows) -> None:
    case = {"device": "cpu", "dtype": "fp32", "execution": "eager"}
    rows = [make_row(f"{family}-S/2", side, mode="train", **case) for family in ("DiG", "DiT") for side in (64, 128)]
    rows += [make_row(f"{family}-{size}/2", 128, mode="forward", **case) for family in ("DiG", "DiT") for size in "SB"]
    evidence = gather([write_rows(rows)])
    assert [each.x for each in chart(evidence, "fig1a").panels[0].data] == [64.0, 128.0] * 2
    assert chart(evidence, "fig2a").title == "Speed against model size, 128 × 128 pixels"
    (missing,) = figures(evidence, ["fig2b"])
    assert missing.command == "python -m bench run --suite cpu --resume"
    assert "process memory" in chart(evidence, "fig1b").y_label
