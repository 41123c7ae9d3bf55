"""Who may call. Middleware around all endpoints."""

from __future__ import annotations

import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, error_response
from .settings import Settings

PUBLIC = re.compile(r"/|/health|/page/.*")
"""Paths that need no key: the page itself asks for one."""


class Guarded:
    """Answers with an error where `check` raises one."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                error.headers["Connection"] = "close"  # the body is not read
                await error_response(scope["path"], error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, path: str, headers: Headers) -> None:
        raise NotImplementedError


class PlaceGuard(Guarded):
    """Keeps strangers' web pages out. A page whose name was made to lead to this machine calls it by that name; any
    other page says where it is from."""

    def check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _host_name(host)
        known = ("localhost", self._settings.host.lower(), *(name.lower() for name in self._settings.allowed_hosts))
        if not _is_address(name) and name not in known:
            message = f"this server is not called {name[:100]!r}; start it with --allowed-host if it should be"
            raise ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        own = (f"http://{host}", f"https://{host}")  # the latter behind a proxy
        if origin is not None and origin not in (*own, *self._settings.cors_origins):
            message = f"pages of {origin[:100]!r} may not use this server; start it with --cors-origin if they should"
            raise ApiError(403, message, code="origin_not_allowed")


class KeyGuard(Guarded):
    """Wants the API key, if there is one."""

    def check(self, path: str, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None or PUBLIC.fullmatch(path):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip(" \t") if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Header values are bytes, which Starlette shows as Latin-1.
        if not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            what = "the API key is wrong" if given else "an API key is needed"
            message = f"{what}; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _host_name(host: str) -> str:
    """Of a Host header, the name without the port, in small letters; an IPv6 address without its brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
