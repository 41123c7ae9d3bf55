"""One operation of an API: what it takes, what answers it, and that a caller who leaves ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..requests import Request, Requests
from .body import ClientGoneError, parse_body, read_body
from .errors import ApiError, as_api_error, engine_errors, error_response
from .generation import Generation
from .state import Model, Server


class Call:
    """One request to an endpoint. What it starts ends with it."""

    def __init__(self, server: Server, http: HttpRequest, stack: AsyncExitStack) -> None:
        self.server = server
        self.http = http
        self._stack = stack

    async def prepare(self, model: Model, make: Callable[[Requests], Request], param: str = "messages") -> Request:
        """What `make` makes of the engine's `requests`, on another thread: a grammar may take seconds. ApiError for
        what the engine refuses, and for a prompt, the parameter `param`, that does not fit the context."""
        with engine_errors(model.engine):
            request = await asyncio.to_thread(make, model.engine.requests)
        tokens, most = len(request.token_ids), model.context
        if tokens > most:
            raise ApiError(
                400,
                f"this model's maximum context length is {most} tokens, the prompt has {tokens}; shorten it",
                code="context_length_exceeded",
                param=param,
            )
        return request

    async def start(self, model: Model, requests: Sequence[Request]) -> list[Generation]:
        """Starts generations, in the order of the requests. ApiError if they find no place in the queue."""
        generations = [Generation(self.server, model, request) for request in requests]
        self._stack.push_async_callback(_close, generations)
        for generation in generations:
            await generation.start()
        return generations


async def _close(generations: Sequence[Generation]) -> None:
    await asyncio.gather(*(generation.close() for generation in generations))


@dataclass(frozen=True)
class Endpoint:
    """`handle` gets the call and the parsed body, None where `body` is; it may raise ApiError, and is cancelled when
    the client leaves, as is the sending of its response."""

    method: Literal["GET", "POST"]
    path: str
    handle: Callable[[Call, Any], Awaitable[Response]]
    body: type[BaseModel] | None = None

    def route(self, server: Server) -> Route:
        return Route(self.path, _Application(self, server), methods=[self.method])


class _Application:
    """An endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, server: Server) -> None:
        self._endpoint = endpoint
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["meki.route"] = self._endpoint.path
        with contextlib.suppress(ClientGoneError, asyncio.CancelledError):  # the latter: the server is stopped
            data = b""
            try:
                data = await read_body(scope, receive, self._server.settings)
            except ApiError as error:
                await error_response(scope["path"], error)(scope, receive, send)
                return
            await _while_connected(receive, self._answer(data, scope, receive, send))

    async def _answer(self, data: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            try:
                kind = self._endpoint.body
                body = None if kind is None else parse_body(data, kind)
                call = Call(self._server, HttpRequest(scope), stack)
                response = await self._endpoint.handle(call, body)
            except Exception as error:
                response = error_response(scope["path"], as_api_error(error))
            await response(scope, receive, send)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does `work`, which is cancelled when the client leaves: ClientGoneError then."""
    working = asyncio.create_task(work)
    tasks = working, asyncio.create_task(_leaving(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if working.cancelled():
        raise ClientGoneError
    working.result()


async def _leaving(receive: Receive) -> None:
    """Returns when the client has left. The body has been read: nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
