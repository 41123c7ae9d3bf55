"""The body of a request: read within limits, parsed, checked."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.types import Receive, Scope

from .errors import ApiError
from .settings import Settings


class Body(BaseModel):
    """What a caller sends. A member that is not declared is an error, and so is a text where a number belongs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


B = TypeVar("B", bound=BaseModel)


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """ApiError for a body that is too large or takes too long."""
    close = {"Connection": "close"}  # the rest of the body is not read

    def check(size: int) -> None:
        if size > settings.body_bytes:
            message = f"the request has more than {settings.body_bytes} bytes; send less"
            raise ApiError(413, message, code="request_too_large", headers=close)

    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            check(int(value[:20]))
    data = bytearray()
    try:
        async with asyncio.timeout(settings.receive_s):
            more = True
            while more:
                part = await receive()
                if part["type"] == "http.disconnect":
                    raise ClientGoneError
                data += part.get("body", b"")
                check(len(data))
                more = part.get("more_body", False)
    except TimeoutError as error:
        message = f"the body did not arrive within {settings.receive_s:g} seconds"
        raise ApiError(408, message, code="request_timeout", headers=close) from error
    return bytes(data)


def parse_body(data: bytes, kind: type[B]) -> B:
    """ApiError for what is no JSON or not of this kind."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
        if b"\\ud" in data.lower():  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {what}", code="invalid_json") from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error, value) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refusal(error: ValidationError, value: Any) -> ApiError:
    """Of several errors, the first that concerns an unknown member, or else the first."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    wrong = next((wrong for wrong in errors if wrong["type"] == "extra_forbidden"), errors[0])
    kind, param = wrong["type"], _param(wrong["loc"], value)
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    message = wrong["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param}': {message}." if param else f"{message}.", code=code, param=param or None)


def _param(place: tuple[str | int, ...], value: Any) -> str:
    """A place as `messages[0].content`; what pydantic puts between, the kinds that a value might have, left out."""
    text = ""
    for at, step in enumerate(place):
        if isinstance(step, int):
            if isinstance(value, list) and step < len(value):
                text, value = f"{text}[{step}]", value[step]
        elif isinstance(value, dict) and (step in value or at == len(place) - 1):
            text, value = f"{text}.{step}" if text else step, value.get(step)
    return text[:200]
