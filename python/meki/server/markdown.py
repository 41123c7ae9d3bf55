"""What a model writes, as HTML that a page can show: its Markdown and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

LINK_SCHEMES = ("http", "https", "mailto")
LINK_ATTRIBUTES = {"rel": "noopener noreferrer nofollow", "target": "_blank"}


def to_html(text: str) -> str:
    """CommonMark with tables and strikethrough. HTML in it is text; links go where `LINK_SCHEMES` say; an image is a
    link behind an exclamation mark, so that a text makes no browser ask another server for anything. There are no
    style attributes, which a strict Content-Security-Policy forbids."""
    return _PARSER.render(text)


def _is_link(url: str) -> bool:
    try:
        return urlsplit(url).scheme in LINK_SCHEMES
    except ValueError:  # half an IPv6 address, for one
        return False


def _link_open(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    for name, value in LINK_ATTRIBUTES.items():
        tokens[index].attrSet(name, value)
    return renderer.renderToken(tokens, index, options, env)


def _code(_: RendererHTML, tokens: Sequence[Token], index: int, *rest: Any) -> str:
    words = tokens[index].info.split(maxsplit=1)
    return (
        f'<figure class="code"><figcaption><span>{escapeHtml(words[0][:40]) if words else ""}</span>'
        '<button type="button" class="copy-code">Copy</button></figcaption>'
        f'<pre tabindex="0"><code>{escapeHtml(tokens[index].content)}</code></pre></figure>\n'
    )


def _table_open(*_: Any) -> str:
    return '<div class="table" tabindex="0"><table>\n'


def _table_close(*_: Any) -> str:
    return "</table></div>\n"


def _cell_open(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    style = tokens[index].attrs.pop("style", None)
    if style is not None:
        tokens[index].attrSet("class", str(style).removeprefix("text-align:"))
    return renderer.renderToken(tokens, index, options, env)


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")
    parser.validateLink = _is_link  # type: ignore[method-assign]  # the documented way
    rules: dict[str, Callable[..., str]] = {
        "link_open": _link_open,
        "fence": _code,
        "code_block": _code,
        "table_open": _table_open,
        "table_close": _table_close,
        "th_open": _cell_open,
        "td_open": _cell_open,
    }
    for name, rule in rules.items():
        parser.add_render_rule(name, rule)
    return parser


_PARSER = _make_parser()
