"""A server that runs on a thread, and what asks it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai

from meki import AsyncEngine
from meki.server.run import HttpServer, listen
from meki.server.state import Server


def wait_for(condition: Callable[[], object]) -> None:
    """Fails where it does not come true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Running:
    """A server that runs on a thread of its own."""

    def __init__(self, server: Server, port: int, http: HttpServer) -> None:
        self._http_server = http
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.http)

    @property
    def runner(self) -> AsyncEngine:
        return self.server.models[0].runner

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=data, headers={"content-type": "application/json", **headers})

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def wait_until_idle(self) -> None:
        """Fails where a generation goes on that nobody waits for."""
        wait_for(lambda: not (self.runner.running or self.runner.waiting))

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._http_server.server_state.connections)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Running]:
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        # Inherited by every connection: a client who reads nothing is noticed soon.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        runs = HttpServer(server)
        thread = threading.Thread(target=runs.run, args=([listener],))
        thread.start()
        served = Running(server, listener.getsockname()[1], runs)
        try:
            with served.http:
                yield served
        finally:
            runs.should_exit = True
            thread.join()


Serve = Callable[..., contextlib.AbstractContextManager[Running]]
"""The fixture `serve`."""
