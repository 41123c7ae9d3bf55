"""The forms in which models call tools."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .json_text import read_nested, read_string, read_value
from .parts import MalformedCallError, Parts, Reading

_ARGUMENTS = ("arguments", "parameters")


class CallForm(ABC):
    """How the models of a family write calls. Immutable and thread-safe."""

    opener: ClassVar[str]
    """What a call, or several, begin with."""
    closer: ClassVar[str] = ""
    """What they end with."""
    marks: ClassVar[tuple[str, ...]] = ()
    """What else of a call may be a special token of a tokenizer."""

    between: ClassVar[str] = ""
    """What stands between two calls."""
    around: ClassVar[tuple[str, str]] = ("", "")
    """What stands around all calls."""

    @staticmethod
    @abstractmethod
    def is_in(template: str) -> bool:
        """Whether a chat template has its calls in this form."""

    def opens(self, *, fresh: bool) -> tuple[str, ...]:
        """What begins a call here; fresh: at the beginning of the answer, or behind another part."""
        return (self.opener,)

    @abstractmethod
    def read(self, parts: Parts, opener: str) -> Reading[None]:
        """Reads what follows an opener; MalformedCallError where it is no call, or no longer."""

    @abstractmethod
    def around_arguments(self, name: str) -> tuple[str, str]:
        """What stands around the arguments, a JSON object, in a call of this function."""

    def of_tools(self, tools: Sequence[Mapping[str, Any]]) -> CallForm:
        """The same for calls of these."""
        return self

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """The text that is these calls: their names and arguments."""
        written = [arguments.join(self.around_arguments(name)) for name, arguments in calls]
        return self.between.join(written).join(self.around)


class HermesCalls(CallForm):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen, SmolLM3."""

    opener = "<tool_call>"
    closer = "</tool_call>"
    between = "\n"

    @staticmethod
    def is_in(template: str) -> bool:
        return HermesCalls.opener in template

    def read(self, parts: Parts, opener: str) -> Reading[None]:
        yield from read_objects(parts, "", self.closer)

    def around_arguments(self, name: str) -> tuple[str, str]:
        return f'{self.opener}\n{{"name": {json.dumps(name)}, "arguments": ', f"}}\n{self.closer}"


class LlamaCalls(CallForm):
    """`{"name": ..., "parameters": {...}}` as the whole answer, several with `;` between them: Llama 3."""

    opener = "<|python_tag|>"
    between = "; "

    @staticmethod
    def is_in(template: str) -> bool:
        return '{"name":' in template and '"parameters":' in template

    def opens(self, *, fresh: bool) -> tuple[str, ...]:
        return (self.opener, "{") if fresh else (self.opener,)

    def read(self, parts: Parts, opener: str) -> Reading[None]:
        yield from read_objects(parts, opener if opener == "{" else "", "")

    def around_arguments(self, name: str) -> tuple[str, str]:
        return f'{{"name": {json.dumps(name)}, "parameters": ', "}"


class MistralCalls(CallForm):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or as of `NewMistralCalls`."""

    opener = "[TOOL_CALLS]"
    arguments = "[ARGS]"
    marks = (arguments, "[CALL_ID]")
    between = ", "
    around = ("[TOOL_CALLS][", "]")

    @staticmethod
    def is_in(template: str) -> bool:
        return MistralCalls.opener in template

    def read(self, parts: Parts, opener: str) -> Reading[None]:
        char = yield from parts.read_behind_spaces()
        if char in ("[", "{"):
            yield from read_objects(parts, char, "")
            return
        name = ""
        while char not in ("[", "{"):
            if not char or char.isspace():
                raise MalformedCallError
            name += char
            char = yield from parts.read()
        if char == "[":  # the arguments' mark, or before it that of an identifier
            behind = ""
            while not behind.endswith(self.arguments[1:]):
                if not (char := (yield from parts.read())):
                    raise MalformedCallError
                behind += char
            char = yield from parts.read_behind_spaces()
        if not name or char != "{":
            raise MalformedCallError
        parts.call(name)
        yield from read_nested(parts, char, parts.arguments)

    def around_arguments(self, name: str) -> tuple[str, str]:
        return f'{{"name": {json.dumps(name)}, "arguments": ', "}"


class NewMistralCalls(MistralCalls):
    """`[TOOL_CALLS]name[ARGS]{...}`."""

    between = ""
    around = ("", "")

    @staticmethod
    def is_in(template: str) -> bool:
        return MistralCalls.is_in(template) and MistralCalls.arguments in template

    def around_arguments(self, name: str) -> tuple[str, str]:
        return f"{self.opener}{name}{self.arguments}", ""


def read_objects(parts: Parts, first: str, closer: str) -> Reading[None]:
    """Calls that are JSON objects, one or several. first: a bracket that was read before. closer: comes behind them;
    empty: nothing does."""
    before = parts.index
    while True:
        char = first or (yield from parts.read_behind_spaces("[],;"))
        first = ""
        if char == "{":
            # Without a marker, an object that has no arguments may be an answer like any other.
            yield from _read_object(parts, needs_arguments=not closer)
        elif char == "[":
            pass
        elif char and closer.startswith(char):
            yield from parts.read_text(closer[1:])
            break
        elif char or parts.index == before:
            raise MalformedCallError
        else:
            return
    if parts.index == before:
        raise MalformedCallError


def _read_object(parts: Parts, *, needs_arguments: bool) -> Reading[None]:
    """The rest of one call. Its arguments come out as they are read, if the name is known by then."""
    name: str | None = None
    arguments = ""
    begun = False
    char = yield from parts.read_behind_spaces()
    while char == '"':
        key = yield from read_string(parts)
        if (yield from parts.read_behind_spaces()) != ":":
            raise MalformedCallError
        char = yield from parts.read_behind_spaces()
        is_arguments = key in _ARGUMENTS and not (arguments or begun)
        if key == "name" and char == '"' and name is None:
            name = yield from read_string(parts)
            char = yield from parts.read_behind_spaces()
        elif is_arguments and char == "{" and name is not None:
            begun = True
            parts.call(name)
            yield from read_nested(parts, char, parts.arguments)
            char = yield from parts.read_behind_spaces()
        elif is_arguments and char == "{":
            waiting: list[str] = []
            yield from read_nested(parts, char, waiting.append)
            arguments = "".join(waiting)
            char = yield from parts.read_behind_spaces()
        elif is_arguments and char == '"':  # as OpenAI's API has them
            arguments = yield from read_string(parts)
            if not arguments.startswith("{"):
                raise MalformedCallError
            char = yield from parts.read_behind_spaces()
        else:
            char = yield from read_value(parts, char)
        if char != ",":
            break
        char = yield from parts.read_behind_spaces()
    if char != "}" or name is None or (needs_arguments and not (arguments or begun)):
        raise MalformedCallError
    if not begun:
        parts.call(name)
        parts.arguments(arguments or "{}")
    parts.mark()
