"""The chat page: its files at / and below /page, and the Markdown of answers as HTML."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from .body import Body
from .endpoint import Call, Endpoint
from .errors import ApiError
from .markdown import to_html

MAX_CHARACTERS = 20_000
"""Of a text that is rendered, which takes a second or two at most; a longer one the page shows as it is."""

# Scripts and styles are the page's own files; HTML gets into the page in one place, markdown.js.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types markdown"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, and asked for again with the ETag
}
_FILES = StaticFiles(directory=Path(__file__).with_name("page"))
_RENDERER = ThreadPoolExecutor(1, "markdown")  # not the event loop's threads, which generations start in


class MarkdownBody(Body):
    text: Annotated[str, Field(max_length=MAX_CHARACTERS)]


async def file(call: Call, _: None) -> Response:
    """A file of the page; at / the page."""
    name = call.http.path_params.get("name", "index.html")
    try:
        response = await _FILES.get_response(name, call.http.scope)
    except HTTPException as error:
        raise ApiError(error.status_code, f"the page has no file {name[:100]!r}") from error
    response.headers.update(HEADERS)
    return response


async def markdown(_: Call, body: MarkdownBody) -> Response:
    """Markdown as HTML."""
    html = await asyncio.get_running_loop().run_in_executor(_RENDERER, to_html, body.text)
    return JSONResponse({"html": html})


ENDPOINTS = [
    Endpoint("GET", "/", file),
    Endpoint("GET", "/page/{name}", file),
    Endpoint("POST", "/markdown", markdown, MarkdownBody),
]
