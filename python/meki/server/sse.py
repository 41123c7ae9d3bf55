"""Server-sent events."""

from __future__ import annotations

import asyncio
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


COMMENT = ": still here\n\n"
"""What readers of events pass over."""


class EventStream(Response):
    """Sends events as they are made. The generator is closed with the sending, however that ends; an error of its own
    becomes a last event."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        on_error: Callable[[ApiError], str],
        *,
        ping_s: float,
        ping: Callable[[], str] = lambda: COMMENT,
    ) -> None:
        """on_error: the event that tells of an error. ping_s: seconds without an event after which what `ping` gives is
        sent, and again, so that nobody takes the connection for dead."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_error = on_error
        self._ping_s = ping_s
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        last = clock()

        async def ping() -> None:
            nonlocal last
            while True:
                await asyncio.sleep(last + self._ping_s - clock())
                if clock() >= last + self._ping_s:
                    last = clock()
                    await _send_part(send, self._ping())

        pinging = asyncio.create_task(ping())
        try:
            async with contextlib.aclosing(self._with_error()) as events:
                async for text in events:
                    last = clock()
                    await _send_part(send, text)
                    await asyncio.sleep(0)  # for whoever tells that the client has gone
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_error(self) -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(self._events):
            try:
                async for text in self._events:
                    yield text
            except Exception as error:
                yield self._on_error(as_api_error(error))


async def _send_part(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
