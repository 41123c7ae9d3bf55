"""OpenAI's /v1/responses: what a request becomes, and its client on a real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText
from pydantic import BaseModel

from meki import AsyncEngine, Engine
from meki.server.responses import ResponsesBody
from meki.server.responses_tools import Functions, FunctionTool
from meki.server.settings import Settings
from meki.server.state import Model, Server

from .running import Running, Serve, running
from .test_tools import PLACES, TOOLS

ASKED: dict[str, Any] = {"model": "meki-tiny", "input": "How is the weather?", "temperature": 0}
FUNCTIONS: list[Any] = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
CALLED: dict[str, Any] = {
    **ASKED,
    "tools": FUNCTIONS,
    "tool_choice": {"type": "function", "name": "weather"},
    "max_output_tokens": 80,
}


def messages(**body: Any) -> list[dict[str, Any]]:
    return ResponsesBody.model_validate({"model": "m", **body}).messages()


def test_messages_of_a_text() -> None:
    assert messages(input="Hello") == [{"role": "user", "content": "Hello"}]
    assert messages(input="Hello", instructions="Be short.") == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
    ]


def test_messages_of_items() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Weather"}, {"type": "input_text", "text": "now?"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "weather",
            "arguments": '{"place": "Rome"}',
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "Sunny."},
        {"type": "function_call", "call_id": "call_2", "name": "clock", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "Noon."}]},
        {"type": "reasoning", "summary": [], "encrypted_content": None},
    ]

    def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert messages(input=items, instructions="Be short.") == [
        {"role": "system", "content": "Be short.\nBe kind."},
        {"role": "user", "content": "Hello.\nWeather\nnow?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [call("call_1", "weather", '{"place": "Rome"}')],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "Sunny."},
        {"role": "assistant", "content": None, "tool_calls": [call("call_2", "clock", "{}")]},
        {"role": "tool", "tool_call_id": "call_2", "name": "clock", "content": "Noon."},
    ]


def test_a_response(served: Running) -> None:
    response = served.openai.responses.create(
        **ASKED, instructions="Be short.", max_output_tokens=8, metadata={"a": "b"}, user="me"
    )
    expected = served.openai.chat.completions.create(
        model="meki-tiny",
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": ASKED["input"]}],
        temperature=0,
        max_tokens=8,
    )
    assert response.output_text == expected.choices[0].message.content
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None and expected.usage is not None
    assert response.usage.input_tokens == expected.usage.prompt_tokens
    assert response.usage.output_tokens == 8 and response.usage.total_tokens == response.usage.input_tokens + 8
    assert (response.metadata, response.user, response.instructions) == ({"a": "b"}, "me", "Be short.")
    assert (response.temperature, response.max_output_tokens, response.tool_choice) == (0, 8, "auto")
    assert response.to_dict()["store"] is False


def test_what_was_computed_before_is_cached(serve: Serve) -> None:
    with serve(parallel=1) as served:
        first, second = (served.openai.responses.create(**ASKED, max_output_tokens=4).usage for _ in range(2))
    assert first is not None and second is not None
    assert first.input_tokens_details.cached_tokens == 0
    assert second.input_tokens_details.cached_tokens == second.input_tokens - 1


def test_piece_by_piece(served: Running) -> None:
    whole = served.openai.responses.create(**ASKED, max_output_tokens=12)
    with served.openai.responses.stream(**ASKED, max_output_tokens=12) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            text = ""
            async for event in await client.responses.create(**ASKED, max_output_tokens=12, stream=True):
                text += event.delta if event.type == "response.output_text.delta" else ""
            assert (await client.responses.create(**ASKED, max_output_tokens=12)).output_text == text
            return text

    assert asyncio.run(ask()) == whole.output_text


def test_logprobs(served: Running) -> None:
    asked: dict[str, Any] = {**ASKED, "max_output_tokens": 12, "include": ["message.output_text.logprobs"]}
    chat = served.openai.chat.completions.create(
        model="meki-tiny",
        messages=[{"role": "user", "content": ASKED["input"]}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].logprobs is not None
    expected = [token.to_dict() for token in chat.choices[0].logprobs.content or []]

    def of(response: Response) -> list[dict[str, Any]]:
        (message,) = response.output
        assert isinstance(message, ResponseOutputMessage) and isinstance(message.content[0], ResponseOutputText)
        return [token.to_dict() for token in message.content[0].logprobs or []]

    whole = served.openai.responses.create(**asked, top_logprobs=2)
    assert of(whole) == expected and whole.to_dict()["top_logprobs"] == 2
    with served.openai.responses.stream(**asked, top_logprobs=2) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete" and of(events[-1].response) == expected
    pieces = [event.logprobs for event in events if event.type == "response.output_text.delta"]
    assert [token.to_dict() for piece in pieces for token in piece] == expected
    assert [token["top_logprobs"] for token in of(served.openai.responses.create(**asked))] == [[]] * 12
    assert of(served.openai.responses.create(**{**asked, "include": []})) == []


def test_a_call_and_its_result(served: Running) -> None:
    response = served.openai.responses.create(**CALLED)
    (call,) = response.output
    assert call.type == "function_call" and call.name == "weather" and call.call_id.startswith("call_")
    assert json.loads(call.arguments)["place"] in PLACES
    assert response.status == call.status == "completed"
    assert response.to_dict()["tools"][0]["parameters"] == FUNCTIONS[0]["parameters"]
    with served.openai.responses.stream(**CALLED) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call" and "".join(deltas) == streamed.arguments == call.arguments
    items = [
        {"role": "user", "content": ASKED["input"]},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
    ]
    answer = served.openai.responses.create(
        **{**CALLED, "input": items, "tool_choice": "none", "max_output_tokens": 4}  # type: ignore[arg-type]
    )
    assert [item.type for item in answer.output] == ["message"]


def test_functions_of_a_namespace(served: Running) -> None:
    """Beside what agents offer unasked, and a server without the internet does not have."""
    tools: list[Any] = [
        {"type": "namespace", "name": "sky", "description": "Of the sky.", "tools": FUNCTIONS[:1]},
        {"type": "web_search", "external_web_access": False},
    ]
    asked = {**CALLED, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    response = served.openai.responses.create(**asked, extra_body={"client_metadata": {"a": "b"}})
    (call,) = response.output
    assert call.type == "function_call" and (call.namespace, call.name) == ("sky", "weather")
    (echoed,) = response.to_dict()["tools"]
    assert (echoed["type"], echoed["tools"][0]["parameters"]) == ("namespace", FUNCTIONS[0]["parameters"])
    for event in served.openai.responses.create(**asked, stream=True):
        if event.type == "response.output_item.done":
            assert isinstance(event.item, ResponseFunctionToolCall)
            assert (event.item.namespace, event.item.name) == ("sky", "weather")
    body = ResponsesBody.model_validate(
        {
            **asked,
            "input": [
                {"role": "user", "content": "Hello"},
                call.to_dict(),
                {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
            ],
        }
    )
    (described,) = body.functions.described()
    assert described["function"]["name"] == "sky.weather"
    assert described["function"]["description"] == f"Of the sky.\n{FUNCTIONS[0]['description']}"
    _, called, result = body.messages()
    assert called["tool_calls"][0]["function"]["name"] == result["name"] == "sky.weather"
    # As the only one of its name it needs no other.
    named = served.openai.responses.create(**{**asked, "tool_choice": CALLED["tool_choice"]}).output[0]
    assert named.type == "function_call" and (named.namespace, named.name) == ("sky", "weather")
    both = Functions([*body.functions.usable, FunctionTool(type="function", name="weather")])
    assert both.called("weather") == {"name": "weather"} and both.called("sky.weather") == body.functions.called(
        "weather"
    )
    refused = served.post("/v1/responses", {**asked, "tools": tools[1:]})
    assert refused.status_code == 400 and "needs a tool" in refused.json()["error"]["message"]


def test_one_call_if_one_is_wanted(served: Running) -> None:
    most = 0
    for _ in range(6):  # with some seeds the model writes several
        asked = {**CALLED, "tool_choice": "required", "temperature": 1, "max_output_tokens": 120}
        answer = served.openai.responses.create(**asked, parallel_tool_calls=False)
        calls = [item for item in answer.output if item.type == "function_call"]
        most = max(most, len(calls))
    assert most == 1 and answer.parallel_tool_calls is False


class Weather(BaseModel):
    sunny: bool


def test_text_of_a_schema(served: Running) -> None:
    parsed = served.openai.responses.parse(**ASKED, text_format=Weather, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Weather) and parsed.status == "completed"
    answer = served.openai.responses.create(**ASKED, text={"format": {"type": "json_object"}}, max_output_tokens=200)
    assert answer.status == "incomplete" or isinstance(json.loads(answer.output_text), dict)


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts(tmp_path: Path, streamed: bool) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
        "assistant: {% if enable_thinking %}<think>\n{% endif %}"
    )
    engine = Engine("meki-tiny", threads=1, chat_template=template)
    runner = AsyncEngine(engine, parallel=1, context=engine.context)
    with running(Server([Model("meki-tiny", runner, engine.context)], Settings())) as served:
        for effort in ("low", "none", None):
            asked = {**ASKED, "max_output_tokens": 8, "reasoning": {"effort": effort}}
            if streamed:
                with served.openai.responses.stream(**asked) as stream:
                    last = list(stream)[-1]
                    assert last.type == "response.incomplete"
                    response = last.response
            else:
                response = served.openai.responses.create(**asked)
            kinds = [item.type for item in response.output]
            assert response.usage is not None
            tokens = response.usage.output_tokens_details.reasoning_tokens
            if effort == "low":
                assert kinds == ["reasoning", "message"] and response.output_text == ""
                assert 0 < tokens <= 8
            else:
                assert kinds == ["message"] and tokens == 0


@pytest.mark.parametrize(
    ("change", "code", "param", "message"),
    [
        ({"model": "other"}, "model_not_found", "model", "does not exist"),
        ({"previous_response_id": "resp_1"}, "invalid_value", "previous_response_id", "keeps no responses"),
        ({"conversation": "conv_1"}, "invalid_value", "conversation", "keeps no responses"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "invalid_value", "input[0]", "keeps no items"),
        ({"input": []}, "invalid_value", "input", "at least 1 item"),
        ({"input": None}, "invalid_type", "input", "valid"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "invalid_value",
            "input[0].content[0]",
            "text alone",
        ),
        ({"input": [{"role": "user", "content": "x", "king": 1}]}, "unknown_parameter", "input[0].king", ""),
        ({"input": [{"role": "king", "content": "x"}]}, "invalid_value", "input[0].role", "'user'"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "invalid_value", "tools[0]", "give functions"),
        ({"tool_choice": "required"}, "invalid_value", None, "needs a tool"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens", ""),
        ({"truncation": "auto"}, "invalid_value", "truncation", "'disabled'"),
        ({"background": True}, "invalid_value", "background", ""),
        ({"include": ["everything"]}, "invalid_value", "include[0]", ""),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs", "include message.output_text.logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "invalid_value", "top_logprobs", "20"),
        ({"king": 1}, "unknown_parameter", "king", ""),
        ({"input": "long " * 600}, "context_length_exceeded", "input", "512"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format", ""),
    ],
)
def test_errors(served: Running, change: dict[str, Any], code: str, param: str | None, message: str) -> None:
    for stream in (False, True):
        answer = served.post("/v1/responses", {**ASKED, **change, "stream": stream})
        assert answer.status_code == (404 if code == "model_not_found" else 400)
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
        assert message in error["message"]


def test_a_client_that_leaves_ends_the_generation(served: Running) -> None:
    with served.openai.responses.create(**ASKED, stream=True) as stream:
        next(iter(stream))
    served.wait_until_idle()
