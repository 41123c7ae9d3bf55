"""Server-sent events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error


def event(data: Any, name: str | None = None) -> str:
    """One event. data: what JSON can hold. name: its type, in APIs whose events have one."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Sends events as they are made. The generator is closed with the sending, however that ends; an error of its own
    becomes a last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], on_error: Callable[[ApiError], str]) -> None:
        """on_error: the event that tells of an error."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for text in self._with_error():
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_error(self) -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(self._events):
            try:
                async for text in self._events:
                    yield text
            except Exception as error:
                yield self._on_error(as_api_error(error))
