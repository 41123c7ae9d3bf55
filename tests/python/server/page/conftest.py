"""The chat page in a browser, of a server that says what a test tells it to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from .standin import StandIn, serving

if TYPE_CHECKING:
    from .browser import Browser


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from .browser import chromium  # needs selenium

    with chromium() as driver:
        yield driver


@pytest.fixture
def standin() -> StandIn:
    return StandIn()


@pytest.fixture
def url(standin: StandIn) -> Iterator[str]:
    """Of a server of its own, and so of an origin where nothing is kept yet."""
    with serving(standin.app()) as url:
        yield url


@pytest.fixture
def page(driver: Any, url: str) -> Iterator[Browser]:
    from .browser import Browser

    browser = Browser(driver, url)
    browser.size(1280, 800)
    browser.media()
    browser.until(lambda: browser.texts("#model option"))
    yield browser
    assert browser.complaints() == []
    driver.get("about:blank")  # nothing goes on asking a server that has ended
