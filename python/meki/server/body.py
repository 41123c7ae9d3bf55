"""The body of a request: read within limits, parsed, checked."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from starlette.types import Receive, Scope

from .errors import ApiError
from .settings import Settings


class Body(BaseModel):
    """What a caller sends. A member that is not declared is an error, and so is a text where a number belongs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def of_type(*known: str, default: str | None = None, why: str) -> BeforeValidator:
    """Refuses an object whose "type" is not known, and says why, before its members are looked at. default: the type of
    an object that has none."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get("type")
        if kind is None and default is not None:
            return {**value, "type": default}
        if kind not in known:
            raise ValueError(f"the type {str(kind)[:100]!r} cannot be used here: {why}")
        return value

    return BeforeValidator(check)


def absent(why: str) -> BeforeValidator:
    """Of a member that may be there, but only as null."""

    def check(value: Any) -> None:
        if value is not None:
            raise ValueError(why)

    return BeforeValidator(check)


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
        value = json.loads(data.decode(), parse_constant=_no_constant)  # of bytes it would take surrogates, too
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
    """Of several errors, the first that concerns an unknown member, or else the one deepest inside: where there are
    several kinds of value, that is of the kind that was meant."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    wrong = next((wrong for wrong in errors if wrong["type"] == "extra_forbidden"), None)
    wrong = wrong or max(errors, key=lambda wrong: (len(wrong["loc"]), not wrong["type"].endswith("_type")))
    kind, param = wrong["type"], _param(wrong, value)
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    message = wrong["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param}': {message}." if param else f"{message}.", code=code, param=param or None)


def _param(wrong: ErrorDetails, value: Any) -> str:
    """The place of an error as `messages[0].content`. What pydantic puts between, the kinds that a value might have, is
    left out; a kind may be called as a member is."""
    text, place = "", wrong["loc"]
    for step, following in zip(place, (*place, None)[1:], strict=True):
        if isinstance(step, int):
            if isinstance(value, list) and step < len(value):
                text, value = f"{text}[{step}]", value[step]
        elif isinstance(value, dict):
            is_kind = not isinstance(value.get(step), dict | list) and following in value
            if (step in value and not is_kind) or (wrong["type"] == "missing" and following is None):
                text, value = f"{text}.{step}" if text else step, value.get(step)
    return text[:200]
