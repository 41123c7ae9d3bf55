"""What the command lines of this package have in common."""

from __future__ import annotations

import json
from typing import Any

from .config import ConfigError, check


class UsageError(ValueError):
    """The command line asks for what cannot be."""


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
    parsed = tuple(parsed) if isinstance(parsed, list) else parsed
    try:
        check(SETTINGS, {name: parsed})
    except ConfigError as error:
        raise UsageError(f"argument --set: {error}") from error
    return name, parsed
