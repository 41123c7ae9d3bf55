"""A conversation on the chat page: questions, answers as they grow, versions and branches."""

from __future__ import annotations

from typing import Any

import pytest

from ..running import Running
from .browser import ELSEWHERE, Browser, Keys, needs_chromium
from .standin import StandIn


@needs_chromium
def test_a_real_model_answers(driver: Any, served: Running) -> None:
    page = Browser(driver, served.url)
    page.until(lambda: page.texts("#model option") == ["meki-tiny"])
    page.click("#settings")
    page.one("[name=max_tokens]").send_keys("12")
    page.press(Keys.ESCAPE)
    assert page.ask("Once upon a time")
    numbers = page.one(".numbers").text
    assert "12 tokens" in numbers and "tokens/s" in numbers and "ROM wait" in numbers
    assert page.complaints() == []
    driver.get("about:blank")
    served.wait_until_idle()


@needs_chromium
def test_an_answer_grows_and_is_rendered(page: Browser, standin: StandIn) -> None:
    standin.answer = lambda body: ["Some **bold", 0.5, "** text.", "\n\n```python\nx = 1\n```\n"]
    page.say("Hello")
    page.until(lambda: page.messages()[-1] == "Some **bold")
    assert page.one("#stop").is_displayed()
    page.answer()
    assert page.texts(".assistant strong") == ["bold"]
    assert page.texts(".assistant code") == ["x = 1\n"]
    assert "3 tokens" in page.one(".numbers").text and "31.3 tokens/s" in page.one(".numbers").text
    assert "ROM wait 4 µs, p99 61 µs" in page.one(".numbers").text
    assert "prompt 40, 12 cached" in page.one(".numbers").text
    assert page.one("#send").is_displayed()
    (body,) = standin.bodies
    assert body == {
        "model": "tale",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@needs_chromium
def test_a_second_question_has_the_first_before_it(page: Browser, standin: StandIn) -> None:
    page.ask("One")
    page.ask("Two")
    said = [(message["role"], message["content"]) for message in standin.bodies[-1]["messages"]]
    assert said == [("user", "One"), ("assistant", "An answer."), ("user", "Two")]


@needs_chromium
@pytest.mark.parametrize("by_key", [False, True])
def test_stop(page: Browser, standin: StandIn, by_key: bool) -> None:
    standin.answer = lambda body: ["It begins", 60.0, " and never ends."]
    page.say("Hello")
    page.until(lambda: page.messages()[-1] == "It begins")
    if by_key:
        page.press(Keys.ESCAPE)
    else:
        page.click("#stop")
    assert page.answer() == "It begins"
    assert page.one(".numbers").text == "stopped"
    assert standin.left.wait(60)


@needs_chromium
def test_regenerate_adds_a_version(page: Browser, standin: StandIn) -> None:
    answers = iter(["First.", "Second."])
    standin.answer = lambda body: [next(answers)]
    assert page.ask("Hello") == "First."
    page.click(".again")
    page.until(lambda: page.messages() == ["Hello", "Second."])
    page.answer()
    assert standin.bodies[0] == standin.bodies[1]
    assert page.one(".assistant .count").text == "2 of 2"
    page.click(".assistant .earlier")
    page.until(lambda: page.messages() == ["Hello", "First."])


@needs_chromium
def test_an_edited_message_begins_a_branch(page: Browser, standin: StandIn) -> None:
    standin.answer = lambda body: [f"To {body['messages'][-1]['content']}."]
    page.ask("One")
    page.ask("Two")
    page.js("document.querySelector('.user .edit').click()")
    page.one(".editor textarea").send_keys(Keys.CONTROL, "a")
    page.one(".editor textarea").send_keys("Three" + Keys.ENTER)
    page.until(lambda: page.messages() == ["Three", "To Three."])
    assert [message["content"] for message in standin.bodies[-1]["messages"]] == ["Three"]
    page.answer()
    page.click(".user .earlier")
    page.until(lambda: page.messages() == ["One", "To One.", "Two", "To Two."])


@needs_chromium
def test_a_failed_edit_leaves_all_as_it_was(page: Browser) -> None:
    page.ask("One")
    page.js("document.querySelector('.user .edit').click()")
    page.one(".editor textarea").send_keys("x" + Keys.ESCAPE)
    page.until(lambda: not page.all(".editor"))
    assert page.messages() == ["One", "An answer."]


@needs_chromium
def test_thoughts_are_folded(page: Browser, standin: StandIn) -> None:
    standin.answer = lambda body: [{"reasoning_content": "Hm, "}, {"reasoning_content": "<b>so</b>."}, "Yes."]
    assert page.ask("Well?") == "Yes."
    assert page.one(".thinking summary").text == "Thought"
    assert page.texts(".assistant .thoughts") == ["Hm, <b>so</b>."]
    assert not page.all(".assistant .thoughts")[0].is_displayed()
    page.click(".thinking summary")
    assert page.one(".thoughts").text == "Hm, <b>so</b>."


@needs_chromium
def test_tool_calls_are_shown(page: Browser, standin: StandIn) -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"at": "<b>"}'}}
    standin.answer = lambda body: [{"tool_calls": [first]}, {"tool_calls": [rest]}, {"finish": "tool_calls"}]
    page.ask("Look")
    assert page.texts(".call") == ['Calls look{"at": "<b>"}']


CLIPBOARD = "navigator.clipboard.readText().then(arguments[arguments.length - 1])"


@needs_chromium
def test_an_answer_and_its_code_are_copied(page: Browser, standin: StandIn) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    standin.answer = lambda body: ["So:\n\n```\na < b\n```\n"]
    page.ask("Hello")
    page.click(".assistant .copy")
    page.until(lambda: page.one(".assistant .copy").text == "Copied")
    assert page.driver.execute_async_script(CLIPBOARD) == "So:\n\n```\na < b\n```\n"
    page.click(".copy-code")
    page.until(lambda: page.one(".copy-code").text == "Copied")
    assert page.driver.execute_async_script(CLIPBOARD) == "a < b\n"


@needs_chromium
def test_from_another_machine_by_plain_http(driver: Any, url: str) -> None:
    """There a browser lets a page do less."""
    page = Browser(driver, url.replace("127.0.0.1", ELSEWHERE))
    assert page.js("return window.isSecureContext") is False
    page.until(lambda: page.texts("#model option"))
    assert page.ask("Hello") == "An answer."
    page.click(".assistant .copy")
    page.until(lambda: page.one(".assistant .copy").text == "Copied")
    page.driver.refresh()
    page.until(lambda: page.messages() == ["Hello", "An answer."])
