"""What goes wrong on the chat page: keys, refusals, answers that break off, a server that is not there."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import JSONResponse

from .browser import Browser, Keys, needs_chromium
from .standin import StandIn, serving


@needs_chromium
def test_a_key_is_asked_for(driver: Any, url: str, standin: StandIn) -> None:
    standin.key = "sesame"
    page = Browser(driver, url)
    page.one("[name=key]").send_keys("wrong" + Keys.ENTER)
    page.one("[name=key]").send_keys("sesame" + Keys.ENTER)
    page.until(lambda: page.texts("#model option"))
    assert page.ask("Hello") == "An answer."
    standin.key = "another"
    page.say("Hello")
    page.one("[name=key]").send_keys("another" + Keys.ENTER)
    assert page.answer() == "An answer."
    assert page.js("return JSON.stringify(localStorage)").find("another") == -1
    assert page.complaints() == []


@needs_chromium
@pytest.mark.parametrize(
    ("status", "error", "headers", "words"),
    [
        (429, {"message": "64 wait"}, {"retry-after": "3"}, "The server is busy. Try again in 3 seconds."),
        (500, {"message": "it broke"}, {}, "The server failed: it broke"),
        (400, {"message": "no template"}, {}, "The server refused: no template"),
        (400, {"message": "64 tokens", "code": "context_length_exceeded"}, {}, "This chat no longer fits"),
    ],
)
def test_what_the_server_refuses_can_be_tried_again(
    page: Browser, standin: StandIn, status: int, error: dict[str, str], headers: dict[str, str], words: str
) -> None:
    standin.refusal = JSONResponse({"error": error}, status, headers)
    page.say("Hello")
    assert words in page.one(".problem").text
    standin.refusal = None
    page.click(".retry")
    page.until(lambda: page.messages() == ["Hello", "An answer."])
    assert page.answer() == "An answer."
    assert not page.one(".assistant").find_elements("css selector", ".versions:not([hidden])")


@needs_chromium
def test_trying_again_keeps_what_was_said_after_the_failure(page: Browser, standin: StandIn) -> None:
    standin.refusal = JSONResponse({"error": {"message": "it broke"}}, 500)
    page.ask("One")
    standin.refusal = None
    page.ask("Two")
    page.click(".retry")
    page.until(lambda: page.messages() == ["One", "An answer."])
    page.answer()
    page.click(".assistant .earlier")
    page.until(lambda: page.messages() == ["One", "", "Two", "An answer."])


@needs_chromium
@pytest.mark.parametrize(
    ("end", "words"),
    [({"error": {"message": "a row is damaged"}}, "a row is damaged"), (None, "The connection was lost")],
)
def test_an_answer_that_breaks_off(page: Browser, standin: StandIn, end: Any, words: str) -> None:
    standin.answer = lambda body: ["It begins", 0.2, end]
    page.say("Hello")
    assert words in page.one(".problem").text
    assert page.answer() == "It begins"
    standin.answer = lambda body: ["Whole."]
    page.click(".retry")
    page.until(lambda: page.messages() == ["Hello", "Whole."])
    page.answer()


@needs_chromium
def test_a_server_that_is_not_there_is_waited_for(driver: Any, standin: StandIn) -> None:
    with serving(standin.app()) as url:
        page = Browser(driver, url)
        page.until(lambda: page.texts("#model option"))
        page.js("window.fetch = (path, ...rest) => Promise.reject(new TypeError('Failed to fetch'))")
        page.say("Hello")
        assert "The server does not answer" in page.one(".problem").text
        page.driver.refresh()
        page.until(lambda: page.messages()[:1] == ["Hello"])
        page.click(".retry")
        assert page.answer() == "An answer."
        driver.get("about:blank")
