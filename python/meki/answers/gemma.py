"""The form in which Gemma 4 calls tools, and its way to write their arguments."""

from __future__ import annotations

import json
from collections.abc import Callable

from .calls import CallForm
from .json_text import is_json, read_string
from .parts import MalformedCallError, Parts, Reading

_QUOTE = '<|"|>'


class GemmaCalls(CallForm):
    """`<|tool_call>call:name{city:<|"|>Paris<|"|>,days:2}<tool_call|>`. The arguments come out as JSON, and may be."""

    opener = "<|tool_call>"
    closer = "<tool_call|>"
    marks = (_QUOTE,)

    @staticmethod
    def is_in(template: str) -> bool:
        return GemmaCalls.opener in template

    def read(self, parts: Parts, opener: str) -> Reading[None]:
        char = yield from parts.read_behind_spaces()
        name = ""
        while char and char != "{":
            name += char
            char = yield from parts.read()
        if not char or not name.startswith("call:") or any(letter.isspace() for letter in name):
            raise MalformedCallError
        parts.call(name.removeprefix("call:"))
        yield from _read_object(parts)
        char = yield from parts.read_behind_spaces()
        if char:
            if char != self.closer[0]:
                raise MalformedCallError
            yield from parts.read_text(self.closer[1:])

    def around_arguments(self, name: str) -> tuple[str, str]:
        return f"{self.opener}call:{name}", self.closer


def _read_object(parts: Parts) -> Reading[None]:
    """The rest of an object: keys are bare, or quoted like strings."""
    parts.arguments("{")
    char = yield from parts.read_behind_spaces()
    while char and char != "}":
        if char in ("<", '"'):
            key = yield from _read_key(parts, char)
            char = yield from parts.read_behind_spaces()
        else:
            bare = ""
            while char and char not in ":,{}":
                bare += char
                char = yield from parts.read()
            if not (key := bare.strip()):
                raise MalformedCallError
        if char != ":":
            raise MalformedCallError
        parts.arguments(_json(key) + ": ")
        char = yield from _read_value(parts, (yield from parts.read_behind_spaces()))
        if char == ",":
            parts.arguments(", ")
            char = yield from parts.read_behind_spaces()
        elif char != "}":
            raise MalformedCallError
    if not char:
        raise MalformedCallError
    parts.arguments("}")


def _read_array(parts: Parts) -> Reading[None]:
    parts.arguments("[")
    char = yield from parts.read_behind_spaces()
    while char and char != "]":
        char = yield from _read_value(parts, char)
        if char == ",":
            parts.arguments(", ")
            char = yield from parts.read_behind_spaces()
        elif char != "]":
            raise MalformedCallError
    if not char:
        raise MalformedCallError
    parts.arguments("]")


def _read_value(parts: Parts, char: str) -> Reading[str]:
    """The value that begins with `char`; returns what comes behind it and is no space."""
    if char == "{":
        yield from _read_object(parts)
    elif char == "[":
        yield from _read_array(parts)
    elif char == '"':
        parts.arguments(_json((yield from read_string(parts))))
    elif char == "<":
        yield from parts.read_text(_QUOTE[1:])
        parts.arguments('"')
        yield from _read_rest_of_string(parts, lambda text: parts.arguments(_json(text)[1:-1]))
        parts.arguments('"')
    else:
        bare = ""
        while char and char not in ",}]":
            bare += char
            char = yield from parts.read()
        if not char or not bare.strip():
            raise MalformedCallError
        parts.arguments(_bare(bare.strip()))
        return char
    return (yield from parts.read_behind_spaces())


def _read_key(parts: Parts, char: str) -> Reading[str]:
    """One in the model's own quotation marks, or in those of JSON."""
    if char == '"':
        return (yield from read_string(parts))
    yield from parts.read_text(_QUOTE[1:])
    text: list[str] = []
    yield from _read_rest_of_string(parts, text.append)
    return "".join(text)


def _read_rest_of_string(parts: Parts, emit: Callable[[str], object]) -> Reading[None]:
    """In the model's own quotation marks, between which nothing is escaped."""
    held = ""
    while held != _QUOTE:
        if not (char := (yield from parts.read())):
            raise MalformedCallError
        held += char
        while not _QUOTE.startswith(held):
            emit(held[0])
            held = held[1:]


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _bare(text: str) -> str:
    """A number or one of JSON's words; the model forgets quotation marks at times."""
    return text if is_json(text) else _PYTHON_WORDS.get(text) or _json(text)


_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}
"""What a template's language writes for JSON's."""
