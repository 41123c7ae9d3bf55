"""The chat page by keyboard alone, and on a small screen."""

from __future__ import annotations

from .browser import Browser, Keys, needs_chromium
from .standin import StandIn


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
