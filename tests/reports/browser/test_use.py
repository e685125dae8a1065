"""The page in a real browser: it loads without an error, asks no network, and what can be clicked does what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reports.page.sections import NAMES
from tests.reports.browser.driving import choose, installed, wait
from tests.reports.page_rows import HOSTILE, step_rows

pytestmark = pytest.mark.slow


def visible_rows(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#row-table tbody tr')].filter((row) => !row.hidden)"
    return browser.execute_script(f"{script}.map((row) => row.dataset.i)")


def entries(browser: Any) -> list[dict[str, Any]]:
    return browser.execute_script("return JSON.parse(document.getElementById('data').textContent).entries")


def test_it_loads_without_an_error_and_without_a_network(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


def label_of(browser: Any, name: str) -> str:
    return browser.find_element("id", f"chart-{name}").get_attribute("aria-label")


def test_a_screen_reader_is_told_what_every_chart_shows(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    charts = browser.execute_script("return JSON.parse(document.getElementById('data').textContent).charts")
    marks = {
        "lines": "Lines with points, one a series: ", "bars": "Bars, one a line: ", "points": "Points, one a step: ",
        "stack": "Stacked bars, one a line: ", "ratios": "Points, one a case, ",
    }  # fmt: skip
    assert {chart["name"] for chart in charts} == set(NAMES)
    for chart in charts:
        label, panel = label_of(browser, chart["name"]), chart["panels"][0]
        assert label.startswith(f"{chart['title']}{': ' if panel['name'] else ''}{panel['name']}. "), label
        assert marks[chart["kind"]] in label
        assert chart["y"] in label
        assert chart["x"] in label
        if chart["kind"] != "ratios":
            assert all(each["series"] in label for each in panel["data"]), label
        assert ("(logarithmic)" in label) == (chart["logX"] or chart["logY"]), label
    assert "Crosses at the edge: failed." in label_of(browser, "fig1a")
    assert "Ranges: intervals." in label_of(browser, "fig1a")
    assert "Ranges" not in label_of(browser, "fig1b")


def test_the_label_of_a_chart_is_of_what_it_shows_now(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    before = label_of(browser, "memory")
    choose(browser, "select[data-panel=memory]", "1")
    wait(browser, "return document.getElementById('chart-memory').ariaLabel !== " + json.dumps(before))
    names = browser.execute_script(
        "return JSON.parse(document.getElementById('data').textContent).charts"
        ".find((chart) => chart.name === 'memory').panels.map((panel) => panel.name)"
    )
    assert names[1] in label_of(browser, "memory")
    choose(browser, "#pick-y", "gib")
    wait(
        browser, "return document.getElementById('chart-explore').ariaLabel.includes('Peak memory, GiB (logarithmic)')"
    )
    assert label_of(browser, "explore").startswith("The chosen rows. Lines with points")


def test_filters_leave_the_rows_that_match(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    every = entries(browser)
    assert len(visible_rows(browser)) == len(every)
    choose(browser, "select[data-filter=mode]", "forward")
    choose(browser, "select[data-filter=size]", "B/2")
    wanted = [str(i) for i, each in enumerate(every) if (each["mode"], each["size"]) == ("forward", "B/2")]
    assert visible_rows(browser) == wanted
    count = browser.execute_script("return document.getElementById('row-count').textContent")
    assert count == f"{len(wanted)} of {len(every)} rows"
    browser.find_element("id", "search").send_keys("dis 2048")
    wanted = [i for i in wanted if every[int(i)]["model"] == "DiS-B/2" and every[int(i)]["px"] == 2048]
    assert visible_rows(browser) == wanted
    assert wanted


def test_headings_sort(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    every = entries(browser)
    button = browser.find_element("css selector", "button[data-key=ms]")
    for reverse in (False, True):
        browser.execute_script("arguments[0].click()", button)
        times = [every[int(i)]["ms"] for i in visible_rows(browser)]
        measured = [ms for ms in times if ms is not None]
        assert measured == sorted(measured, reverse=reverse)
        assert times[len(measured) :] == [None] * (len(times) - len(measured))
        assert None in times
        state = browser.execute_script("return arguments[0].parentElement.getAttribute('aria-sort')", button)
        assert state == ("descending" if reverse else "ascending")
    browser.execute_script("document.querySelector('button[data-key=model]').click()")
    models = [every[int(i)]["model"] for i in visible_rows(browser)]
    assert models[0].startswith("DiG")
    assert models[-1].startswith("Flash-DiT")


def test_a_button_copies_the_command(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    # What is written to the clipboard is looked at on its way: headless browsers don't let a page read it.
    browser.execute_script(
        "navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }"
    )
    button = browser.find_element("css selector", "tr[data-i='1'] button.copy")
    browser.execute_script("arguments[0].click()", button)
    wait(browser, "return Boolean(window.copied)")
    assert browser.execute_script("return window.copied") == entries(browser)[1]["command"]
    assert button.get_attribute("textContent") == "Copied"


def test_the_explorer_shows_what_is_chosen(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    every = entries(browser)

    def status() -> str:
        return browser.execute_script("return document.getElementById('explore-status').textContent")

    for key, value in (("file", "rows.jsonl"), ("mode", "forward"), ("size", "S/2"), ("way", "graph")):
        choose(browser, f"#pick-{key}", value)
    choose(browser, "#pick-machine", "NVIDIA H100 80GB HBM3")
    shown_rows = [
        each for each in every
        if (each["file"], each["mode"], each["size"], each["way"]) == ("rows.jsonl", "forward", "S/2", "graph")
    ]  # fmt: skip
    assert status().startswith(f"{len(shown_rows)} of {len(every)} ")
    wait(browser, "return document.querySelector('#chart-explore svg.marks').textContent.includes('1024')")
    choose(browser, "#pick-y", "gib")
    wait(browser, "return document.querySelector('#chart-explore svg.marks').textContent.includes('GiB')")
    choose(browser, "#pick-x", "size")
    choose(browser, "#pick-px", "1024")
    wait(browser, "return document.querySelector('#chart-explore svg.marks').textContent.includes('Model size')")
    # By hand: the numbers behind the chart, each with its command.
    browser.execute_script("document.querySelector('details.numbers[data-chart=explore]').open = true")
    wait(browser, "return document.querySelector('details.numbers[data-chart=explore] tr')")
    lines = browser.execute_script(
        "return [...document.querySelectorAll('details.numbers[data-chart=explore] tr')].map((row) => "
        "[row.cells[0].textContent, row.cells[1].textContent, row.querySelector('.copy').dataset.command])"
    )
    wanted = {
        (each["series"], each["size"], each["command"]) for each in every
        if (each["file"], each["mode"], each["px"]) == ("rows.jsonl", "forward", 1024)
    }  # fmt: skip
    assert {tuple(line) for line in lines} == wanted


def test_hovering_and_clicking_read_a_number(shown: Callable[..., Any], page: Path) -> None:
    from selenium.webdriver import ActionChains

    browser = shown(page)
    row = next(row for row in step_rows() if row.case.family == "DiG" and row.case.resolution == 256)
    chart = browser.find_element("id", "chart-fig1a")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", chart)
    points = browser.find_elements("css selector", "#chart-fig1a g.mark-symbol path[aria-label]")
    assert points
    target = points[-1] if len(points) == 1 else points[len(points) // 2]
    ActionChains(browser).move_to_element(target).perform()
    wait(browser, "return document.querySelector('#vg-tooltip-element.visible')?.textContent.includes('Model')")
    said = browser.execute_script("return document.getElementById('vg-tooltip-element').textContent")
    assert "[" in said
    assert "ms" in said
    ActionChains(browser).click(target).perform()
    wait(browser, "return !document.getElementById('picked-fig1a').hidden")
    picked = browser.execute_script("return document.querySelector('#picked-fig1a code').textContent")
    assert picked.startswith("python -m bench run --models ")
    assert row.fps is not None


def test_another_panel_is_drawn(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    before = browser.execute_script("return document.querySelector('#chart-memory svg.marks').textContent")
    named = "return [...document.querySelectorAll('select[data-panel=memory] option')].map((each) => each.textContent)"
    other = next(i for i, name in enumerate(browser.execute_script(named)) if " at 256," in name)
    choose(browser, "select[data-panel=memory]", str(other))
    wait(browser, "return document.querySelector('#chart-memory svg.marks')?.textContent !== " + json.dumps(before))


def test_hostile_texts_stay_texts(shown: Callable[..., Any], hostile: Path) -> None:
    browser = shown(hostile)
    title = browser.title
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    wait(browser, "return document.querySelectorAll('details.numbers tr').length > 10")
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert browser.title == title != "taken"
    injected = browser.execute_script(
        "return [...document.querySelectorAll('img, iframe, b, [onerror], a[href^=javascript]')]"
        ".filter((each) => !each.closest('.missing')).map((each) => each.outerHTML)"
    )
    assert injected == []
    shown_text = browser.execute_script("return document.getElementById('row-table').textContent")
    assert HOSTILE[0] in shown_text
    legend = browser.execute_script("return document.querySelector('#chart-fig1a .legend').textContent")
    assert HOSTILE[0] in legend


def test_in_ci_a_missing_browser_fails_and_elsewhere_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI has to install it"):
        installed(("no-such-browser",), "browser")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        installed(("no-such-browser",), "browser")
