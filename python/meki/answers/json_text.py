"""JSON, character by character."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NoReturn

from .parts import MalformedCallError, Parts, Reading

_CLOSERS = {"{": "}", "[": "]"}


def is_json(text: str) -> bool:
    """Whether it is one value, in JSON's own words: Python knows NaN and Infinity, too."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def read_string(parts: Parts) -> Reading[str]:
    """The string whose quotation mark was read."""
    text: list[str] = ['"']
    yield from _read_rest_of_string(parts, text.append)
    try:
        return str(json.loads("".join(text), strict=False))
    except ValueError as error:
        raise MalformedCallError from error


def read_nested(parts: Parts, opener: str, emit: Callable[[str], object]) -> Reading[None]:
    """The object or array whose first bracket was read: all of its text, that bracket too, is emitted as it is read.
    Only brackets and strings are looked at: the rest cannot tell where it ends."""
    emit(opener)
    closers = [_CLOSERS[opener]]
    while closers:
        char = yield from parts.read()
        if char in _CLOSERS:
            closers.append(_CLOSERS[char])
        elif not char or (char in "}]" and char != closers.pop()):
            raise MalformedCallError
        emit(char)
        if char == '"':
            yield from _read_rest_of_string(parts, emit)


def read_value(parts: Parts, first: str) -> Reading[str]:
    """Passes over a value of an object, `first` its first character; returns the next one behind it that is no
    space."""
    if first == '"':
        yield from _read_rest_of_string(parts, _ignore)
    elif first in _CLOSERS:
        yield from read_nested(parts, first, _ignore)
    else:
        char = first
        while char and char not in ",}" and not char.isspace():
            char = yield from parts.read()
        if not char.isspace():
            return char
    return (yield from parts.read_behind_spaces())


def _read_rest_of_string(parts: Parts, emit: Callable[[str], object]) -> Reading[None]:
    escaped = False
    while True:
        char = yield from parts.read()
        if not char:
            raise MalformedCallError
        emit(char)
        if char == '"' and not escaped:
            return
        escaped = char == "\\" and not escaped


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _ignore(_text: str) -> None:
    pass
