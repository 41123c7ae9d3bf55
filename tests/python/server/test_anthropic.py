"""Anthropic's /v1/messages: what a request becomes, and its client on a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from meki import AsyncEngine, Engine
from meki.server.anthropic import MessagesBody
from meki.server.anthropic_stream import SIGNATURE
from meki.server.settings import Settings
from meki.server.state import Model, Server

from .running import Running, Serve, running
from .test_tools import PLACES
from .test_tools import TOOLS as FUNCTIONS

HELLO = {"role": "user", "content": "How is the weather?"}
ASKED: dict[str, Any] = {"model": "meki-tiny", "messages": [HELLO], "max_tokens": 12}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
"""The newest client leaves it out; its users and older ones do not."""
TOOLS: list[Any] = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"].get("description", "The time."),
        "input_schema": tool["function"]["parameters"],
        "cache_control": {"type": "ephemeral"},
    }
    for tool in FUNCTIONS
]
CALLED: dict[str, Any] = {
    **ASKED,
    "max_tokens": 80,
    "tools": TOOLS,
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
}


def make_client(served: Running, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**{"base_url": served.url, "api_key": "none", "max_retries": 0, **options})


@pytest.fixture
def client(served: Running) -> Iterator[anthropic.Anthropic]:
    with make_client(served) as made:
        yield made


def conversation(**body: Any) -> list[dict[str, Any]]:
    return MessagesBody.model_validate({"model": "m", "max_tokens": 1, **body}).conversation()


def test_messages_of_texts() -> None:
    assert conversation(messages=[HELLO], system="Be short.") == [{"role": "system", "content": "Be short."}, HELLO]
    blocks = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("Be", "short.")]
    assert conversation(messages=[HELLO, HELLO], system=blocks) == [
        {"role": "system", "content": "Be\nshort."},
        {"role": "user", "content": f"{HELLO['content']}\n{HELLO['content']}"},
    ]


def test_messages_of_blocks() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Rome"}},
                {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Sunny."}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "It stands.", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_3"},
                {"type": "text", "text": "So?"},
            ],
        },
        {"role": "system", "content": "Be short."},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Well."}]},
    ]
    calls = [("toolu_1", "weather", {"place": "Rome"}), ("toolu_2", "clock", {})]
    assert conversation(messages=messages) == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call_id, name, arguments in calls
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "weather", "content": "Sunny."},
        {"role": "tool", "tool_call_id": "toolu_2", "name": "clock", "content": "Error: It stands."},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "So?"},
        {"role": "system", "content": "Be short."},
        {"role": "assistant", "content": "", "reasoning_content": "Well."},
    ]


def test_a_message(served: Running, client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASKED, **GREEDY, system="Be short.", metadata={"user_id": "me"})
    expected = served.openai.chat.completions.create(
        model="meki-tiny",
        messages=[{"role": "system", "content": "Be short."}, HELLO],  # type: ignore[list-item]
        temperature=0,
        max_tokens=12,
    )
    (block,) = message.content
    assert block.type == "text" and block.text == expected.choices[0].message.content
    assert (message.stop_reason, message.stop_sequence, message.model) == ("max_tokens", None, "meki-tiny")
    assert expected.usage is not None and message.usage.output_tokens == 12
    cached = message.usage.cache_read_input_tokens or 0
    assert message.usage.input_tokens + cached == expected.usage.prompt_tokens


def test_what_was_computed_before_is_cached(serve: Serve) -> None:
    with serve(parallel=1) as served, make_client(served) as client:
        first, second = (client.messages.create(**ASKED).usage for _ in range(2))
    assert (first.cache_read_input_tokens, second.input_tokens) == (0, 1)
    assert second.cache_read_input_tokens == first.input_tokens - 1


def test_piece_by_piece(served: Running, client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED, **GREEDY)
    with client.messages.stream(**ASKED, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [{**whole.content[0].to_dict(), "text": text}]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens

    async def ask() -> None:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0) as client:
            assert (await client.messages.create(**ASKED, **GREEDY)).content == whole.content
            async with client.messages.stream(**ASKED, **GREEDY) as stream:
                assert (await stream.get_final_message()).content[0].to_dict() == final.content[0].to_dict()
            count = await client.messages.count_tokens(model="meki-tiny", messages=[HELLO])  # type: ignore[list-item]
            assert count.input_tokens > 1

    asyncio.run(ask())


def test_a_stop_sequence(client: anthropic.Anthropic) -> None:
    (block,) = client.messages.create(**ASKED, **GREEDY).content
    assert block.type == "text"
    stop = block.text[3:6]
    message = client.messages.create(**ASKED, **GREEDY, stop_sequences=["never", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].to_dict()["text"] == block.text[: block.text.index(stop)]


def test_an_answer_that_is_begun(client: anthropic.Anthropic) -> None:
    (whole,) = client.messages.create(**ASKED, **GREEDY).content
    assert whole.type == "text"
    begun = {"role": "assistant", "content": " "}
    count = [
        client.messages.count_tokens(model="meki-tiny", messages=messages).input_tokens  # type: ignore[arg-type]
        for messages in ([HELLO], [HELLO, {**begun, "content": "It is not"}])
    ]
    assert count[1] > count[0]
    message = client.messages.create(**{**ASKED, "messages": [HELLO, {**begun, "content": "It is not"}]}, **GREEDY)
    assert message.content[0].type == "text" and message.usage.output_tokens == 12


def test_a_call_and_its_result(served: Running, client: anthropic.Anthropic) -> None:
    message = client.messages.create(**CALLED, **GREEDY)
    (call,) = message.content
    assert call.type == "tool_use" and call.name == "weather" and call.id.startswith("toolu_")
    assert call.input["place"] in PLACES and message.stop_reason == "tool_use"
    with client.messages.stream(**CALLED, **GREEDY) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input == json.loads("".join(pieces))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    turns = [HELLO, message.to_param(), {"role": "user", "content": [result]}]
    answer = client.messages.create(**{**CALLED, "messages": turns, "tool_choice": {"type": "none"}, "max_tokens": 4})
    assert [block.type for block in answer.content] == ["text"]


def test_one_call_if_one_is_wanted(client: anthropic.Anthropic) -> None:
    most = 0
    for _ in range(6):  # with some seeds the model writes several
        choice = {"type": "any", "disable_parallel_tool_use": True}
        message = client.messages.create(**{**CALLED, "tool_choice": choice, "max_tokens": 120})
        most = max(most, sum(block.type == "tool_use" for block in message.content))
    assert most == 1


def test_text_of_a_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(**{**ASKED, "max_tokens": 60}, **GREEDY, output_config=form)
    assert message.stop_reason == "end_turn" and message.content[0].type == "text"
    assert isinstance(json.loads(message.content[0].text)["sunny"], bool)


def test_tokens_are_counted_as_the_model_gets_them(client: anthropic.Anthropic) -> None:
    counted: dict[str, Any] = {"model": "meki-tiny", "messages": [HELLO], "system": "Be short.", "tools": TOOLS}
    with_tools = client.messages.count_tokens(**counted, tool_choice={"type": "any"}).input_tokens
    usage = client.messages.create(**counted, max_tokens=1).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == with_tools
    assert client.messages.count_tokens(**counted, tool_choice={"type": "none"}).input_tokens < with_tools
    long = {"role": "user", "content": "long " * 600}
    assert client.messages.count_tokens(model="meki-tiny", messages=[long]).input_tokens > 512  # type: ignore[list-item]


@pytest.mark.parametrize("streamed", [False, True])
def test_thoughts(tmp_path: Path, streamed: bool) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
        "assistant: {% if enable_thinking %}<think>\n{% endif %}"
    )
    engine = Engine("meki-tiny", threads=1, chat_template=template)
    runner = AsyncEngine(engine, parallel=1, context=engine.context)
    with (
        running(Server([Model("meki-tiny", runner, engine.context)], Settings())) as served,
        make_client(served) as client,
    ):
        for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}):
            if streamed:
                with client.messages.stream(**ASKED, thinking=thinking) as stream:  # type: ignore[arg-type]
                    message = stream.get_final_message()
            else:
                message = client.messages.create(**ASKED, thinking=thinking)  # type: ignore[arg-type]
            (block,) = message.content
            details = message.usage.output_tokens_details
            assert details is not None
            if thinking["type"] == "disabled":
                assert block.type == "text" and details.thinking_tokens == 0
            else:
                assert block.type == "thinking" and block.thinking and block.signature == SIGNATURE
                assert 0 < details.thinking_tokens <= 12


def test_what_agents_send(served: Running) -> None:
    """Members and headers that mean something to Anthropic's servers alone."""
    text = {"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        **ASKED,
        "system": [text, text],
        "tools": [{**TOOLS[0], "type": "custom", "strict": True, "defer_loading": False}],
        "metadata": {"user_id": "me"},
        "thinking": {"type": "adaptive", "display": "summarized"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "service_tier": "auto",
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.9,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "context-management-2025-06-27"}
    for stream in (False, True):
        answer = served.post("/v1/messages?beta=true", {**body, "stream": stream}, **headers)
        assert answer.status_code == 200, answer.text
    with make_client(served) as client:
        beta = client.beta.messages.create(**ASKED, betas=["context-management-2025-06-27"])
        assert beta.content[0].type == "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"king": 1}, "king: Extra inputs are not permitted"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "king": 1}]}]},
            "messages.0.content.0.king: Extra inputs are not permitted",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text alone"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": []}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, "the type custom"),
        ({"tool_choice": {"type": "tool", "name": "clock"}}, "needs a tool"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"container": "abc"}, "runs no code"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop string"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, "prompt is too long"),
    ],
)
def test_errors(served: Running, change: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        answer = served.post("/v1/messages", {**ASKED, **change, "stream": stream})
        assert answer.status_code == 400
        body = answer.json()
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
        assert message in body["error"]["message"]


def test_errors_of_other_kinds(serve: Serve) -> None:
    with serve(api_key="secret", body_bytes=1000) as served:
        for key in ("api_key", "auth_token"):
            with make_client(served, **{"api_key": None, key: "secret"}) as client:
                assert client.messages.create(**ASKED).role == "assistant"
                with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
                    client.messages.create(**{**ASKED, "model": "claude"})
                with pytest.raises(anthropic.APIStatusError, match="request_too_large"):
                    client.messages.create(**ASKED, system="long " * 600)
        with make_client(served) as client, pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            client.messages.create(**ASKED)


def test_a_client_that_leaves_ends_the_generation(served: Running, client: anthropic.Anthropic) -> None:
    asked = {**ASKED, "max_tokens": 400}
    with client.messages.create(**asked, stream=True) as stream:
        next(iter(stream))
    served.wait_until_idle()

    async def give_up() -> None:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none") as client:
            task = asyncio.create_task(client.messages.create(**asked))
            while not served.runner.running:
                await asyncio.sleep(0.001)
            task.cancel()

    asyncio.run(give_up())
    served.wait_until_idle()
