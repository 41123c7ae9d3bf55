"""The application: all endpoints, behind what guards them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import anthropic, chat_completions, completions, models, page, responses, tokens
from .endpoint import Call, Endpoint
from .errors import ApiError, error_response
from .metrics import RequestCounter
from .openapi import describe
from .security import KeyGuard, PlaceGuard
from .state import Server


async def metrics(call: Call, _: None) -> Response:
    """Numbers of this server in Prometheus's text format."""
    return Response(call.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def description(call: Call, _: None) -> Response:
    """This description."""
    return JSONResponse(describe(ENDPOINTS, [model.name for model in call.server.models]))


ENDPOINTS = [
    *chat_completions.ENDPOINTS,
    *completions.ENDPOINTS,
    *responses.ENDPOINTS,
    *anthropic.ENDPOINTS,
    *models.ENDPOINTS,
    *tokens.ENDPOINTS,
    Endpoint("GET", "/metrics", metrics),
    Endpoint("GET", "/openapi.json", description),
]
"""Of the APIs; those of the page are its own business."""


def make_app(server: Server) -> Starlette:
    """The ASGI application."""
    settings = server.settings
    middleware = [
        Middleware(RequestCounter, metrics=server.metrics),
        Middleware(PlaceGuard, settings=settings),
        Middleware(KeyGuard, settings=settings),
    ]
    if origins := settings.cors_origins:  # before the key: a browser asks first, without one
        middleware.insert(
            2, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        )
    return Starlette(
        routes=[endpoint.route(server) for endpoint in (*ENDPOINTS, *page.ENDPOINTS)],
        middleware=middleware,
        exception_handlers={HTTPException: _no_route},
    )


async def _no_route(request: Request, error: Exception) -> Response:
    """Of a path or a method that there is none of."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:100]}"
    headers = {**(error.headers or {}), "Connection": "close"}  # the body is not read
    return error_response(request.url.path, ApiError(error.status_code, message, headers=headers))
