"""Tool calls and thoughts of chat completions."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from .running import Running

PLACES = ["Paris", "Rome"]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": PLACES}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
    },
]
ASKED: dict[str, Any] = {
    "model": "meki-tiny",
    "messages": [{"role": "user", "content": "How is the weather?"}],
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "max_tokens": 80,
    "temperature": 0,
}


def test_a_call(served: Running) -> None:
    choice = served.openai.chat.completions.create(**ASKED).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather" and call.id.startswith("call_")
    assert json.loads(call.function.arguments)["place"] in PLACES


def test_a_call_piece_by_piece(served: Running) -> None:
    whole = served.openai.chat.completions.create(**ASKED).choices[0].message.tool_calls
    with served.openai.chat.completions.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.finish_reason == "tool_calls"
    assert whole is not None and final.message.tool_calls is not None
    assert [call.function.arguments for call in final.message.tool_calls] == [whole[0].function.arguments]
    assert final.message.tool_calls[0].id.startswith("call_")


def test_at_most_one_call(served: Running) -> None:
    """However many the model writes: with one of these seeds it writes several."""
    most = 0
    for seed in range(4):
        asked = {**ASKED, "tool_choice": "required", "temperature": 1, "seed": seed, "max_tokens": 120}
        for one in (False, True):
            answer = served.openai.chat.completions.create(**asked, parallel_tool_calls=not one).choices[0]
            calls = answer.message.tool_calls or []
            indexes = {
                call.index
                for chunk in served.openai.chat.completions.create(**asked, parallel_tool_calls=not one, stream=True)
                for call in chunk.choices[0].delta.tool_calls or []
            }
            assert len(indexes) == len(calls)
            assert not one or len(calls) <= 1
            most = max(most, len(calls))
    assert most > 1


def test_a_schema_beside_tools(served: Running) -> None:
    """The model calls a tool, or what it says is of the schema: with these seeds either happens."""
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    kinds = set()
    for seed in range(8):
        sampled = {**ASKED, "tool_choice": "auto", "temperature": 2, "seed": seed, "max_tokens": 200}
        choice = served.openai.chat.completions.create(**sampled, response_format=format).choices[0]
        if choice.finish_reason == "length":  # the context is small
            continue
        message = choice.message
        if message.content is not None:
            assert type(json.loads(message.content)["warm"]) is bool
        else:
            assert message.tool_calls
        kinds.add(message.content is None)
    assert len(kinds) == 2
    called = served.openai.chat.completions.create(**ASKED, response_format=format).choices[0]
    assert called.finish_reason == "tool_calls"


def test_the_result_of_a_call_goes_back(served: Running) -> None:
    first = served.openai.chat.completions.create(**ASKED).choices[0].message
    assert first.tool_calls is not None
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny."}
    messages = [*ASKED["messages"], first.model_dump(exclude_none=True), result]
    answer = served.openai.chat.completions.create(**{**ASKED, "messages": messages, "tool_choice": "none"})
    assert answer.choices[0].message.tool_calls is None
    again = served.openai.chat.completions.create(**{**ASKED, "messages": [*ASKED["messages"], first, result]})
    assert again.usage is not None and again.usage.prompt_tokens > 20


@pytest.mark.parametrize(
    "change",
    [
        {"tool_choice": {"type": "function", "function": {"name": "stock"}}},
        {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": "y"}}]},
        {"tools": [], "tool_choice": "required"},
    ],
)
def test_tools_that_cannot_be(served: Running, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        served.openai.chat.completions.create(**{**ASKED, **change})
