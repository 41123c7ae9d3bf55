"""The description of all endpoints, for programs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from .endpoint import Endpoint

_REFERENCE = "#/components/schemas/{model}"


def describe(endpoints: Sequence[Endpoint], models: Sequence[str]) -> dict[str, Any]:
    """An OpenAPI 3.1 document. models: the names that `model` may have."""
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    references, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
    for body in bodies:
        properties = schemas["$defs"][references[body, "validation"]["$ref"].rpartition("/")[2]]["properties"]
        if "model" in properties:
            properties["model"]["enum"] = list(models)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        summary = inspect.getdoc(endpoint.handle) or ""
        operation: dict[str, Any] = {"summary": summary.split("\n\n")[0].replace("\n", " "), "responses": _RESPONSES}
        if names := re.findall(r"{(\w+)", endpoint.path):
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"enum": list(models)}} for name in names
            ]
        if endpoint.body is not None:
            content = {"application/json": {"schema": references[endpoint.body, "validation"]}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(re.sub(r":\w+}", "}", endpoint.path), {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "meki-serve", "version": version("meki")},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_RESPONSES = {
    "200": {"description": "The answer; a stream of server-sent events, where that was asked for"},
    "4XX": {"description": "What is wrong with the request, in the form of its API"},
}
