"""A server for tests of the page: the page's own endpoints, and models that say what a test tells them to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from meki.server import page
from meki.server.state import Server

Part = dict[str, Any] | str | float | None
"""Of a scripted answer: a delta, a text of one, seconds to wait, or None: the connection breaks."""
STATS = {"decode_tokens_per_s": 31.25, "time_to_first_token_s": 0.12, "stall_us_p50": 4.2, "stall_us_p99": 61.0}


class StandIn:
    """`answer` gives the parts of the next answers; `refusal` is an error in their place."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.answer: Callable[[dict[str, Any]], Sequence[Part]] = lambda body: ["An answer."]
        self.refusal: Response | None = None
        self.key: str | None = None
        self.models = [{"id": "tale", "random_weights": False, "can_chat": True, "context": 4096}]
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.left = threading.Event()  # the reader of an answer has gone

    def app(self) -> Starlette:
        server = Server([])
        routes = [endpoint.route(server) for endpoint in page.ENDPOINTS]
        routes += [Route("/v1/models", self._models), Route("/v1/chat/completions", self._chat, methods=["POST"])]
        app = Starlette(routes=routes)

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.paths.append(scope["path"])
            await app(scope, receive, send)

        return noting  # type: ignore[return-value]

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"data": self.models})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        return (
            self._refused(request)
            or self.refusal
            or StreamingResponse(self._events(body), media_type="text/event-stream")
        )

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "an API key is needed"}}, status_code=401)

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        finish, words = "stop", 0
        try:
            for part in self.answer(body):
                if part is None:
                    raise ConnectionError
                if isinstance(part, float):
                    await asyncio.sleep(part)
                elif isinstance(part, dict) and "error" in part:
                    yield event(part)
                    return
                elif isinstance(part, dict) and "finish" in part:
                    finish = part["finish"]
                else:
                    words += 1
                    yield chunk({"content": part} if isinstance(part, str) else part, None)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        yield chunk({}, finish)
        details = {"cached_tokens": 12}
        usage = {"prompt_tokens": 40, "completion_tokens": words, "prompt_tokens_details": details}
        yield event({"choices": [], "usage": usage, "meki": [STATS]})
        yield "data: [DONE]\n\n"


def chunk(delta: dict[str, Any], finish: str | None) -> str:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})


def event(data: Any) -> str:
    return f"data: {json.dumps(data)}\n\n"


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Runs an ASGI application, or a uvicorn server that is made, on a free port; its URL."""
    server = (
        app
        if isinstance(app, uvicorn.Server)
        else uvicorn.Server(
            uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        )
    )
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
