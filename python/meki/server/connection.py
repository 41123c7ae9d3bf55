"""A connection whose client has to keep up."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings


def connection_class(settings: Settings) -> type[H11Protocol]:
    """The protocol for uvicorn: it drops a client who takes too long for the head of a request, to read an
    answer, or to end a body whose answer is over.

    Reading is measured by the buffer of what is to be sent: from when it is full until it is nearly empty."""

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_timer: asyncio.TimerHandle | None = None
            self._read_timer: asyncio.TimerHandle | None = None
            self._body_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._head_timer is None:  # the beginning of a next head
                self._await_head()
            if self._body_timer is not None and self.conn.our_state is not h11.DONE:  # the body was passed over
                self._stop_body_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
                self._body_timer = self.loop.call_later(settings.receive_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._read_timer = self.loop.call_later(settings.send_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._read_timer is not None:
                self._read_timer.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_waiting()
            self._stop_body_timer()
            if self._read_timer is not None:
                self._read_timer.cancel()

        def _stop_body_timer(self) -> None:
            if self._body_timer is not None:
                self._body_timer.cancel()
                self._body_timer = None

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(settings.receive_s, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Connection
