"""The page as somebody sees it who has a browser: Chromium without a window."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

pytest.importorskip("selenium.webdriver")  # which skips the tests that import this

from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["ELSEWHERE", "Browser", "JavascriptException", "Keys", "chromium", "needs_chromium"]

T = TypeVar("T")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (on Debian: apt install chromium chromium-driver)"
)
FALSE_ALARMS = ("status of 401", "status of 429", "status of 500", "status of 400", "net::ERR_")
"""The browser's log tells of every answer that is an error; tests ask for some."""

ELSEWHERE = "elsewhere.invalid"
"""This machine, by a name that the browser does not know to be."""


class Browser:
    """One page. What is asked about it waits until it is so, and fails after a minute."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def until(self, condition: Callable[[], T]) -> T:
        wait = WebDriverWait(self.driver, 60, 0.05, ignored_exceptions=[StaleElementReferenceException, IndexError])
        return wait.until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The last that is to be seen."""
        return self.until(lambda: [element for element in self.all(selector) if element.is_displayed()][-1])

    def click(self, selector: str) -> None:
        self.until(lambda: self.one(selector).click() or True)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def press(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def chord(self, *keys: str) -> None:
        actions = webdriver.ActionChains(self.driver)
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in keys[:-1]:
            actions.key_up(key)
        actions.perform()

    def say(self, text: str) -> None:
        """Sends a message, and waits for the answer to begin."""
        count = len(self.all(".message"))
        self.one("#prompt").send_keys(text + Keys.ENTER)
        self.until(lambda: len(self.all(".message")) == count + 2)

    def ask(self, text: str) -> str:
        """The same, to the answer's end; its text."""
        self.say(text)
        return self.answer()

    def answer(self) -> str:
        """The last answer, once it is complete and rendered."""
        self.until(lambda: not self.all("[aria-busy=true]"))
        return self.texts(".assistant .body")[-1].strip()

    def messages(self) -> list[str]:
        return [text.strip() for text in self.texts(".message > .body")]

    def media(self, **features: str) -> None:
        """What the page's style sheet is told, as prefers_color_scheme="dark"."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})

    def size(self, width: int, height: int) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def complaints(self) -> list[str]:
        """Errors of scripts and what the policy has stopped, since the last call."""
        log = [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        return [message for message in log if not any(alarm in message for alarm in FALSE_ALARMS)]


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.add_argument(f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")  # a dialog stays, for a test to find
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
