"""OpenAI's /v1/models."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from .endpoint import Call, Endpoint
from .state import Model, Server


async def all_models(call: Call, _: None) -> Response:
    """The models that there are."""
    server = call.server
    return JSONResponse({"object": "list", "data": [_described(server, model) for model in server.models]})


async def one_model(call: Call, _: None) -> Response:
    """One of them."""
    server = call.server
    return JSONResponse(_described(server, server.model(call.http.path_params["model"])))


def _described(server: Server, model: Model) -> dict[str, Any]:
    """OpenAI's members, and what else a client may want to know."""
    return {
        "id": model.name,
        "object": "model",
        "created": server.started,
        "owned_by": "meki",
        "context": model.context,
        "can_chat": model.engine.can_chat,
        "random_weights": model.engine.random_weights,
    }


ENDPOINTS = [Endpoint("GET", "/v1/models", all_models), Endpoint("GET", "/v1/models/{model:path}", one_model)]
