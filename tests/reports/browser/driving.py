"""How tests find a browser and drive it."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

BROWSERS = (os.environ.get("CHROME_BIN", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVERS = (os.path.join(os.environ.get("CHROMEWEBDRIVER", ""), "chromedriver"), "chromedriver")
PHONE = 390


def installed(names: tuple[str, ...], what: str) -> str:
    """Path of a program; in CI a missing one fails, elsewhere it skips what needs it."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"no {what} here: CI has to install it, or the page is not tested")
    if found is None:
        pytest.skip(f"needs {what}: apt-get install chromium chromium-driver")
    return found


def wait(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda each: each.execute_script(script), message=script)


def choose(browser: Any, selector: str, value: str) -> None:
    script = """
        const select = document.querySelector(arguments[0]);
        if (![...select.options].some((option) => option.value === arguments[1])) throw new Error(arguments[1]);
        select.value = arguments[1];
        select.dispatchEvent(new Event("input", { bubbles: true }));
        select.dispatchEvent(new Event("change", { bubbles: true }));
    """
    browser.execute_script(script, selector, value)
