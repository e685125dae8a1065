"""Titles, labels and names are shown as they were typed, in PNG, SVG, Markdown and HTML, whatever is in them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.messages import cell, visible
from bench.sampling.rows import compare
from bench.store.rows import Row
from reports import sampling
from reports.__main__ import app
from reports.figures import model_size, speed_memory
from reports.series import Sweep
from reports.tables import tables
from tests.reports.conftest import build_row
from tests.reports.test_report_sampling import ROWS

TEXTS = [
    r"cost: $5, then $\frac{1$",
    "$x_1$",
    "_hidden",
    r"a^b\c {d} %e &f",
    "<script>alert(1)</script>",
    "one\ntwo\r\x1b[31m\x00\u2028",
    "[red]x[/red] ![i](http://x) | `y` **z** # @me",
    "\ud800 half",
]


def hostile(text: str) -> list[Row]:
    """Rows of two series and sizes with the text wherever one may stand; half of a pair stands in no row."""
    text = text.encode("utf-8", "ignore").decode()
    environment = {"gpu_name": text, "cpu": text, "torch": text, "driver": text, "packages": {text: text}}
    fields = {"environment": environment, "implementations": {text: text}, "started_at": text}
    return [
        build_row(f"{family}-{size}/2", resolution, ms, options=((text, text), ("n", str(i))), **fields)
        for i, family in enumerate(("DiG", "DiT"))
        for size in "SB"
        for resolution, ms in ((256, 1.0), (512, 4.0))
    ]


def texts_of(figure: object) -> list[str]:
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text)]


@pytest.mark.parametrize("text", TEXTS)
def test_figures_show_texts_as_typed(text: str) -> None:
    sweep = Sweep(rows=tuple(hostile(text)))
    for drawing in (speed_memory(sweep, title=text), model_size(sweep, title=text), sampling.draw(compare(ROWS), text)):
        assert drawing is not None
        ElementTree.fromstring(drawing.rendered("svg"))
        assert drawing.rendered("png", dpi=20).startswith(b"\x89PNG")
        assert visible(text) in texts_of(drawing.figure)
        assert all(not found.get_parse_math() for found in drawing.figure.texts)
    legend = speed_memory(sweep).figure.legends[0]
    assert sum(visible(text.removeprefix("\ud800")) in entry.get_text() for entry in legend.get_texts()) == 2


@pytest.mark.parametrize("text", TEXTS)
def test_tables_show_texts_as_typed(text: str) -> None:
    labelled = [replace(row, case=replace(row.case, model=f"{text}-S/2")) for row in ROWS]
    pages = [tables(Sweep(rows=tuple(hostile(text))), title=text), sampling.table(compare(labelled), text)]
    for page in pages:
        page.encode()
        heading, *rest = page.splitlines()
        assert heading == f"# {cell(text)}"
        assert not {"<script>", "**z**", "](http", "@me", "\x1b", "\x00"} & {
            word for word in ("<script>", "**z**", "](http", "@me", "\x1b", "\x00") if word in page
        }
        for row in (line for line in rest if line.startswith("|")):
            assert row.count("|") in (4, 5, 8)


def test_an_underscore_in_front_hides_no_line_of_the_legend() -> None:
    rows = [replace(row, case=replace(row.case, model="_DiG-S/2")) for row in hostile("x")[:2]]
    legend = speed_memory(Sweep(rows=tuple(rows))).figure.legends[0]
    assert [entry.get_text() for entry in legend.get_texts()] == ["_DiG (n=0, x=x)"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(title=st.text(st.characters(codec=None)), name=st.text(st.characters(codec="utf-8")))
def test_no_text_breaks_a_table(title: str, name: str) -> None:
    page = tables(Sweep(rows=tuple(hostile(name))), title=title)
    page.encode()
    assert page.splitlines()[0] == f"# {cell(title or 'Results')}"
    assert visible(page.replace("\n", "")) == page.replace("\n", "")


def test_names_with_brackets_and_markup(make_row, write_rows, tmp_path) -> None:
    path = write_rows([make_row()], "[bold]a[nope].jsonl")
    out = tmp_path / "$x_[red]"
    result = CliRunner().invoke(app, [str(path), "--out", str(out), "--title", "$"])
    assert result.exit_code == 0, result.output
    assert f"wrote {out}/speed_memory.png" in result.output
    (tmp_path / "a\nb.jsonl").write_text("x\n")
    result = CliRunner().invoke(app, [str(tmp_path / "a\nb.jsonl"), "--out", str(out)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "a\\nb.jsonl, line 1: not JSON" in result.stderr


def test_what_a_figure_leaves_out_is_counted(make_row, write_rows, tmp_path) -> None:
    rows = [
        make_row(f"DiG-{size}/{patch}", side) for size in "SB" for patch in (2, 4) for side in (64, 1024, 1536, 2048)
    ]
    result = CliRunner().invoke(app, [str(write_rows(rows)), "--out", str(tmp_path)])
    assert "left out: of another size or patch (12 rows)" in result.stdout
    assert "left out: of another patch (8 rows)" in result.stdout
    assert "left out: at 64 and 1536 pixels, for want of room (4 rows)" in result.stdout


def test_a_size_that_no_row_has_is_refused(make_row, write_rows, tmp_path) -> None:
    result = CliRunner().invoke(app, [str(write_rows([make_row()])), "--out", str(tmp_path / "x"), "--size", "XL"])
    assert (result.exit_code, result.stderr) == (2, "error: no row has size 'XL'; --size can be S\n")
    assert not (tmp_path / "x").exists()


def test_sampling_counts_what_its_figure_leaves_out(tmp_path) -> None:
    from bench.sampling.rows import RowsWriter
    from tests.reports.test_report_sampling import DIG, row

    file = tmp_path / "rows.jsonl"
    elsewhere = {"environment": {"gpu_name": "A100"}, "run": "0"}
    rows = [row(DIG, 9.0, **elsewhere), row(DIG, 5.0), row(DIG, 1.0, 2.0)]
    rows += [row(replace(DIG, resolution=256 * i), 1.0) for i in (2, 3, 4)]
    rows += [row(replace(DIG, resolution=64), status="oom", message="[red]full[/red]")]
    with RowsWriter(file) as writer:
        for each in rows:
            writer.write(each)
    result = CliRunner().invoke(sampling.app, [str(file)])
    assert result.exit_code == 0, result.output
    assert "rows left out: 1 of cases that were measured again since" in result.stderr
    assert "left out of the figure: 1 rows at 1024 pixels, for want of room" in result.stdout
    assert "left out of the figure: 1 rows of other settings or machines" in result.stdout
    assert "left out of the figure: 1 rows without a speed" in result.stdout
    assert "A100" in (tmp_path / "sampling.md").read_text()


def test_a_peer_is_of_the_row_s_own_run_and_of_as_many_turns() -> None:
    from tests.reports.test_report_sampling import DIG, FLASH, row

    rows = [row(DIG, 1.0, 1.0), row(FLASH, 2.0, 2.0), row(FLASH, 8.0, 8.0, run="2")]
    dig, flash = compare(rows)
    assert (dig.peer, dig.ratio and dig.ratio.median) == ("Flash-DiT-XL/2 (sdpa-cudnn)", 2.0)
    assert (flash.peer, flash.row.run) == (None, "2")
    assert compare([row(DIG, 1.0), row(FLASH, 2.0, 2.0)])[0].ratio is None
