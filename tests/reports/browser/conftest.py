from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dig.environment import ROOT
from reports.page.__main__ import app
from tests.reports.browser.driving import BROWSERS, DRIVERS, installed, wait
from tests.reports.page_rows import HOSTILE, write_everything

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
HOSTS_TEXT = "".join(HOSTILE)
"""All of them at once: a page of its own for each would show no more."""


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="package")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hostile"), HOSTS_TEXT)


@pytest.fixture(scope="package")
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
