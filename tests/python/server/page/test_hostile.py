"""The chat page with a model that wishes the reader ill: tests/python/server/hostile.py."""

from __future__ import annotations

import pytest

from meki.server import page as served_page

from ..hostile import HOSTILE
from .browser import Browser, JavascriptException, needs_chromium
from .standin import StandIn


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
