"""From messages and tools in the forms of OpenAI's API to those that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from reprlib import repr as shown  # of a message that may be a book
from typing import Any


class Arguments(dict[str, Any]):
    """Arguments of a tool call. Most templates write such an object as JSON themselves; some join it to a text, as
    OpenAI's API has it as one."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __radd__(self, text: str) -> str:
        return text + str(self)


def check_messages(messages: Sequence[Mapping[str, Any]], no_content: str | None = "") -> list[dict[str, Any]]:
    """A copy of the messages in the form that templates take; ValueError, naming the message, for other forms.

    A content of several text parts is their texts, with line breaks between them. Arguments of tool calls are
    `Arguments`, also where they are JSON text. no_content: of a message that has tool calls alone. Empty lists of tool
    calls are left out.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            'messages must be a list of at least one message, as [{"role": "user", "content": "Hello"}], '
            f"got {shown(messages)}"
        )
    return [_message(f"messages[{index}]", message, no_content) for index, message in enumerate(messages)]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A copy of the JSON schemas, None if there are none; TypeError for anything else, ValueError for a function that
    has no name, or parameters that are no schema."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of JSON schemas, got {shown(tools)}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            form = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            raise TypeError(f"tools[{index}] is {shown(tool)}, expected a JSON schema, as {form}")
    checked: list[dict[str, Any]] = plain("tools", [dict(tool) for tool in tools])
    for index, tool in enumerate(checked):
        _check_function(f"tools[{index}]", tool)
    return checked or None


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool is {"type": "function", "function": {...}}, or the function alone."""
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def _check_function(where: str, tool: Mapping[str, Any]) -> None:
    if not isinstance(function := function_of(tool), Mapping):
        raise ValueError(f'{where}["function"] is {shown(function)}, expected a JSON schema with a name')
    if "function" in tool:
        where += '["function"]'
    if not isinstance(name := function.get("name"), str) or not name:
        raise ValueError(f'{where}["name"] is {_got(function, "name")}, expected the name of a function')
    if not isinstance(function.get("parameters") or {}, Mapping):
        got = _got(function, "parameters")
        raise ValueError(f'{where}["parameters"] is {got}, expected the JSON schema of an object')


def plain(name: str, value: Any) -> Any:
    """A copy of what JSON can hold: templates are strangers' programs, no object of the caller's is in their reach.
    TypeError naming it for what JSON cannot."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} must be what JSON can hold: {error}") from error


def _message(where: str, message: Mapping[str, Any], no_content: str | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{where} is {shown(message)}, expected a message, as {{"role": "user", "content": "Hello"}}')
    if not isinstance(message.get("role"), str):
        raise ValueError(f'{where}["role"] is {_got(message, "role")}, expected a str')
    checked = dict(message)
    if calls := checked.pop("tool_calls", None):
        checked["tool_calls"] = _tool_calls(f'{where}["tool_calls"]', calls)
    content = checked.get("content")
    if isinstance(content, list | tuple):
        content = "\n".join(_part(f'{where}["content"][{index}]', part) for index, part in enumerate(content))
    elif content is None and calls:
        content = no_content
    elif not isinstance(content, str):
        raise ValueError(f'{where}["content"] is {_got(checked, "content")}, expected a str or a list of text parts')
    return {**checked, "content": content}


def _part(where: str, part: object) -> str:
    """The text of one part of a content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
    if not isinstance(text, str):
        got = shown(part) if kind in (None, "text") else f"of type {kind!r}"
        raise ValueError(f'{where} is {got}; the model takes text alone, as {{"type": "text", "text": "Hello"}}')
    return text


def _tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where} is {shown(calls)}, expected a list of tool calls")
    return [_tool_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _tool_call(where: str, call: object) -> dict[str, Any]:
    """{"type": "function", "function": {...}}, or the function alone."""
    if isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _function(f'{where}["function"]', function)}
    if isinstance(call, Mapping):
        return _function(where, call)
    form = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
    raise ValueError(f"{where} is {shown(call)}, expected a tool call, as {form}")


def _function(where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(function.get("name"), str):
        raise ValueError(f'{where}["name"] is {_got(function, "name")}, expected a str')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        got = _got(function, "arguments")
        raise ValueError(f'{where}["arguments"] is {got}, expected an object, or the JSON text of one')
    return {**function, "arguments": Arguments(arguments)}


def _got(values: Mapping[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "missing"
