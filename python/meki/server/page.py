"""The chat page: its files, and the Markdown of answers as HTML."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from .markdown import to_html

MAX_CHARACTERS = 100_000
"""Of a text that is rendered; a longer one the page shows as it is."""

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
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again with the ETag
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(HEADERS)
        return response


def page_routes() -> list[BaseRoute]:
    """GET / and the files that it asks for; POST /page/markdown, {"text": ...}, gives {"html": ...}."""
    files = _Files(directory=Path(__file__).with_name("page"))

    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    return [
        Route("/", index, methods=["GET"]),
        Route("/page/markdown", _markdown, methods=["POST"]),
        Mount("/page", files),
    ]


async def _markdown(request: Request) -> Response:
    text = (await request.json())["text"]
    if len(text) > MAX_CHARACTERS:
        return JSONResponse({"error": {"message": "too long to be rendered"}}, status_code=413)
    return JSONResponse({"html": await asyncio.to_thread(to_html, text)})
