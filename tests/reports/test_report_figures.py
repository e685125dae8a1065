from __future__ import annotations

import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench.store.ledgers import Memory
from reports.drawing import log_ticks
from reports.figures import Drawing, model_size, speed_memory
from reports.looks import Looks
from reports.series import Sweep, merge_launches

GIB = 2**30
KNOWN = ("DiG", "Flash-DiT", "DiT", "DiS")
FLASH = {"options": (("backend", "sdpa-cudnn"),)}


def artist(axes, gid):
    return next((a for a in axes.get_children() if a.get_gid() == gid), None)


def points(axes, label):
    """The (x, y) that a line shows, gaps left out."""
    line = artist(axes, f"line:{label}")
    return [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if not math.isnan(y)]


def words(axes):
    return [text.get_text() for text in axes.texts]


def figure_words(drawing):
    return "\n".join(text.get_text() for text in drawing.figure.texts)


@pytest.fixture
def rows(make_row):
    return [
        *(make_row(resolution=r, ms=r / 100, gib=r / 512) for r in (2048, 256, 1024)),
        make_row("DiT-S/2", 256, 5.0, gib=1.0),
        make_row("DiT-S/2", 1024, 40.0, gib=9.0),
        make_row("DiT-S/2", 2048, status="oom"),
        make_row("Flash-DiT-S/2", 256, 4.0, **FLASH),
        make_row("Flash-DiT-S/2", 1024, 8.0, **FLASH),
    ]


def test_lines_show_the_rows(rows):
    speed, memory = speed_memory(Sweep(rows=tuple(rows))).figure.axes
    assert points(speed, "DiG") == [(r, pytest.approx(1000 / (r / 100))) for r in (256, 1024, 2048)]
    assert points(memory, "DiG") == [(r, pytest.approx(r / 512)) for r in (256, 1024, 2048)]
    assert points(speed, "Flash-DiT (sdpa-cudnn)") == [(256, 250), (1024, 125)]
    assert speed.get_yscale() == "log"


def test_fps_counts_the_batch(make_row):
    speed, _ = speed_memory(Sweep(rows=(make_row(ms=100.0, batch=32),))).figure.axes
    assert points(speed, "DiG") == [(1024, 320)]


def test_bars_run_from_the_10th_to_the_90th_percentile(make_row):
    row = make_row(samples_ms=tuple(float(x) for x in range(10, 21)), batch=4)  # percentiles 11 and 19
    speed, _ = speed_memory(Sweep(rows=(row,))).figure.axes
    ((low, high),) = [segment[:, 1] for segment in artist(speed, "spread:DiG").get_segments()]
    assert (low, high) == (pytest.approx(4000 / 19), pytest.approx(4000 / 11))


def test_bars_of_several_launches_run_from_the_fastest_to_the_slowest(make_row):
    several = merge_launches([make_row(ms=ms, launch=i) for i, ms in enumerate((10.0, 12.5, 11.0))])
    drawing = speed_memory(Sweep(rows=(several,)))
    speed, memory = drawing.figure.axes
    assert points(speed, "DiG") == [(1024, pytest.approx(1000 / 11))]
    assert points(memory, "DiG") == [(1024, 2)]
    ((low, high),) = [segment[:, 1] for segment in artist(speed, "spread:DiG").get_segments()]
    assert (low, high) == (pytest.approx(80), pytest.approx(100))
    words = figure_words(drawing)
    assert "Points: median over 3 process launches" in words
    assert "Bars: fastest to slowest launch." in words
    mixed = figure_words(speed_memory(Sweep(rows=(several, make_row("DiT-S/2", ms=40.0)))))
    assert "median over 1 to 3 process launches" in mixed
    assert "of one launch, 10th to 90th percentile" in mixed


def test_oom_is_a_cross_beyond_the_data(rows):
    speed, memory = speed_memory(Sweep(rows=tuple(rows))).figure.axes
    for axes, outside in ((speed, min), (memory, max)):
        cross = artist(axes, "failed:DiT")
        assert cross.get_marker() == "x"
        assert list(cross.get_xdata()) == [2048]
        shown = [y for label in ("DiG", "DiT") for _, y in points(axes, label)]
        assert outside([*shown, cross.get_ydata()[0]]) == cross.get_ydata()[0]
        assert axes.get_ylim()[0] < cross.get_ydata()[0] < axes.get_ylim()[1]
        assert "DiT: OOM" in words(axes)
        assert artist(axes, "failed:DiG") is None


@pytest.mark.parametrize("status", ["timeout", "error", "unsupported"])
def test_other_failures_are_named(rows, make_row, status):
    sweep = Sweep(rows=(*rows, make_row("Flash-DiT-S/2", 2048, status=status, **FLASH)))
    speed, _ = speed_memory(sweep).figure.axes
    assert f"Flash-DiT (sdpa-cudnn): {status}" in words(speed)
    heights = {artist(speed, f"failed:{s}").get_ydata()[0] for s in ("DiT", "Flash-DiT (sdpa-cudnn)")}
    assert len(heights) == 2, "two failures at one resolution must not lie on each other"


def test_a_line_is_broken_where_a_case_failed(make_row):
    rows = (make_row(resolution=256), make_row(resolution=512, status="error"), make_row(resolution=1024))
    speed, _ = speed_memory(Sweep(rows=rows)).figure.axes
    line = artist(speed, "line:DiG")
    assert list(line.get_xdata()) == [256, 512, 1024]
    assert math.isnan(line.get_ydata()[1])


def test_a_series_without_any_number_is_named_in_the_caption(rows, make_row):
    sweep = Sweep(rows=(*rows, make_row("DiS-S/2", status="unsupported", options=(("scan", "mamba-ssm"),))))
    drawing = speed_memory(sweep)
    assert "Not drawn, for want of any number: DiS (mamba-ssm) (unsupported)." in figure_words(drawing)
    assert artist(drawing.figure.axes[0], "failed:DiS (mamba-ssm)") is None


def test_the_caption_counts_what_is_marked(rows, make_row):
    assert "Marked" not in figure_words(speed_memory(Sweep(rows=tuple(rows))))
    marked = [*rows, make_row("DiG-S/2", 4096, 90.0, marks=("throttled", "measured-again"))]
    timed = sum(row.status == "ok" for row in marked)
    assert f"Marked, of {timed} measurements: 1 throttled; the tables say which." in figure_words(
        speed_memory(Sweep(rows=tuple(marked)))
    )


def test_caption_says_what_is_shown(rows):
    caption = figure_words(speed_memory(Sweep(rows=tuple(rows))))
    for part in ("NVIDIA H100 80GB HBM3", "2026-11-22", "bf16", "batch 1", "training step", "CUDA graph"):
        assert part in caption
    assert "median of 3 steps" in caption


def test_devices_are_not_mixed(rows, make_row):
    cpu = make_row(resolution=64, device="cpu", execution="eager", ms=500.0)
    drawing = speed_memory(Sweep(rows=(*rows, cpu)))
    assert 64 not in [x for x, _ in points(drawing.figure.axes[0], "DiG")]
    assert any(note.startswith("left out: CPU") and "(1 row)" in note for note in drawing.notes)


def test_cpu_rows_are_marked(make_row):
    drawing = speed_memory(Sweep(rows=(make_row(device="cpu", execution="eager"),)))
    assert "CPU (reference implementations), not a GPU result: AMD EPYC 9654" in figure_words(drawing)
    assert "(CPU, not a GPU result)" in figure_words(drawing)
    assert "Peak process memory" in drawing.figure.axes[1].get_ylabel()


def test_forward_rows_alone_are_drawn_and_said(make_row):
    speed, _ = speed_memory(Sweep(rows=(make_row(mode="forward"),))).figure.axes
    assert "forward pass" in speed.get_ylabel()
    both = speed_memory(Sweep(rows=(make_row(mode="forward"), make_row(ms=20.0))))
    assert "training step" in both.figure.axes[0].get_ylabel()
    assert points(both.figure.axes[0], "DiG") == [(1024, 50)]


def test_only_the_asked_size_and_patch_2_are_drawn(make_row):
    rows = (make_row("DiG-S/2"), make_row("DiG-S/4", ms=1.0), make_row("DiG-XL/2", ms=50.0))
    speed, _ = speed_memory(Sweep(rows=rows)).figure.axes
    assert points(speed, "DiG") == [(1024, 100)]
    speed, _ = speed_memory(Sweep(rows=rows), size="XL").figure.axes
    assert points(speed, "DiG") == [(1024, 20)]
    assert speed_memory(Sweep(rows=rows), size="L") is None


def test_rows_without_memory_still_show_their_speed(make_row):
    row = make_row()
    object.__setattr__(row, "memory", Memory(parameters=1))
    speed, memory = speed_memory(Sweep(rows=(row,))).figure.axes
    assert points(speed, "DiG") == [(1024, 100)]
    assert words(memory) == ["these rows hold no memory figures"]


def forward(make_row, model, resolution, ms, **changes):
    return make_row(model, resolution, ms, mode="forward", **changes)


def test_sizes_are_in_order_and_a_panel_per_resolution(make_row):
    rows = [
        forward(make_row, f"DiG-{size}/2", r, ms * r / 1024)
        for r in (512, 1024, 2048)
        for size, ms in (("XL", 10.0), ("B", 2.0), ("S", 1.0), ("L", 5.0))
    ]
    drawing = model_size(Sweep(rows=tuple(rows)))
    assert [axes.get_title(loc="left")[4:8] for axes in drawing.figure.axes] == ["1024", "2048"]
    first, second = drawing.figure.axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["S", "B", "L", "XL"]
    assert points(first, "DiG") == [(0, 1000), (1, 500), (2, 200), (3, 100)]
    assert points(second, "DiG") == [(0, 500), (1, 250), (2, 100), (3, 50)]


def test_without_the_papers_resolutions_the_two_largest_are_shown(make_row):
    rows = [forward(make_row, f"DiG-{size}/2", r, 1.0) for r in (256, 512, 768) for size in "SB"]
    rows.append(forward(make_row, "DiG-S/2", 1024, 1.0))  # one size: nothing to compare
    titles = [axes.get_title(loc="left") for axes in model_size(Sweep(rows=tuple(rows))).figure.axes]
    assert [title[4:7] for title in titles] == ["512", "768"]


def test_assumed_dis_xl_is_marked(make_row):
    rows = [forward(make_row, f"{family}-{size}/2", 1024, 3.0) for family in ("DiG", "DiS") for size in ("S", "XL")]
    drawing = model_size(Sweep(rows=tuple(rows)))
    (axes,) = drawing.figure.axes
    assert list(artist(axes, "assumed:DiS").get_xdata()) == [1]
    assert artist(axes, "assumed:DiG") is None
    assert words(axes) == ["*"]
    assert "* DiS-XL is assumed (1152 wide, 48 deep)" in figure_words(drawing)
    without = model_size(Sweep(rows=tuple(row for row in rows if row.case.family == "DiG")))
    assert "assumed" not in figure_words(without)


def test_assumed_dis_xl_is_marked_where_it_failed(make_row):
    rows = [forward(make_row, f"DiG-{size}/2", 1024, 3.0) for size in ("S", "XL")]
    rows += [forward(make_row, "DiS-S/2", 1024, 9.0), forward(make_row, "DiS-XL/2", 1024, None, status="oom")]
    drawing = model_size(Sweep(rows=tuple(rows)))
    assert words(drawing.figure.axes[0]) == ["DiS: OOM*"]
    assert "* DiS-XL is assumed" in figure_words(drawing)


def test_a_series_that_fails_at_every_size_of_a_panel_is_marked_there(make_row):
    rows = [forward(make_row, f"DiG-{size}/2", r, 3.0) for size in ("S", "B", "L", "XL") for r in (1024, 2048)]
    rows += [forward(make_row, f"DiT-{size}/2", 1024, 9.0) for size in ("S", "B", "L", "XL")]
    rows += [forward(make_row, f"DiT-{size}/2", 2048, None, status="oom") for size in ("S", "B", "L", "XL")]
    first, second = model_size(Sweep(rows=tuple(rows))).figure.axes
    assert artist(first, "failed:DiT") is None
    assert list(artist(second, "failed:DiT").get_xdata()) == [0, 1, 2, 3]
    assert words(second) == ["DiT: OOM"]


def test_training_rows_alone_make_the_size_figure_and_are_said(make_row):
    rows = (make_row("DiG-S/2"), make_row("DiG-B/2"))
    drawing = model_size(Sweep(rows=rows))
    assert "training step" in drawing.figure.axes[0].get_ylabel()
    assert model_size(Sweep(rows=rows[:1])) is None


def test_series_look_the_same_in_both_figures(make_row):
    rows = [
        make_row("DiG-S/2", options=(("backend", "fla"),)),
        *(forward(make_row, f"DiG-{size}/2", 1024, 1.0) for size in "SB"),
        *(forward(make_row, f"DiG-{size}/2", 1024, 1.0, options=(("backend", "fla"),)) for size in "SB"),
    ]
    sweep = Sweep(rows=tuple(rows))
    first = artist(speed_memory(sweep).figure.axes[0], "line:DiG (fla)")
    second = artist(model_size(sweep).figure.axes[0], "line:DiG (fla)")
    assert (first.get_color(), first.get_marker()) == (second.get_color(), second.get_marker())


def test_series_differ_without_colour():
    looks = Looks()
    drawn = [looks.style(family, i) for family in (*KNOWN, "Other", "Another") for i in range(2)]
    assert len({(look.marker, str(look.dashes)) for look in drawn}) == len(drawn)
    assert len({str(look.dashes) for look in drawn}) == len(drawn)
    assert "x" not in {look.marker for look in drawn}


def test_legend_lists_the_drawn_series(rows):
    (legend,) = speed_memory(Sweep(rows=tuple(rows))).figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["DiG", "Flash-DiT (sdpa-cudnn)", "DiT"]


def test_no_text_lies_on_another(rows):
    drawing = speed_memory(Sweep(rows=tuple(rows)))
    canvas = FigureCanvasAgg(drawing.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in drawing.figure.texts]
    boxes += [legend.get_window_extent(renderer) for legend in drawing.figure.legends]
    boxes += [axes.get_tightbbox(renderer) for axes in drawing.figure.axes]
    page = drawing.figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_files_repeat_byte_by_byte(rows, tmp_path):
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        drawing = speed_memory(Sweep(rows=tuple(rows)))
        assert isinstance(drawing, Drawing)
        contents.append([path.read_bytes() for path in drawing.save(folder, "figure")])
    assert contents[0] == contents[1]
    assert b"<dc:date>" not in contents[0][1]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.5, 5000, [1, 10, 100, 1000]),
        (3, 60, [5, 10, 20, 50]),
        (2.2, 8.1, [4, 6, 8]),
        (10, 10.4, [10, 10.1, 10.2, 10.3, 10.4]),
    ],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)
