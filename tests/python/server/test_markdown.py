"""Markdown of a text that wishes the reader ill."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki.server.markdown import to_html

from .hostile import HOSTILE

LINK = {"href", "rel", "target", "title"}
ALLOWED: dict[str, set[str]] = {
    **{tag: set() for tag in ("h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "em", "strong", "s", "code")},
    **{tag: set() for tag in ("ul", "li", "blockquote", "table", "thead", "tbody", "tr", "figcaption", "span")},
    "a": LINK,
    "ol": {"start"},
    "td": {"class"},
    "th": {"class"},
    "figure": {"class"},
    "pre": {"tabindex"},
    "div": {"class", "tabindex"},
    "button": {"type", "class"},
}
"""All that a page gets to see, and nothing in it loads or runs anything."""


class Elements(HTMLParser):
    """Of a text: its elements with their attributes, and what can be read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def check(text: str) -> None:
    for tag, attributes in Elements(to_html(text)).found:
        assert tag in ALLOWED
        assert attributes.keys() <= ALLOWED[tag]
        if tag == "a":
            assert (attributes["href"] or "").lower().startswith(("http:", "https:", "mailto:"))
            assert attributes["rel"] == "noopener noreferrer nofollow"
            assert attributes["target"] == "_blank"


@pytest.mark.parametrize("text", HOSTILE)
def test_of_a_hostile_text_nothing_is_left_but_text(text: str) -> None:
    check(text)


PARTS = ["<", ">", '"', "'", "`", "```", "~~~", "[", "](", ")", "![", "javascript:", "data:", "http://a", "|", "|-|\n"]
PARTS += [
    "\n",
    "\n\n",
    "    ",
    "> ",
    "* ",
    "&#x3c;",
    "\\",
    "<script>",
    "onload=",
    "<!--",
    "-->",
    "a",
    "\t",
    "\0",
    "[a]: ",
]


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=40).map("".join))
def test_of_any_text_only_harmless_elements_are_made(text: str) -> None:
    check(text)


def test_what_markdown_is_for() -> None:
    html = to_html("# A\n*b* **c** ~~d~~ `e`\n\n1. f\n\n> g\n\n[h](https://i.example)\n")
    tags = [tag for tag, _ in Elements(html).found]
    assert tags == ["h1", "p", "em", "strong", "s", "code", "ol", "li", "blockquote", "p", "p", "a"]


def test_an_image_is_a_link() -> None:
    html = to_html("![a chart](https://a.example/chart.png)")
    assert "<img" not in html
    assert Elements(html).text.strip() == "!a chart"
    assert 'href="https://a.example/chart.png"' in html


def test_code_has_its_language_and_a_button() -> None:
    parsed = Elements(to_html("```python x\nif a < b: pass\n```"))
    assert parsed.text.strip() == "pythonCopyif a < b: pass"
    assert ("button", {"type": "button", "class": "copy-code"}) in parsed.found


def test_cells_of_a_table_are_aligned_without_a_style() -> None:
    parsed = Elements(to_html("|a|b|\n|-|-:|\n|1|2|"))
    assert [attributes for tag, attributes in parsed.found if tag == "td"] == [{}, {"class": "right"}]


@pytest.mark.parametrize(
    "url", ["javascript:a()", "JAVASCRIPT:a()", "data:text/html,a", "//a", "/v1/models", "a", "file:///a"]
)
def test_a_link_that_leads_elsewhere_stays_text(url: str) -> None:
    assert Elements(to_html(f"[a]({url})")).text.strip() == f"[a]({url})"
