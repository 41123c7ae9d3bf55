"""An answer as a message of OpenAI's API."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ..messages import check_messages, function_of
from .calls import CallForm
from .events import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart
from .forms import AnswerForm
from .parser import AnswerParser


def answer_message(text: str, form: AnswerForm) -> dict[str, Any]:
    """The message that an answer's text is: {"role": "assistant", "content": str}, with "reasoning_content" if the
    model thought, and "tool_calls" if it called tools; "content" is None beside calls alone."""
    parser = AnswerParser(form)
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    events: list[AnswerEvent] = [*parser.push(text), *parser.finish()]
    for event in events:
        match event:
            case Content():
                content.append(event.text)
            case Reasoning():
                reasoning.append(event.text)
            case ToolCallStart():
                function = {"name": event.name, "arguments": ""}
                calls.append({"id": new_call_id(), "type": "function", "function": function})
            case ToolCallArguments():
                calls[event.index]["function"]["arguments"] += event.text
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else "".join(content)}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def with_calls_as_text(messages: Sequence[Mapping[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """Messages for a template that knows no tool calls, as SmolLM3's: calls become content, as the model writes them.
    ValueError for what are no messages."""
    checked = check_messages(messages)
    for message in checked:
        if calls := message.pop("tool_calls", None):
            functions = [function_of(call) for call in calls]
            text = form.write([(function["name"], str(function["arguments"])) for function in functions])
            message["content"] = f"{message['content']}\n{text}".lstrip("\n")
    return checked


def new_call_id() -> str:
    """A random one, of letters and digits behind "call_"."""
    return f"call_{secrets.token_hex(12)}"
