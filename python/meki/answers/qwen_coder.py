"""The form in which Qwen3-Coder calls tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..messages import function_of
from .calls import CallForm, HermesCalls, read_objects
from .json_text import is_json
from .parts import MalformedCallError, Parts, Reading


class QwenCoderCalls(HermesCalls):
    """`<tool_call><function=name><parameter=city>Paris</parameter></function></tool_call>`, or as of Hermes.

    The arguments come out as JSON. Which of them are strings, the text does not say: those whose schema says so, and
    what is no JSON.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        functions = map(function_of, tools)
        self._schemas = {function["name"]: function.get("parameters") or {} for function in functions}

    @staticmethod
    def is_in(template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def opens(self, *, fresh: bool) -> tuple[str, ...]:
        return (self.opener, "<function=")  # the model forgets the first at times

    def of_tools(self, tools: Sequence[Mapping[str, Any]]) -> CallForm:
        return QwenCoderCalls(tools)

    def read(self, parts: Parts, opener: str) -> Reading[None]:
        if opener == self.opener:
            char = yield from parts.read_behind_spaces()
            if char in ("{", "["):
                yield from read_objects(parts, char, self.closer)
                return
            if char != "<":
                raise MalformedCallError
            yield from parts.read_text("function=")
        name = yield from _read_until(parts, ">")
        if not name:
            raise MalformedCallError
        parts.call(name)
        opening = "{"
        while (yield from _read_tag(parts)) == "parameter=":
            key = yield from _read_until(parts, ">")
            value = yield from _read_until(parts, "</parameter>")
            value = self._json(name, key, value.removeprefix("\n").removesuffix("\n"))
            parts.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {value}")
            opening = ", "
        parts.arguments("{}" if opening == "{" else "}")
        char = yield from parts.read_behind_spaces()
        if char:
            if char != "<":
                raise MalformedCallError
            yield from parts.read_text(self.closer[1:])

    def _json(self, function: str, key: str, value: str) -> str:
        schema: Any = self._schemas.get(function)
        for step in ("properties", key):  # a caller may have sent anything for a schema
            schema = schema.get(step) if isinstance(schema, Mapping) else None
        is_text = isinstance(schema, Mapping) and schema.get("type") == "string"
        return value if not is_text and is_json(value) else json.dumps(value, ensure_ascii=False)


def _read_tag(parts: Parts) -> Reading[str]:
    """`parameter=` or `/function>`, behind spaces and a "<"."""
    if (yield from parts.read_behind_spaces()) != "<":
        raise MalformedCallError
    char = yield from parts.read()
    tag = "parameter=" if char == "p" else "/function>"
    if char != tag[0]:
        raise MalformedCallError
    yield from parts.read_text(tag[1:])
    return tag


def _read_until(parts: Parts, ending: str) -> Reading[str]:
    text: list[str] = []
    while "".join(text[-len(ending) :]) != ending:
        if not (char := (yield from parts.read())):
            raise MalformedCallError
        text.append(char)
    return "".join(text[: -len(ending)])
