"""How the page looks in a real browser: every figure drawn, no text cut, on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reports.page.__main__ import app
from reports.page.sections import NAMES
from tests.reports.browser.driving import PHONE, choose, wait
from tests.reports.page_rows import timed

pytestmark = pytest.mark.slow


def test_every_figure_is_drawn(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    drawn = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.chart')].map((each) => [each.id, "
        "[each.dataset.drawn, each.querySelectorAll('svg.marks path').length, each.clientHeight]]))"
    )
    assert set(drawn) == {f"chart-{name}" for name in (*NAMES, "explore")}
    for name, (kind, paths, height) in drawn.items():
        assert kind in ("lines", "bars", "stack", "points", "ratios"), name
        assert paths > 3, name
        assert height > 60, name
    legend = browser.execute_script("return document.querySelector('#chart-fig1a .legend').textContent")
    assert "DiG (triton)" in legend
    assert "OOM" in browser.execute_script("return document.querySelector('#chart-fig1a svg.marks').textContent")


def test_an_assumed_size_has_an_asterisk(shown: Callable[..., Any], tmp_path: Path) -> None:
    rows = [
        timed(family, backend, size, 1024, ms, mode="forward")
        for family, backend, ms in (("DiG", "triton", 2.0), ("DiS", "mamba-ssm", 30.0))
        for size in ("S", "XL")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    result = CliRunner().invoke(app, [str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    browser = shown(tmp_path / "out" / "index.html")
    marks = browser.execute_script(
        "return [...document.querySelectorAll('#chart-fig2a svg text')]"
        ".filter((each) => each.textContent === '*').length"
    )
    assert marks == 1, "DiS-XL alone is assumed"


def test_counts_are_written_in_full(shown: Callable[..., Any], published: Path) -> None:
    browser = shown(published)
    choose(browser, "select[data-panel=capacity]", "1")
    texts = "[...document.querySelectorAll('#chart-capacity svg.marks text')].map((each) => each.textContent)"
    wait(browser, f"return {texts}.includes('4608')")
    assert {"0", "2000", "4000"} <= set(browser.execute_script(f"return {texts}"))
    browser.execute_script("document.querySelector('details.numbers[data-chart=capacity]').open = true")
    wait(
        browser,
        "return document.querySelector('details.numbers[data-chart=capacity] tr')?.textContent.includes('4608')",
    )


def panels_shown(browser: Any, name: str) -> Iterator[list[str]]:
    """Draws every panel of a chart; yields the names of its bars."""
    panels = browser.execute_script(
        "return JSON.parse(document.getElementById('data').textContent).charts"
        ".find((chart) => chart.name === arguments[0]).panels.map((panel) => panel.data.map((each) => each.x))",
        name,
    )
    for place, names in enumerate(panels):
        browser.execute_script(f"delete document.getElementById('chart-{name}').dataset.drawn")
        choose(browser, f"select[data-panel={name}]", str(place))
        wait(browser, f"return document.getElementById('chart-{name}').dataset.drawn")
        yield names


@pytest.mark.parametrize("width", [360, 600, 1280])
def test_no_name_of_a_bar_is_cut(shown: Callable[..., Any], published: Path, width: int) -> None:
    browser = shown(published, width)
    script = (
        "return [...document.querySelectorAll(`#chart-${arguments[0]} .role-axis-label text`)].map((each) => {"
        " const box = each.getBoundingClientRect();"
        " return [each.textContent, box.left, box.top, box.right, box.bottom]; })"
    )
    for name in ("sampling", "capacity", "beside"):
        for names in panels_shown(browser, name):
            labels = {label.replace(" ", ""): box for label, *box in browser.execute_script(script, name)}
            boxes = [labels[each.replace(" ", "")] for each in dict.fromkeys(names)]
            assert all(0 <= left < right <= width for left, _, right, _ in boxes)
            assert all(one[3] <= other[1] + 1 for one, other in pairwise(boxes)), "names lie on each other"


@pytest.mark.parametrize("width", [360, PHONE])
def test_on_a_phone_no_text_of_a_bar_runs_over_the_edge(shown: Callable[..., Any], published: Path, width: int) -> None:
    browser = shown(published, width)
    script = """
        const edge = document.getElementById(`chart-${arguments[0]}`).getBoundingClientRect().right;
        return [...document.querySelectorAll(`#chart-${arguments[0]} svg.marks text`)]
          .filter((each) => each.getBoundingClientRect().right > edge && Number(getComputedStyle(each).opacity))
          .map((each) => each.textContent);
    """
    for name in ("memory", "parts", "sampling", "capacity"):
        for _ in panels_shown(browser, name):
            assert browser.execute_script(script, name) == []


def test_a_panels_name_is_written_out_where_its_choice_would_cut_it(shown: Callable[..., Any], published: Path) -> None:
    script = "return document.getElementById('whole-capacity').innerText"
    name = "Largest batch at 256 pixels, training step, graph, bf16"
    assert shown(published, 360).execute_script(script) == name
    browser = shown(published, 1280)
    assert not browser.find_element("id", "whole-capacity").is_displayed()


@pytest.mark.parametrize("width", [360, PHONE])
def test_a_time_is_seen_beside_its_model_and_its_button(shown: Callable[..., Any], published: Path, width: int) -> None:
    browser = shown(published, width)
    # Down, too: headings lie above what passes below them.
    model, time, button, table, first, below = browser.execute_script("""
        const scroll = document.querySelector(".rows .scroll");
        const cells = document.querySelectorAll("#row-table tbody tr:nth-child(20) > *");
        scroll.scrollIntoView({ block: "center", behavior: "instant" });
        scroll.scrollLeft = cells[6].offsetLeft - cells[0].offsetWidth;
        scroll.scrollTop = cells[0].offsetTop - 200;
        const ends = (each) => [each.getBoundingClientRect().left, each.getBoundingClientRect().right];
        const first = document.querySelector("#row-table thead th");
        const { left, top } = first.getBoundingClientRect();
        return [cells[0], cells[6], cells[12], scroll].map(ends)
          .concat([first.dataset.label, document.elementFromPoint(left + 3, top + 3)?.dataset.label]);
    """)
    assert model[0] >= table[0]
    assert model[1] <= time[0] + 1
    assert time[1] <= button[0] + 1
    assert button[1] <= table[1]
    assert first == below == "Model"


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_need_not_be_scrolled_sideways(
    shown: Callable[..., Any], page: Path, hostile: Path, dark: bool
) -> None:
    for path in (page, hostile):
        browser = shown(path, PHONE, dark=dark)
        width, wide = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert (width, wide) == (PHONE, PHONE)
        broken = browser.execute_script(
            "return [...document.querySelectorAll('.card, .chart, h1, h2, h3, figcaption p, .repeat')]"
            ".filter((each) => !each.closest('.scroll') && each.getBoundingClientRect().right > innerWidth + 1)"
            ".map((each) => each.outerHTML.slice(0, 200))"
        )
        assert broken == []


def test_charts_follow_the_width(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    before = browser.execute_script("return document.querySelector('#chart-fig1a svg.marks').clientWidth")
    metrics = {"width": PHONE, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wait(browser, f"return (document.querySelector('#chart-fig1a svg.marks')?.clientWidth ?? 9e9) < {before - 20}")


def test_it_can_be_printed(shown: Callable[..., Any], page: Path) -> None:
    import base64

    browser = shown(page, dark=True)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden, commands, background = browser.execute_script(
        "const shown = (name) => getComputedStyle(document.querySelector(name)).display;"
        "return [['nav', '.copy', '.controls'].map(shown), shown('#row-table .paper'),"
        " getComputedStyle(document.body).backgroundColor]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert hidden == ["none"] * 3
    assert commands == "block"
    assert background == "rgb(255, 255, 255)"


def test_what_is_folded_away_is_printed_and_every_sheet_of_rows_has_headings(
    shown: Callable[..., Any], page: Path
) -> None:
    browser = shown(page)
    browser.execute_script("for (const each of document.querySelectorAll('details.own')) each.open = false")
    states = "return [...document.querySelectorAll('details.own')].map((each) => each.open)"
    assert browser.execute_script(states), "the page has claims that are folded away"
    # While it prints, and after.
    browser.execute_script(f"addEventListener('beforeprint', () => {{ window.printed = (() => {{ {states} }})(); }})")
    browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert all(browser.execute_script("return window.printed"))
    assert not any(browser.execute_script(states))
    # A button isn't drawn again on the next sheet; the text of a heading is.
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    headings = browser.execute_script(
        "return [...document.querySelectorAll('#row-table thead button')].map((button) =>"
        " [button.textContent, getComputedStyle(button.parentElement, '::before').content,"
        " getComputedStyle(button).display])"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert headings
    assert [each[1:] for each in headings] == [[f'"{each[0]}"', "none"] for each in headings]
