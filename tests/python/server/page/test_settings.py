"""Settings and looks of the chat page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .browser import Browser, Keys, needs_chromium
from .standin import StandIn


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
