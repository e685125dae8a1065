"""Every family at its best: what the figure shows."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from reports.__main__ import app
from reports.best_figure import _unusual, best
from reports.best_tables import best_tables
from reports.series import Sweep, merge_launches
from reports.tables import tables
from tests.reports.best_rows import BLOCK, MODEL, dig, flash, three_points
from tests.reports.conftest import build_row
from tests.reports.test_report_text import TEXTS


@pytest.fixture
def measured():
    return three_points()


def lines_of(axes):
    """The (resolution, lead) points by line."""
    found = [artist for artist in axes.get_children() if str(artist.get_gid()).startswith("line:")]
    return {
        line.get_gid().removeprefix("line:"): [
            (round(2**x), pytest.approx(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        ]
        for line in found
    }


def test_the_figure_shows_leads_by_resolution(measured):
    weights = {"mode": "forward", "weights": "bf16", "size": "XL"}
    measured += [dig(256, 4.0, batch=8, **weights), flash("sdpa-cudnn", 256, 5.0, batch=8, **weights)]
    drawing = best(Sweep(rows=tuple(measured)))
    (axes,) = drawing.figure.axes
    assert lines_of(axes) == {
        "training step, S/2, batch 1, bf16": [(256, 0.9), (1024, 1.5)],
        "forward pass, XL/2, batch 8, bf16 weights": [(256, 1.25)],
    }
    (level,) = [artist for artist in axes.get_children() if artist.get_gid() == "level"]
    assert list(level.get_ydata()) == [1.0, 1.0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "1024"]
    caption = drawing.figure.texts[1].get_text().replace("\n", " ")
    assert "DiG is slower at 1 of 3 points." in caption
    assert "S/2 training step at 2048, batch 1, bf16 (attention: timeout or parity)" in caption
    assert "NVIDIA H100 80GB HBM3 · 2026-11-22 · bf16, bf16 weights" in caption
    assert drawing.notes == (f"shows NVIDIA H100 80GB HBM3, 3 of 4 points ({len(measured)} rows)",)


def test_points_name_the_peer_and_what_is_unusual_of_its_way(measured):
    measured += [dig(512, 5.0), flash("sdpa-cudnn", 512, 6.0, **MODEL)]
    measured += [dig(768, 5.0), build_row("DiT-S/2", 768, 6.0, **BLOCK)]
    drawing = best(Sweep(rows=tuple(measured)))
    (axes,) = drawing.figure.axes
    assert {text.get_text() for text in axes.texts} == {"FA4", "cuDNN, compiled by model", "DiT", "cuDNN"}
    assert "compiled by block, graph, unless they say otherwise" in drawing.figure.texts[1].get_text()


def test_one_is_in_sight_where_dig_leads_everywhere():
    drawing = best(Sweep(rows=(dig(), flash("sdpa-cudnn", ms=40.0))))
    (axes,) = drawing.figure.axes
    low, high = axes.get_ylim()
    assert low < 1 < 4 < high
    assert "1" in [tick.get_text() for tick in axes.get_yticklabels()]


def test_one_has_a_tick_where_even_steps_leave_it_out():
    rows = [dig(256, 10.0), flash("sdpa-cudnn", 256, 6.0), dig(512, 10.0), flash("sdpa-cudnn", 512, 55.0)]
    (axes,) = best(Sweep(rows=tuple(rows))).figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2", "4", "6"]


def test_bars_of_leads_are_the_launches_range():
    ours = merge_launches([dig(ms=ms, launch=i) for i, ms in enumerate((10.0, 12.0, 11.0))])
    peer = merge_launches([flash("sdpa-cudnn", ms=ms, launch=i) for i, ms in enumerate((22.0, 24.0, 18.0))])
    drawing = best(Sweep(rows=(ours, peer)))
    (spread,) = [a for a in drawing.figure.axes[0].get_children() if str(a.get_gid()).startswith("spread:")]
    ((low, high),) = [segment[:, 1] for segment in spread.get_segments()]
    assert (low, high) == (pytest.approx(1.5), pytest.approx(2.4))
    assert "fastest or slowest launch" in drawing.figure.texts[1].get_text().replace("\n", " ")


def test_one_machine_is_drawn_and_the_rest_is_counted():
    elsewhere = {"environment": {"gpu_name": "NVIDIA H200"}}
    rows = [dig(), flash("sdpa-cudnn"), dig(512), flash("sdpa-cudnn", 512)]
    rows += [dig(**elsewhere), flash("sdpa-cudnn", ms=90.0, **elsewhere)]
    drawing = best(Sweep(rows=tuple(rows)))
    assert lines_of(drawing.figure.axes[0]) == {"training step, S/2, batch 1, bf16": [(512, 1.2), (1024, 1.2)]}
    assert "of other machines" in drawing.notes[1]
    assert drawing.notes[1].endswith("(2 rows)")


def test_labels_of_one_resolution_overlap_neither_each_other_nor_the_page():
    rows = []
    for size, batch in (("S", 1), ("S", 32), ("XL", 1), ("XL", 8), ("XL", 64)):
        for resolution in (256, 1792, 2048):
            rows += [
                dig(resolution, 10.0, size=size, batch=batch),
                flash("flash-attn-4-padded", resolution, 9.5 + 0.01 * batch, size=size, batch=batch),
            ]
    drawing = best(Sweep(rows=tuple(rows)))
    canvas = FigureCanvasAgg(drawing.figure)
    canvas.draw()
    (axes,) = drawing.figure.axes
    # A label's own box, without the line to its point; those of 1792 and 2048 keep to their own columns too.
    boxes = [text.get_bbox_patch().get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == 15
    page = drawing.figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_lines_differ_without_colour():
    rows = [
        row
        for mode in ("train", "forward")
        for batch in (1, 8, 64)
        for row in (dig(mode=mode, batch=batch), flash("sdpa-cudnn", mode=mode, batch=batch))
    ]
    axes = best(Sweep(rows=tuple(rows))).figure.axes[0]
    lines = [artist for artist in axes.get_children() if str(artist.get_gid()).startswith("line:")]
    assert len({line.get_marker() for line in lines}) == 6
    assert len({str(line._dash_pattern) for line in lines}) == 6


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_shown_as_typed(text, measured):
    text = text.encode("utf-8", "ignore").decode()
    fields = {"environment": {"gpu_name": text, "torch": text}, "started_at": text}
    rows = [replace(row, **fields, message=row.message and text) for row in measured]
    rows.append(build_row(f"{text}-S/2", 256, 3.0, options=((text, text),), **fields, **BLOCK))
    rows.append(build_row("Flash-DiT-S/2", 256, 0.5, options=(("backend", text),), **fields, **BLOCK))
    sweep = Sweep(rows=tuple(rows))
    drawing = best(sweep, title=text)
    ElementTree.fromstring(drawing.rendered("svg"))
    page = tables(sweep)
    page.encode()
    assert not any(word in page for word in ("<script>", "](http", "\x1b", "\x00"))
    table = [line for line in "\n\n".join(best_tables(sweep, rows)).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_extreme_times_are_drawn():
    rows = [dig(256, 1e-6), flash("sdpa-cudnn", 256, 1e12), dig(2**31 - 1, 1e12), flash("sdpa-cudnn", 2**31 - 1, 1e-6)]
    drawing = best(Sweep(rows=tuple(rows)))
    assert drawing.rendered("png", dpi=20)
    assert all(math.isfinite(y) for y in drawing.figure.axes[0].get_ylim())


def test_the_command_draws_it_where_rows_allow(measured, write_rows, tmp_path):
    for name in ("a", "b"):
        result = CliRunner().invoke(app, [str(write_rows(measured)), "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert f"wrote {tmp_path / name / 'best.svg'}" in result.stdout
    for file in ("best.svg", "best.png", "tables.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    result = CliRunner().invoke(app, [str(write_rows([dig()])), "--out", str(tmp_path / "c")])
    assert "did not write best: no point where both DiG" in result.stdout
    assert not list((tmp_path / "c").glob("best.*"))


@pytest.mark.parametrize(
    ("executed", "said"),
    [
        ("compiled by block, graph", ""),
        ("compiled by model, graph", "compiled by model"),
        ("graph", "graph"),
        ("compiled by block", "compiled by block"),
        ("compiled by block, max-autotune, graph", "compiled by block, max-autotune, graph"),
    ],
)
def test_of_an_execution_what_is_unusual_is_said(executed: str, said: str) -> None:
    assert _unusual(executed, "compiled by block, graph") == said
