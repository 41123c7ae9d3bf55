"""What the command lines of this package have in common."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

from meki.cli.errors import report

from .config import ConfigError, check, frozen


class UsageError(ValueError):
    """The command line asks for what cannot be."""


@contextlib.contextmanager
def reported_warnings(program: str) -> Iterator[None]:
    """Shows a warning to the user as `program` shows an error."""
    with warnings.catch_warnings(action="always", category=UserWarning):
        warnings.showwarning = lambda message, *_: report(program, "warning", message)
        yield


def setting(text: str) -> tuple[str, Any]:
    """FIELD=VALUE: a setting and a JSON value."""
    from .architectures import SETTINGS

    name, equals, value = text.partition("=")
    if name not in SETTINGS or not equals:
        raise UsageError(
            f"argument --set: expected FIELD=VALUE with a FIELD out of {', '.join(SETTINGS)}; got {text!r}"
        )
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    parsed = frozen(parsed)
    try:
        check(SETTINGS, {name: parsed})
    except ConfigError as error:
        raise UsageError(f"argument --set: {error}") from error
    return name, parsed
