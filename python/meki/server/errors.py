"""What a caller is told when something is wrong, in the form of the API that was called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse

from ..engine import Engine
from ..scheduler import QueueFullError

RETRY_AFTER_S = 1
_log = logging.getLogger(__name__)


class ApiError(Exception):
    """Ends a request with a status and a message. code, param: of OpenAI's form, such as "model_not_found" and the
    name of the parameter that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """An error as JSON. path: of the request, which tells the API."""
    if path.startswith("/v1/messages"):
        return anthropic_error(error)
    kind = _OPENAI.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """In Anthropic's form and, for what is wrong with the members of a body, its words."""
    kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = error.message
    if error.param and error.code in _ANTHROPIC_WORDS:
        place = error.param.replace("[", ".").replace("]", "")
        message = f"{place}: {_ANTHROPIC_WORDS[error.code]}"
    elif error.code == "context_length_exceeded":  # by these words programs know that they have to shorten it
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(path: str, error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(path, error), error.status, error.headers)


def as_api_error(error: Exception) -> ApiError:
    """The error itself, or, of one that is none of the caller's, what he may know of it; the log has the rest."""
    if isinstance(error, ApiError):
        return error
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="server_error")


@contextlib.contextmanager
def engine_errors(engine: Engine) -> Iterator[None]:
    """What an engine refuses becomes an ApiError; what fails stays as it is."""
    try:
        yield
    except QueueFullError as error:
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        raise ApiError(429, str(error), code="rate_limit_exceeded", headers=headers) from error
    except ImportError as error:
        raise ApiError(501, str(error), code="not_installed") from error
    except (ValueError, TypeError, RecursionError) as error:
        # The file system of the server is no business of the caller's.
        message = str(error).replace(str(engine.path), engine.name)
        raise ApiError(400, message, code="invalid_value") from error


_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_WORDS = {
    "unknown_parameter": "Extra inputs are not permitted",
    "missing_required_parameter": "Field required",
}
