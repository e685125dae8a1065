"""The page in a real browser: it loads without an error, asks no network, and what can be clicked does what it says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dig.environment import ROOT
from reports.page.__main__ import app
from reports.page.sections import NAMES
from tests.reports.page_rows import HOSTILE, step_rows, timed, write_everything

pytestmark = pytest.mark.slow

BROWSERS = (os.environ.get("CHROME_BIN", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = (os.path.join(os.environ.get("CHROMEWEBDRIVER", ""), "chromedriver"), "chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
PHONE = 390
HOSTS_TEXT = "".join(HOSTILE)
"""All of them at once: a page of its own for each would show no more."""


def installed(names: tuple[str, ...], what: str) -> str:
    """Path of a program; in CI a missing one fails, elsewhere it skips what needs it."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"no {what} here: CI has to install it, or the page is not tested")
    if found is None:
        pytest.skip(f"needs {what}: apt-get install chromium chromium-driver")
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary, driver = installed(BROWSERS, "chromium"), installed(DRIVERS, "chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


def build(folder: Path, text: str = "") -> Path:
    result = CliRunner().invoke(app, [str(write_everything(folder / "rows", text)), "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder / "out" / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hostile"), HOSTS_TEXT)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of measured rows, whose names are as long as they get."""
    out = tmp_path_factory.mktemp("published")
    names = ("rows", "best", "extra", "bare", "capacity", "sampling", "sampling-best")
    result = CliRunner().invoke(app, [*(f"{ROOT}/results/h100/{name}.jsonl" for name in names), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out / "index.html"


@pytest.fixture
def shown(browser: Any) -> Callable[..., Any]:
    """Open a page as wide as is said and wait until everything is drawn; logs of what was before are dropped."""

    def show(path: Path, width: int = 1280, *, dark: bool = False) -> Any:
        browser.get_log("browser")
        browser.get_log("performance")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        browser.get(path.as_uri())
        wait(browser, "return document.body.dataset.ready === 'yes'")
        return browser

    return show


def wait(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda each: each.execute_script(script), message=script)


def visible_rows(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#row-table tbody tr')].filter((row) => !row.hidden)"
    return browser.execute_script(f"{script}.map((row) => row.dataset.i)")


def choose(browser: Any, selector: str, value: str) -> None:
    script = """
        const select = document.querySelector(arguments[0]);
        if (![...select.options].some((option) => option.value === arguments[1])) throw new Error(arguments[1]);
        select.value = arguments[1];
        select.dispatchEvent(new Event("input", { bubbles: true }));
        select.dispatchEvent(new Event("change", { bubbles: true }));
    """
    browser.execute_script(script, selector, value)


def entries(browser: Any) -> list[dict[str, Any]]:
    return browser.execute_script("return JSON.parse(document.getElementById('data').textContent).entries")


def test_it_loads_without_an_error_and_without_a_network(shown: Callable[..., Any], page: Path) -> None:
    browser = shown(page)
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


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


def test_in_ci_a_missing_browser_fails_and_elsewhere_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI has to install it"):
        installed(("no-such-browser",), "browser")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        installed(("no-such-browser",), "browser")
