"""What the chat page keeps: conversations, their names, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from .browser import Browser, Keys, needs_chromium
from .standin import StandIn


@needs_chromium
def test_conversations_are_kept(page: Browser, url: str) -> None:
    page.ask("The first one")
    page.chord(Keys.CONTROL, "k")
    page.until(lambda: page.messages() == [])
    page.ask("The second one")
    assert page.texts("#conversations a") == ["The second one", "The first one"]
    page.driver.refresh()
    page.until(lambda: page.messages() == ["The second one", "An answer."])
    page.click("#conversations a:not([aria-current])")
    page.until(lambda: page.messages() == ["The first one", "An answer."])
    page.driver.back()
    page.until(lambda: page.messages()[:1] == ["The second one"])
    page.driver.get(url)
    page.until(lambda: page.texts("#conversations a"))
    assert page.messages() == []


@needs_chromium
def test_a_transaction_that_fails_at_its_end_is_told_of(page: Browser) -> None:
    """As where the disk is full."""
    page.js("""
        const { put } = IDBObjectStore.prototype;
        IDBObjectStore.prototype.put = function (value) {
          const request = put.call(this, value);
          request.addEventListener("success", () => this.transaction.abort());
          return request;
        };
    """)
    page.ask("Hello")
    page.until(lambda: page.one("#toast span").text == "This browser could not keep the conversation; export it.")


@needs_chromium
def test_an_answer_goes_on_while_another_conversation_is_open(page: Browser, standin: StandIn) -> None:
    standin.answer = lambda body: ["It takes", 1.0, " a while."] if "Slow" in str(body) else ["At once."]
    page.say("Slow")
    page.chord(Keys.CONTROL, "k")
    assert page.ask("Quick") == "At once."
    page.driver.back()
    page.until(lambda: page.messages() == ["Slow", "It takes a while."])
    assert not standin.left.is_set()


@needs_chromium
def test_tabs_follow_each_other(page: Browser, standin: StandIn) -> None:
    page.ask("From the first")
    address, first = page.driver.current_url, page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    second = page.driver.current_window_handle
    other = Browser(page.driver, address)
    try:
        kept = ["From the first", "An answer."]
        other.until(lambda: other.messages() == kept)
        standin.answer = lambda body: ["It takes", 1.0, " a while."]
        other.say("From the second")
        page.driver.switch_to.window(first)
        kept += ["From the second", "It takes a while."]
        page.until(lambda: page.messages() == kept)
        page.driver.refresh()  # a tab that has kept nothing of its own since has not lost it either
        page.until(lambda: page.messages() == kept)
        # Both at once, in one conversation: neither loses what the other has.
        page.say("One")
        page.driver.switch_to.window(second)
        other.until(lambda: other.messages()[-2:-1] == ["One"])
        other.say("Two")
        kept += ["One", "It takes a while.", "Two", "It takes a while."]
        other.until(lambda: other.messages() == kept and not other.all("[aria-busy=true]"))
        other.driver.refresh()
        other.until(lambda: other.messages() == kept)
        # What fails and is tried again stays one answer.
        standin.refusal = JSONResponse({"error": {"message": "tired"}}, status_code=500)
        other.say("Three")
        other.one(".retry")
        page.driver.switch_to.window(first)
        page.until(lambda: page.messages()[-2:] == ["Three", ""])
        page.driver.switch_to.window(second)
        standin.refusal = None
        other.click(".retry")
        page.driver.switch_to.window(first)
        page.until(lambda: page.messages()[-2:] == ["Three", "It takes a while."])
        assert not page.all(".versions:not([hidden])")
        # Settings that are being changed are not lost when the other tab keeps the conversation.
        page.click("#settings")
        page.driver.switch_to.window(second)
        other.ask("Four")
        page.driver.switch_to.window(first)
        page.one("[name=system]").send_keys("Be brief")
        page.press(Keys.ESCAPE)
        page.driver.switch_to.window(second)
        other.until(lambda: other.texts("#system p") == ["Be brief"])
        # Deleted in one while the other writes, it is gone.
        other.say("Five")
        page.driver.switch_to.window(first)
        page.until(lambda: page.messages()[-2:-1] == ["Five"])
        page.click(".delete")
        page.until(lambda: page.messages() == [])
        assert standin.left.wait(60)
        page.driver.refresh()
        page.until(lambda: page.texts("#model option"))
        assert not page.all("#conversations a")
        page.driver.switch_to.window(second)
        other.until(lambda: other.messages() == [] and not other.all("#conversations a"))
        assert other.complaints() == []
    finally:
        page.driver.switch_to.window(second)
        page.driver.close()
        page.driver.switch_to.window(first)


@needs_chromium
def test_a_conversation_that_cannot_be_deleted_is_told_of(page: Browser) -> None:
    page.ask("Hello")
    page.js("""
        IDBObjectStore.prototype.delete = function () {
          this.transaction.abort();
          throw new DOMException("gone", "UnknownError");
        };
    """)
    page.click(".delete")
    page.until(lambda: page.one("#toast span").text.startswith("This browser could not delete the conversation"))


@needs_chromium
@pytest.mark.parametrize(
    "script",
    [
        "IDBObjectStore.prototype.getAll = () => { throw new DOMException('damaged', 'UnknownError'); };",
        "BroadcastChannel = class { constructor() { throw new DOMException('blocked', 'SecurityError'); } };",
    ],
)
def test_a_database_that_cannot_be_used(page: Browser, script: str) -> None:
    told = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    page.driver.refresh()
    page.until(lambda: page.one("#notice span").text.startswith("This browser does not let the page keep"))
    assert page.ask("Hello") == "An answer."
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", told)


@needs_chromium
def test_rename_and_delete(page: Browser) -> None:
    page.ask("A name that will not do")
    page.click(".rename")
    page.press(Keys.CONTROL, "a")
    page.press("Another" + Keys.ENTER)
    page.until(lambda: page.texts("#conversations a") == ["Another"])
    page.driver.refresh()
    page.until(lambda: page.texts("#conversations a") == ["Another"])
    page.click(".delete")
    page.until(lambda: not page.all("#conversations a") and page.messages() == [])
    page.click("#toast button")
    page.until(lambda: page.messages() == ["A name that will not do", "An answer."])
    page.click(".delete")
    page.until(lambda: page.messages() == [])
    page.driver.refresh()
    page.until(lambda: page.texts("#model option"))
    assert not page.all("#conversations a")


@needs_chromium
def test_export_and_import(page: Browser, standin: StandIn, tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.ask("Keep *this*")
    page.click("#export")
    file = tmp_path / "meki-conversations.json"
    page.until(file.exists)
    exported = json.loads(file.read_text())
    assert [message["content"] for message in exported["conversations"][0]["messages"]] == ["Keep *this*", "An answer."]
    page.click(".delete")
    page.until(lambda: page.messages() == [])
    page.all("#import-file")[0].send_keys(str(file))
    page.until(lambda: page.texts("#conversations a") == ["Keep *this*"])
    page.click("#conversations a")
    page.until(lambda: page.messages() == ["Keep *this*", "An answer."])


GOOD = {"id": "a", "title": "T", "changed": 1, "settings": {"sampling": {}}, "head": None, "messages": []}
MESSAGE: dict[str, Any] = {"id": "m", "parent": None, "role": "user", "content": "Hello", "reasoning": "", "calls": []}


@needs_chromium
@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "null",
        "[]",
        json.dumps({"format": "another", "version": 1}),
        *(
            json.dumps({"format": "meki-conversations", "version": 1, "conversations": conversations})
            for conversations in (
                None,
                [None],
                [{**GOOD, "id": 7}],
                [{**GOOD, "head": "nobody"}],
                [{**GOOD, "messages": [{**MESSAGE, "role": "system"}]}],
                [{**GOOD, "messages": [MESSAGE, MESSAGE]}],
                [{**GOOD, "messages": [{**MESSAGE, "content": {"a": 1}}]}],
                [{**GOOD, "settings": {"sampling": {"seed": "x"}}}],
            )
        ),
    ],
)
def test_a_file_that_is_none_of_the_page_is_refused(page: Browser, tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    page.all("#import-file")[0].send_keys(str(file))
    assert page.one("#toast span").text.startswith("The file was not imported: ")
    assert not page.all("#conversations a")


@needs_chromium
@pytest.mark.parametrize("parent", ["lost", "m"])
def test_a_message_whose_parent_is_lost_begins_a_branch(page: Browser, tmp_path: Path, parent: str) -> None:
    file = tmp_path / "orphan.json"
    conversation = {**GOOD, "messages": [{**MESSAGE, "parent": parent}], "head": "m"}
    file.write_text(json.dumps({"format": "meki-conversations", "version": 1, "conversations": [conversation]}))
    page.all("#import-file")[0].send_keys(str(file))
    page.click("#conversations a")
    page.until(lambda: page.messages() == ["Hello"])
