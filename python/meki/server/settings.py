"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Of who may call, and of how much."""

    host: str = "127.0.0.1"
    """The address or name that the server listens on."""
    api_key: str | None = None
    """What callers show; None: nothing."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request may call this server by, besides `host`, localhost and any IP address."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as "https://example.org", whose pages may use the server in a browser."""
    body_bytes: int = 4 << 20
    """Of a request, at most."""
    choices: int = 16
    """Generations that one request may ask for: prompts times `n`."""
    connections: int = 512
    """At once; more are answered with 503."""
    receive_s: float = 30.0
    """Seconds that a client may take for the head of a request, and again for its body."""
    send_s: float = 60.0
    """Seconds that a client may read nothing of an answer before it counts as gone."""
    ping_s: float = 15.0
    """Seconds that a stream of events may be silent, while a prompt is computed or waits, before the client is told
    that something will come."""
    stop_s: int = 30
    """Seconds that running requests may take to end when the server is stopped."""
