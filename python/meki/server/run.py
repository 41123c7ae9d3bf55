"""Listening, serving and stopping."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading

import uvicorn

from .app import make_app
from .connection import connection_class
from .state import Server


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: a free one. OSError naming both if there cannot be one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # The protocol is named because asyncio sends small answers at once (TCP_NODELAY) only where it is TCP's.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        remedy = "choose another with --host and --port"
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}; {remedy}") from error
    return listener


class HttpServer(uvicorn.Server):
    """Serves until a signal comes, or `should_exit` is set. What runs then may end within the settings' `stop_s`, or
    until a second signal; the models' generations end with the server."""

    def __init__(self, server: Server) -> None:
        settings = server.settings
        config = uvicorn.Config(
            make_app(server),
            loop="asyncio",
            http=connection_class(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=settings.connections,
            timeout_graceful_shutdown=settings.stop_s,
        )
        super().__init__(config)
        self._models = server

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """KeyboardInterrupt after Ctrl-C, as of any command; SIGTERM is the usual way to stop a server, and just ends
        it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn handles it, and sends it on when it has ended
        try:
            super().run(sockets)
        finally:
            asyncio.run(self._models.close())
