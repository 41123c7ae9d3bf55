"""Every answer makes a well-formed stream of /v1/messages, which adds up to the message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from meki.answers import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart
from meki.server.anthropic_stream import SIGNATURE, MessageWriter
from meki.server.errors import ApiError

from .answers import a_result, answers, runs, write

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


def read(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The kinds of blocks that a stream tells of, and their texts."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    blocks: list[tuple[str, str]] = []
    is_open = signed = False
    for event in (events[0], *events[-2:]):
        EVENT.validate_python(event)
    for event in events[2:-2]:
        EVENT.validate_python(event)
        if event["type"] == "content_block_start":
            block = event["content_block"]
            assert not is_open and event["index"] == len(blocks)
            assert not any(block.get(name) for name in ("text", "thinking", "input", "signature"))
            names = {"text": "content", "thinking": "reasoning", "tool_use": f"call {block.get('name')}"}
            blocks.append((names[block["type"]], ""))
            is_open, signed = True, False
            continue
        assert is_open and event["index"] == len(blocks) - 1
        kind, text = blocks[-1]
        if event["type"] == "content_block_stop":
            assert signed == (kind == "reasoning")
            is_open = False
        elif event["delta"]["type"] == "signature_delta":
            signed = True
        else:
            assert not signed
            blocks[-1] = kind, text + event["delta"][DELTAS[event["delta"]["type"]]]
    assert not is_open
    return blocks


def shown(block: dict[str, Any]) -> tuple[str, Any]:
    if block["type"] == "tool_use":
        return f"call {block['name']}", block["input"]
    return ("content", block["text"]) if block["type"] == "text" else ("reasoning", block["thinking"])


@given(parts=answers(), reason=st.sampled_from(("eos", "stop", "length", "context")))
def test_any_answer(parts: list[AnswerEvent], reason: str) -> None:
    writer = MessageWriter("m", 10)
    events = write(writer, parts, a_result(reason))
    expected = runs(parts)
    assert read(events) == expected
    message = json.loads(json.dumps(writer.answer))
    Message.model_validate(message)
    assert len(message["content"]) == len(expected)
    for block, (kind, text) in zip(message["content"], expected, strict=True):
        try:
            value = json.loads(text) if kind.startswith("call ") else text
        except ValueError:  # broken off: as far as it goes
            assert block["type"] == "tool_use" and isinstance(block["input"], dict)
        else:
            assert shown(block) == (kind, value)
    delta = events[-2]
    assert {**events[0]["message"], **delta["delta"], "usage": delta["usage"], "content": message["content"]} == message
    called = any(kind.startswith("call ") for kind, _ in expected)
    ended = "tool_use" if called else "end_turn"
    reasons = {"length": "max_tokens", "context": "model_context_window_exceeded"}
    assert message["stop_reason"] == reasons.get(reason, ended) and message["stop_sequence"] is None
    assert message["usage"] == {
        "input_tokens": 6,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 3},
    }
    assert events[0]["message"]["usage"]["input_tokens"] == 10


def test_a_stop_sequence_is_named() -> None:
    writer = MessageWriter("m", 10)
    write(writer, [Content("It is")], a_result("stop", "."))
    assert (writer.answer["stop_reason"], writer.answer["stop_sequence"]) == ("stop_sequence", ".")


def test_the_order_of_events() -> None:
    parts = [Reasoning("Hm."), Content("It"), ToolCallStart(0, "look"), ToolCallArguments(0, '{"a": 1}')]
    writer = MessageWriter("m", 10)
    events = write(writer, parts, a_result("eos"))
    assert [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"] == [
        *("thinking_delta", "signature_delta", "text_delta", "input_json_delta")
    ]
    assert writer.answer["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE}
    assert writer.answer["content"][2]["input"] == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"a": 1, "b": "Par', {"a": 1, "b": "Par"}),
        ('{"a', {}),
        ("", {}),
        ("[1]", {}),
        ("no JSON", {}),
        # What Python reads, and JSON has not.
        ('{"a": NaN}', {}),
        ('{"a": 1e999}', {}),
        ('{"a": "\\ud800"}', {}),
    ],
)
def test_arguments_that_break_off(arguments: str, value: dict[str, Any]) -> None:
    writer = MessageWriter("m", 10)
    write(writer, [ToolCallStart(0, "look"), ToolCallArguments(0, arguments)], a_result("length"))
    assert writer.answer["content"][0]["input"] == value
    assert writer.answer["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors(status: int, kind: str) -> None:
    event = MessageWriter("m", 1).fail(ApiError(status, "it broke"))
    assert event == {"type": "error", "error": {"type": kind, "message": "it broke"}}
