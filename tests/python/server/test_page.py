"""The chat page, in a browser."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from meki.server import page as served_page

from .hostile import HOSTILE
from .running import Running, Serve
from .standin import StandIn, serving

webdriver = pytest.importorskip("selenium.webdriver")
from .browser import ELSEWHERE, Browser, JavascriptException, Keys, chromium, needs_chromium  # noqa: E402

FILES = sorted(path.name for path in Path(served_page.__file__).with_name("page").iterdir())


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
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
    browser = Browser(driver, url)
    browser.size(1280, 800)
    browser.media()
    browser.until(lambda: browser.texts("#model option"))
    yield browser
    assert browser.complaints() == []
    driver.get("about:blank")  # nothing goes on asking a server that has ended


# ---- What is served ----


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_files_come_with_a_strict_policy_and_without_a_key(serve: Serve, path: str) -> None:
    with serve(api_key="sesame") as server:
        answer = server.http.get(path)
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' data:"
        assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
        assert (
            answer.headers["content-type"].split(";")[0] == kinds[(path.rpartition(".")[2] if path != "/" else "html")]
        )
        again = server.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_nothing_in_the_page_is_inline_or_from_elsewhere() -> None:
    html = (Path(served_page.__file__).with_name("page") / "index.html").read_text()
    assert "style=" not in html and "<style" not in html and " on" + "click" not in html
    assert html.count("<script") == html.count("<script src=") + html.count('<script type="module" src=')
    for name in FILES:
        text = (
            (Path(served_page.__file__).with_name("page") / name).read_text().replace("http://www.w3.org/2000/svg", "")
        )
        assert "://" not in text


@pytest.mark.parametrize("path", ["/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/", "/page/a%00b"])
def test_there_are_no_other_files(served: Running, path: str) -> None:
    assert served.http.get(path).status_code == 404


def test_rendering_needs_the_key_and_has_a_limit(serve: Serve) -> None:
    with serve(api_key="sesame") as server:
        assert server.post("/markdown", {"text": "*a*"}).status_code == 401
        key = {"authorization": "Bearer sesame"}
        assert server.post("/markdown", {"text": "*a*"}, **key).json() == {"html": "<p><em>a</em></p>\n"}
        assert server.post("/markdown", {"text": "a" * (served_page.MAX_CHARACTERS + 1)}, **key).status_code == 400


def test_rendering_leaves_the_threads_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations start in the event loop's own threads, here one."""
    go = threading.Event()
    monkeypatch.setattr(served_page, "to_html", lambda text: text if go.wait(60) else "")

    async def render() -> bytes:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        body = served_page.MarkdownBody(text="a")
        rendering = asyncio.create_task(served_page.markdown(None, body))  # type: ignore[arg-type]
        await asyncio.sleep(0)  # it has begun
        await asyncio.to_thread(go.set)
        return bytes((await rendering).body)

    assert json.loads(asyncio.run(render())) == {"html": "a"}


# ---- A conversation ----


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


# ---- What is kept ----


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


# ---- Settings ----


@needs_chromium
def test_the_system_prompt_and_sampling_arrive(page: Browser, standin: StandIn) -> None:
    page.click("#settings")
    fields = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "64", "seed": "7"}
    page.one("[name=system]").send_keys("Speak in rhymes.")
    for name, value in fields.items():
        page.one(f"[name={name}]").send_keys(value)
    page.press(Keys.ESCAPE)
    page.ask("Hello")
    (body,) = standin.bodies
    assert body["messages"][0] == {"role": "system", "content": "Speak in rhymes."}
    assert {name: body[name] for name in fields} == {name: json.loads(value) for name, value in fields.items()}
    assert page.texts("#system p") == ["Speak in rhymes."]
    page.driver.refresh()
    page.until(lambda: page.texts("#model option"))
    page.ask("Again")
    page.click("#new")
    page.ask("Hello")  # a new chat begins with the same
    assert standin.bodies[2] == body


@needs_chromium
@pytest.mark.parametrize("kept", ["{", "null", "7", "{}", '{"sampling": "x"}', '{"sampling": {"seed": "x"}}'])
def test_kept_settings_that_are_damaged_are_none(page: Browser, standin: StandIn, kept: str) -> None:
    page.js("localStorage.setItem('settings', arguments[0])", kept)
    page.driver.refresh()
    page.until(lambda: page.texts("#model option"))
    assert page.ask("Hello") == "An answer."
    assert standin.bodies[0].keys() == {"model", "messages", "stream", "stream_options"}


BLOCKED = """
for (const name of ["localStorage", "sessionStorage", "indexedDB"])
  Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
"""
FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"


@needs_chromium
@pytest.mark.parametrize("script", [BLOCKED, FULL], ids=["blocked", "full"])
def test_a_browser_that_keeps_nothing(driver: Any, url: str, standin: StandIn, script: str) -> None:
    standin.key = "sesame"
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = driver.execute_cdp_cmd(command, {"source": script})
    try:
        page = Browser(driver, url)
        page.one("[name=key]").send_keys("sesame" + Keys.ENTER)
        page.until(lambda: page.texts("#model option"))
        page.click("#settings")
        page.one("[name=top_k]").send_keys("2")
        page.press(Keys.ESCAPE)
        page.click("#theme")
        assert page.one("#theme").get_attribute("aria-pressed") == "true"
        page.ask("Hello")
        page.click("#new")
        page.ask("Hello")
        assert [body["top_k"] for body in standin.bodies] == [2, 2]
        assert page.complaints() == []
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        driver.get("about:blank")


@needs_chromium
def test_what_is_out_of_range_is_not_sent(page: Browser, standin: StandIn) -> None:
    page.click("#settings")
    page.one("[name=top_p]").send_keys("1.5")
    page.one("[name=top_k]").send_keys("2")
    page.press(Keys.ESCAPE)
    page.ask("Hello")
    assert standin.bodies[0]["top_k"] == 2
    assert "top_p" not in standin.bodies[0]


@needs_chromium
def test_the_model_is_chosen_and_random_weights_are_labelled(driver: Any, url: str, standin: StandIn) -> None:
    standin.models += [{"id": "noise", "random_weights": True, "can_chat": True, "context": 64}]
    page = Browser(driver, url)
    page.until(lambda: page.texts("#model option") == ["tale", "noise (random weights)"])
    page.js("const s = document.querySelector('#model'); s.value = 'noise'; s.dispatchEvent(new Event('change'))")
    page.until(lambda: "Its weights are random" in page.one("#welcome-text").text)
    page.ask("Hello")
    assert standin.bodies[0]["model"] == "noise"
    assert page.texts(".assistant .who") == ["noise (random weights)"]


@needs_chromium
def test_dark_mode(page: Browser) -> None:
    def is_dark() -> bool:
        red = int(page.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
        return red < 128

    assert not is_dark()
    page.media(prefers_color_scheme="dark")
    assert is_dark()
    page.click("#theme")
    assert not is_dark()
    assert page.one("#theme").get_attribute("aria-pressed") == "false"
    page.driver.refresh()
    assert not is_dark()
    page.click("#theme")
    page.media(prefers_color_scheme="light")  # which is followed again
    assert not is_dark()


CONTRAST = """
const light = (color) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  const part = (value) => (value / 255 <= 0.03928 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
  return 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
};
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
};
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.checkVisibility()) continue;
  const both = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
  const ratio = (both[0] + 0.05) / (both[1] + 0.05);
  if (ratio < 4.5) poor.push([element.outerHTML.slice(0, 80), ratio]);
}
return poor;
"""
"""Texts with less contrast than WCAG's AA wants of small ones."""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Browser, standin: StandIn, scheme: str) -> None:
    standin.answer = lambda body: [
        "# A\n[b](https://c.example) `d`\n\n> e\n\n```x\nf\n```\n",
        {"error": {"message": "Oh"}},
    ]
    page.media(prefers_color_scheme=scheme)
    page.ask("Hello")
    page.click("#settings")
    assert page.one(".problem").text
    assert page.js(CONTRAST) == []


# ---- Keys, and small screens ----


@needs_chromium
def test_the_keyboard_is_enough(page: Browser) -> None:
    page.press("a", Keys.SHIFT, Keys.ENTER)
    page.press(Keys.NULL, "b", Keys.ENTER)
    page.until(lambda: page.messages()[:1] == ["a\nb"])
    page.answer()
    page.press(Keys.ARROW_UP)  # edits the last message
    assert page.one(".editor textarea").get_attribute("value") == "a\nb"
    page.press(Keys.ESCAPE)
    page.chord(Keys.CONTROL, "k")
    assert page.js("return document.activeElement.id") == "prompt"
    page.ask("c")
    page.js("document.querySelector('#conversations a').focus()")
    page.press(Keys.ARROW_DOWN)
    page.press(Keys.ENTER)
    page.until(lambda: page.messages()[:1] == ["a\nb"])


@needs_chromium
def test_all_controls_have_names_and_show_the_focus(page: Browser) -> None:
    page.ask("Hello")
    seen = set()
    for _ in range(30):
        page.press(Keys.TAB)
        name, outline = page.js(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.ariaLabel || e.labels?.[0]?.textContent || e.textContent.trim(),"
            " e.id === 'prompt' || e === document.body ? 'solid' : s.outlineStyle]"
        )
        assert name and outline == "solid"
        seen.add(name)
    assert {"Model", "Dark mode", "Settings of this chat", "Export", "Import", "Rename", "Delete"} <= seen
    assert {"Copy", "Edit", "Regenerate", "Message", "Send", "Hello"} <= seen


WIDE = "Some `code` and averyveryverylongwordthatneverends" + "x" * 300 + "\n\n|a|" + "b|" * 20 + "\n|-|" + "-|" * 20
WIDE += "\n|1|" + "2222|" * 20 + "\n\n```\n" + "y" * 400 + "\n```\n"


@needs_chromium
def test_a_small_screen_is_wide_enough(page: Browser, standin: StandIn) -> None:
    standin.answer = lambda body: [{"reasoning_content": "z" * 400}, WIDE]
    page.size(360, 740)
    page.ask("Hello " + "w" * 200)
    fits = "return [...arguments].map((s) => document.querySelector(s)).map((e) => e.scrollWidth - e.clientWidth)"
    assert page.js(fits, "html", "#main", "#thread", ".bar", "#dock") == [0] * 5
    assert page.js("return document.querySelector('#thread').getBoundingClientRect().width") == 360
    assert not page.all("#sidebar")[0].is_displayed()
    page.click("#menu")
    page.one("#conversations a")
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.all("#sidebar")[0].is_displayed())
    page.click("#menu")
    page.until(lambda: page.all("#sidebar")[0].rect["x"] == 0)
    page.click("#new")
    page.until(lambda: page.messages() == [] and not page.all("#sidebar")[0].is_displayed())


# ---- What goes wrong ----


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


# ---- A model that wishes the reader ill: tests/python/server/hostile.py ----


@needs_chromium
def test_hostile_text_runs_nothing_and_loads_nothing(page: Browser, standin: StandIn, url: str) -> None:
    standin.answer = lambda body: [{"reasoning_content": text} for text in HOSTILE] + ["\n\n".join(HOSTILE)]
    page.js("document.addEventListener('securitypolicyviolation', () => (window.pwned = 2))")
    page.ask(HOSTILE[0])
    for text in HOSTILE:  # each by itself: one might undo what another does
        standin.answer = lambda body, text=text: [
            text,
            {"tool_calls": [{"index": 0, "function": {"name": text, "arguments": text}}]},
        ]
        page.say(text)
        page.answer()
    page.js("for (const e of document.querySelectorAll('details')) e.open = true")
    page.js("for (const a of document.querySelectorAll('.body a')) a.dispatchEvent(new MouseEvent('mouseover'))")
    assert page.js("return window.pwned ?? null") is None
    assert page.js("return [...document.scripts].map((s) => s.getAttribute('src'))") == [
        "page/theme.js",
        "page/main.js",
    ]
    names = page.js("return [...new Set([...document.querySelectorAll('.body *')].map((e) => e.localName))]")
    assert not set(names) & {
        "script",
        "img",
        "svg",
        "iframe",
        "style",
        "link",
        "form",
        "input",
        "object",
        "embed",
        "base",
    }
    loaded = page.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(name.startswith(url) for name in loaded)
    assert not any("pwned" in path for path in standin.paths)
    assert len(page.driver.window_handles) == 1 and page.driver.current_url.startswith(url)
    assert page.messages()[-2] == HOSTILE[-1].strip()


@needs_chromium
def test_even_html_that_slipped_through_would_run_nothing(
    page: Browser, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the policy is for: here all of a text becomes HTML as it is. (Only what leads the page elsewhere needs no
    script, and is left out.)"""
    monkeypatch.setattr(served_page, "to_html", lambda text: text)
    for text in (text for text in HOSTILE if "http-equiv" not in text):
        standin.answer = lambda body, text=text: [text]
        page.say("Hello")
        page.answer()
    assert page.all(".body script") and page.all(".body iframe") and page.all(".body svg")
    assert page.js("return window.pwned ?? null") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


@needs_chromium
def test_html_is_made_in_one_place(page: Browser) -> None:
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        page.js("document.body.insertAdjacentHTML('beforeend', '<b>a</b>')")
    with pytest.raises(JavascriptException, match="Policy"):
        page.js("trustedTypes.createPolicy('another', {})")
    page.complaints()  # of just that


@needs_chromium
def test_a_text_of_a_million_characters_is_shown_as_it_is(page: Browser, standin: StandIn) -> None:
    text = "*a* <script>window.pwned=1</script> " + "x" * 1_000_000
    standin.answer = lambda body: ["*a*", 0.3, text[3:]]
    page.say("Hello")
    page.until(
        lambda: page.js("return document.querySelector('.assistant .body.raw')?.textContent.length") == len(text)
    )
    page.until(lambda: not page.all(".message.running"))
    assert page.js("return window.pwned ?? null") is None
    page.driver.refresh()
    page.until(
        lambda: page.js("return document.querySelector('.assistant .body.raw')?.textContent.length") == len(text)
    )
