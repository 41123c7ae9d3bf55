"""Every answer makes a well-formed stream of /v1/responses, which adds up to the response."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from meki.answers import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart
from meki.server.errors import ApiError
from meki.server.responses import ResponsesBody
from meki.server.responses_stream import ResponseWriter
from meki.server.responses_tools import Functions

from .answers import a_result, answers, runs, write

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
BODY = ResponsesBody.model_validate({"model": "m", "input": "x"})
HEAD = {"model": "m", **BODY.echo({"temperature": 1.0, "top_p": 1.0})}


def read(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a stream tells of, from its deltas alone; what else it says has to agree."""
    output: list[dict[str, Any]] = []
    texts: list[str] = []
    is_open = part_open = False
    for number, event in enumerate(events):
        EVENT.validate_python(event)
        kind = event["type"]
        assert event["sequence_number"] == number
        if kind in ("response.created", "response.in_progress"):
            assert number == ["response.created", "response.in_progress"].index(kind)
            continue
        if number == len(events) - 1:
            assert kind == f"response.{event['response']['status']}" and not is_open
            assert event["response"]["output"] == output
            break
        if kind == "response.output_item.added":
            assert not is_open and event["output_index"] == len(output) and event["item"]["status"] == "in_progress"
            output.append(event["item"])
            texts.append("")
            is_open, part_open = True, False
            continue
        item = output[-1]
        assert is_open and event["output_index"] == len(output) - 1
        assert event.get("item_id", item["id"]) == item["id"] and event.get("content_index", 0) == 0
        if kind == "response.content_part.added":
            part_open = True
        elif kind.endswith(".delta"):
            assert part_open or item["type"] == "function_call"
            texts[-1] += event["delta"]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == texts[-1]
        elif kind.endswith("_text.done"):
            assert event["text"] == texts[-1]
        elif kind == "response.content_part.done":
            assert event["part"]["text"] == texts[-1]
        else:
            assert kind == "response.output_item.done"
            done = event["item"]
            assert (done["id"], done["type"]) == (item["id"], item["type"])
            assert done["arguments" if "arguments" in done else "content"] in (
                texts[-1],
                [{**done.get("content", [{}])[0], "text": texts[-1]}],
            )
            output[-1] = done
            is_open = False
    return output


def shown(item: dict[str, Any]) -> tuple[str, str]:
    if item["type"] == "function_call":
        return f"call {item['name']}", item["arguments"]
    return "content" if item["type"] == "message" else "reasoning", item["content"][0]["text"]


@given(parts=answers(), reason=st.sampled_from(("eos", "stop", "length", "context")))
def test_any_answer(parts: list[AnswerEvent], reason: str) -> None:
    writer = ResponseWriter(HEAD, Functions([]))
    events = write(writer, parts, a_result(reason))
    output = read(events)
    expected = runs(parts)
    if all(kind == "reasoning" for kind, _ in expected):
        expected.append(("content", ""))  # there is an answer, if an empty one
    assert [shown(item) for item in output] == expected
    assert len({item["id"] for item in output}) == len(output)
    assert json.loads(json.dumps(writer.answer)) == events[-1]["response"]
    Response.model_validate(writer.answer)
    complete = reason in ("eos", "stop")
    assert writer.answer["status"] == ("completed" if complete else "incomplete")
    assert [item["status"] for item in output[:-1]] == ["completed"] * (len(output) - 1) or not complete
    assert output[-1]["status"] == writer.answer["status"]
    assert writer.answer["incomplete_details"] == (None if complete else {"reason": "max_output_tokens"})
    assert writer.answer["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 17,
    }


def test_the_order_of_events() -> None:
    parts = [Reasoning("Hm."), Content("It "), Content("is"), ToolCallStart(0, "look"), ToolCallArguments(0, "{}")]
    kinds = [
        event["type"].removeprefix("response.")
        for event in write(ResponseWriter(HEAD, Functions([])), parts, a_result("eos"))
    ]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]


@pytest.mark.parametrize(("status", "code"), [(500, "server_error"), (400, "invalid_prompt")])
def test_an_error_in_the_middle(status: int, code: str) -> None:
    writer = ResponseWriter(HEAD, Functions([]))
    before = [*writer.begin(), *writer.push(Content("It"))]
    event = writer.fail(ApiError(status, "it broke"))
    EVENT.validate_python(event)
    assert event["type"] == "response.failed" and event["sequence_number"] == len(before)
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": code, "message": "it broke"}
