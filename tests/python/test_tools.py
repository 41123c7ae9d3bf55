"""Tools and thoughts in chats: on meki-tiny, which knows stories alone, so that `tool_choice` does all the work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import jsonschema
import pytest
from tokenizers import Tokenizer

from meki import AsyncEngine, Engine, GenerationResult, _core
from meki.answers import AnswerForm, AnswerParser, Content, ToolCallArguments, ToolCallStart, find_form
from meki.generation import TextStream
from meki.options import check_options
from meki.requests import Request
from meki.text import Vocabulary

from .tokenizers_of_kinds import KINDS

TURNS = """\
{% for tool in tools or [] %}{{ tool | tojson }} {% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content or "" }}
{%- for call in message.tool_calls %}CALL{% endfor %}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}assistant: BEGIN{% endif %}
"""
CALLS = {
    "hermes": '<tool_call>\\n{"name": ',
    "llama": '{"name": ..., "parameters": ...}',
    "mistral": "[TOOL_CALLS] [",
    "new mistral": "[TOOL_CALLS]name[ARGS]",
    "gemma": "<|tool_call>call:",
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "$defs": {"city": {"enum": ["Paris", 'San "J"', "{"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "we"}},
]
SCHEMAS = {"weather": {**WEATHER, "additionalProperties": False}, "we": {"additionalProperties": False}}
QUESTION = {"role": "user", "content": "Once upon a time"}


def template(form: str, begin: str = "") -> str:
    return TURNS.replace("CALL", CALLS[form]).replace("BEGIN", begin)


@pytest.fixture(scope="module")
def engine_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Engine]:
    """An engine with a chat template of this text."""

    def make(text: str) -> Engine:
        path = tmp_path_factory.mktemp("template") / "chat_template.jinja"
        path.write_text(text)
        return Engine("meki-tiny", threads=1, chat_template=path)

    return make


@pytest.mark.parametrize("form", CALLS)
def test_a_call_that_is_required_has_arguments_of_the_schema(engine_with: Callable[[str], Engine], form: str) -> None:
    engine = engine_with(template(form))
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 2.0, "seed": seed, "max_new_tokens": 0}
        result = engine.chat([QUESTION], tools=TOOLS, tool_choice="required", **options)
        assert result.message is not None
        calls = result.message["tool_calls"]
        if result.finish_reason == "context":  # within a call; the model knows no end
            result.message["tool_calls"] = calls = calls[:-1]
        else:
            assert (result.finish_reason, result.message["content"]) == ("eos", None)
        assert calls
        for call in calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
        # The message goes on with the conversation.
        messages = [QUESTION, result.message, {"role": "tool", "content": "rain"}]
        assert engine.chat(messages, tools=TOOLS, max_new_tokens=1).message is not None


WRITTEN = {
    "hermes": ('<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>", "\n"),
    "llama": ('{"name": "%s", "parameters": ', "}", "; "),
    "new mistral": ("[TOOL_CALLS]%s[ARGS]", "", ""),
    "gemma": ("<|tool_call>call:%s", "<tool_call|>", ""),
}


def allows(engine: Engine, request: Request, text: str) -> bool:
    """Whether the whole answer may be this text."""
    constraint = request.constraint
    assert constraint is not None

    def allowed(token_ids: list[int]) -> bool:
        mask = constraint.allowed()
        return any(mask[token_id // 8] >> token_id % 8 & 1 for token_id in token_ids)

    over = False
    for token_id in engine.tokenizer.encode(text).ids:
        if over or not allowed([token_id]):
            return False
        over = constraint.accept(token_id)
    return over or allowed(engine.requests.prompts.end_token_ids)


@pytest.mark.parametrize("form", WRITTEN)
def test_any_of_the_tools_may_be_called(engine_with: Callable[[str], Engine], form: str) -> None:
    """Also one whose name another's begins with, and several; beside a schema, JSON of it may be the answer, too."""
    engine = engine_with(template(form))
    before, after, between = WRITTEN[form]
    weather, we = before % "weather" + '{"city": "{", "days": 3}' + after, before % "we" + "{}" + after
    calls = (we, weather, we + between + weather + between + we)
    said = '{"say": "yes"}'
    schema = {"type": "object", "properties": {"say": {"type": "string"}}, "required": ["say"]}
    marked = [text if form != "llama" else "<|python_tag|>" + text for text in calls]
    for options, right, wrong in (
        ({"tool_choice": "required"}, calls, ("yes", said, weather + "x", before % "w" + "{}" + after)),
        ({"json_schema": schema}, (*marked, said), ("yes", "{}", before % "w" + "{}" + after)),
    ):
        for text in right:
            assert allows(engine, engine.requests.chat([QUESTION], tools=TOOLS, **options), text), text
        for text in wrong:
            assert not allows(engine, engine.requests.chat([QUESTION], tools=TOOLS, **options), text), text


@pytest.mark.parametrize("form", WRITTEN)
def test_one_call_may_be_all_there_may_be(engine_with: Callable[[str], Engine], form: str) -> None:
    engine = engine_with(template(form))
    before, after, between = WRITTEN[form]
    call = before % "we" + "{}" + after
    for options in ({"tool_choice": "required"}, {"json_schema": {"type": "object"}}):
        begin = "<|python_tag|>" if form == "llama" and "json_schema" in options else ""
        for one in (False, True):
            for calls in (call, call + between + call):
                request = engine.requests.chat([QUESTION], tools=TOOLS, parallel_tool_calls=not one, **options)
                assert allows(engine, request, begin + calls) is not (one and calls != call)


def test_a_certain_function_is_called_once(engine_with: Callable[[str], Engine]) -> None:
    engine = engine_with(template("hermes"))
    choice = {"type": "function", "function": {"name": "we"}}
    for tools in (TOOLS, [tool["function"] for tool in TOOLS]):
        result = engine.chat([QUESTION], tools=tools, tool_choice=choice)
        assert result.message is not None
        (call,) = result.message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("we", {})


def test_the_parts_come_as_they_are_written(engine_with: Callable[[str], Engine]) -> None:
    engine = engine_with(template("hermes"))
    options: dict[str, Any] = {"tools": TOOLS[:1], "tool_choice": "required", "seed": 3, "max_new_tokens": 300}

    async def stream() -> tuple[list[Any], GenerationResult]:
        serving = AsyncEngine(engine, parallel=1)
        generation = serving.stream_chat([QUESTION], **options)
        await generation.start()
        assert generation.request is not None and generation.request.answer is not None
        parser = AnswerParser(generation.request.answer)
        events = [event async for piece in generation for event in parser.push(piece)] + parser.finish()
        await serving.close()
        assert generation.result is not None
        return events, generation.result

    events, result = asyncio.run(stream())
    assert result.message == engine.chat([QUESTION], **options).message | {"tool_calls": result.message["tool_calls"]}
    assert events[0] == ToolCallStart(0, "weather")
    arguments = [event.text for event in events if isinstance(event, ToolCallArguments) and event.index == 0]
    assert len(arguments) > 3
    assert "".join(arguments) == result.message["tool_calls"][0]["function"]["arguments"]


def test_thoughts_may_come_before_a_call(engine_with: Callable[[str], Engine]) -> None:
    engine = engine_with("</think>" + template("hermes"))
    begun = engine_with(template("hermes", begin="<think>\n"))
    for seed in range(4):
        options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "temperature": 3.0, "seed": seed}
        for thinking in (engine, begun):
            message = thinking.chat([QUESTION], **options, max_new_tokens=60).message
            assert message is not None
            # In 60 random tokens thoughts need not end. What follows them is a call, or the beginning of one.
            if "tool_calls" not in message and "<tool" not in message["content"]:
                assert thinking is engine or message["reasoning_content"]


def test_an_answer_that_begins_inside_thoughts(engine_with: Callable[[str], Engine]) -> None:
    begin = "<think>\n{{ '' if enable_thinking is not false else '\\n</think>\\n\\n' }}"
    engine = engine_with(template("hermes", begin))
    result = engine.chat([QUESTION], max_new_tokens=5)
    message = {"role": "assistant", "content": "", "reasoning_content": result.text.strip()}
    assert result.message == message
    off: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}, "max_new_tokens": 5}
    result = engine.chat([QUESTION], **off)
    assert result.message == {"role": "assistant", "content": result.text}
    # An answer that is begun goes on where it stands, in thoughts or behind them.
    for begun, thinks in (("<think>\nOnce", True), ("<think>a</think>Once", False), ("Once", False)):
        messages = [QUESTION, {"role": "assistant", "content": begun}]
        request = engine.requests.chat(messages, continue_final_message=True)
        assert request.answer is not None and request.answer.thinks_first is thinks
    # What a schema or a pattern holds is no thought, unless that ends thoughts.
    for held in ({"json_schema": {"enum": ["yes", "no"]}}, {"regex": "yes|no"}):
        result = engine.chat([QUESTION], **held)
        assert result.message == {"role": "assistant", "content": result.text}
    result = engine.chat([QUESTION], regex="(a|b)</think>(yes|no)")
    assert result.message is not None and result.message["reasoning_content"] + "</think>" == result.text[:9]


def test_without_tools_there_are_no_calls(engine_with: Callable[[str], Engine]) -> None:
    engine = engine_with(template("llama"))
    plain = engine.requests.chat([QUESTION])
    for options in ({"tools": []}, {"tools": TOOLS, "tool_choice": "none"}, {"tool_choice": "auto"}):
        request = engine.requests.chat([QUESTION], **options)
        assert (request.token_ids, request.answer) == (plain.token_ids, AnswerForm())
    request = engine.requests.chat([QUESTION], tools=TOOLS)
    assert request.token_ids != plain.token_ids and request.answer == find_form(template("llama"))
    assert engine.generate("Once", max_new_tokens=1).message is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tool_choice": "required"}, "tools: none"),
        ({"tools": TOOLS, "tool_choice": "any"}, 'tool_choice must be "auto", "none", "required" or .*, got \'any\''),
        ({"tools": TOOLS, "tool_choice": {"name": "we"}}, "tool_choice must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "wea"}}}, "tools: weather, we$"),
        ({"tools": TOOLS, "tool_choice": "required", "json_schema": True}, "json_schema and tool_choice exclude"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "tool_choice and ignore_eos exclude"),
        ({"tools": [{"type": "function"}]}, r'tools\[0\]\["name"\] is missing, expected the name of a function'),
        ({"tools": [TOOLS[0], {"function": {"name": 3}}]}, r'tools\[1\]\["function"\]\["name"\] is 3, expected'),
        ({"tools": [{"function": "weather"}]}, r"tools\[0\]\[\"function\"\] is 'weather', expected"),
        ({"tools": [{"name": "we", "parameters": []}], "tool_choice": "none"}, None),
        (
            {"tools": [{"name": "we", "parameters": ["a"]}]},
            r'tools\[0\]\["parameters"\] is \[\'a\'\], expected the JSON',
        ),
        (
            {"tools": [{"name": "we", "parameters": {"type": 3}}], "tool_choice": "required"},
            "tool_choice cannot be used",
        ),
    ],
)
def test_what_cannot_be(engine_with: Callable[[str], Engine], options: dict[str, Any], named: str | None) -> None:
    engine = engine_with(template("hermes"))
    if named is None:
        engine.requests.chat([QUESTION], **options)
        return
    with pytest.raises(ValueError, match=named):
        engine.requests.chat([QUESTION], **options)


def test_a_template_of_another_form(engine_with: Callable[[str], Engine]) -> None:
    """Its calls are text; none can be required."""
    engine = engine_with(TURNS.replace("CALL", "<call>"))
    assert engine.requests.chat([QUESTION], tools=TOOLS).answer == AnswerForm()
    with pytest.raises(ValueError, match="in which form this model calls tools is not known"):
        engine.requests.chat([QUESTION], tools=TOOLS, tool_choice="required")
    engine = engine_with("{% for message in messages %}{{ message.content }}{% endfor %}")
    with pytest.raises(ValueError, match="the chat template knows no tools"):
        engine.requests.chat([QUESTION], tools=TOOLS)


SMOLLM3 = """\
{% if xml_tools %}{% for tool in xml_tools[:] %}{{ tool | string }} {% endfor %}
{{- 'Answer with <tool_call>{"name": name, "arguments": object}</tool_call>.' }}{% endif %}
{%- for message in messages %}{{ message.role + ": " + message.content }}{{ eos_token }}{% endfor %}
"""


def test_a_template_with_tools_of_another_name_and_no_calls(engine_with: Callable[[str], Engine]) -> None:
    engine = engine_with(SMOLLM3)
    result = engine.chat([QUESTION], tools=TOOLS[:1], tool_choice="required", max_new_tokens=0, seed=1)
    assert result.message is not None
    message = {**result.message, "tool_calls": result.message["tool_calls"][:1], "content": "Well."}
    arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
    conversation = [QUESTION, message, {"role": "tool", "content": "rain"}]
    request = engine.requests.chat(conversation, tools=TOOLS[:1])
    written = json.dumps({"name": "weather", "arguments": arguments})
    text = engine.tokenizer.decode(request.token_ids, skip_special_tokens=False)
    assert text.startswith(f"{TOOLS[0]} Answer with")
    assert f"assistant: Well.\n<tool_call>\n{written}\n</tool_call>" in text


class Saying:
    """Has the face of a `_core.Session`."""

    finish_reason = "eos"

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        self._ids: Iterator[int] = iter(ids)
        self.stats = _core.Session(engine._core, _core.SessionOptions()).stats

    def next(self) -> int | None:
        return next(self._ids, None)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "replace"])
def test_markers_that_are_special_tokens_are_read(
    engine_with: Callable[[str], Engine], kind: str, special: bool
) -> None:
    engine = engine_with(template("gemma"))
    tokenizer: Tokenizer = KINDS[kind]()
    marks = ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<|other|>"]
    if special:
        tokenizer.add_special_tokens(marks)
    else:
        tokenizer.add_tokens(marks[:-1])
        tokenizer.add_special_tokens(marks[-1:])
    form = find_form("<|tool_call> <channel|>")
    said = '<|channel>thought\nthe\n<channel|>a<|other|>b<|tool_call>call:the{a:<|"|>é<|"|>}<tool_call|>'
    ids = tokenizer.encode(said, add_special_tokens=False).ids

    def say(**options: Any) -> tuple[GenerationResult, list[str]]:
        core = cast(_core.Session, Saying(engine, ids))
        checked = check_options(options)
        stream = TextStream(core, Vocabulary(tokenizer), [], None, 0, 0, checked, None, form)
        pieces = list(stream)
        return stream.result, pieces

    result, pieces = say()
    # Special tokens that are no marks have no text, as ever.
    assert result.text == "".join(pieces) == said.replace("<|other|>", "")
    assert result.message is not None
    (call,) = result.message.pop("tool_calls")
    assert result.message == {"role": "assistant", "content": "ab", "reasoning_content": "the"}
    assert call["function"] == {"name": "the", "arguments": '{"a": "é"}'}
    parser = AnswerParser(form)
    assert [event for piece in pieces for event in parser.push(piece)][-1] == ToolCallArguments(0, "}")
    stopped, _ = say(stop="<tool_call|>")
    assert (stopped.text, stopped.finish_reason) == (result.text.removesuffix("<tool_call|>"), "stop")
    stopped, _ = say(stop="a<|other|>")
    assert stopped.message == {"role": "assistant", "content": "", "reasoning_content": "the"}
    assert AnswerParser(AnswerForm()).push("<think>") == [Content("<think>")]


def test_a_generation_ends_where_a_second_call_begins(engine_with: Callable[[str], Engine]) -> None:
    engine = engine_with(template("hermes"))
    tokenizer: Tokenizer = KINDS["byte level"]()
    call = '<tool_call>{"name": "we", "arguments": {}}</tool_call>'
    ids = tokenizer.encode(f"a{call}\n{call}b{call}", add_special_tokens=False).ids
    for one in (False, True):
        form = replace(find_form(template("hermes")), one_call=one)
        core = cast(_core.Session, Saying(engine, ids))
        stream = TextStream(core, Vocabulary(tokenizer), [], None, 0, 0, check_options({}), None, form)
        result = stream.finish()
        assert result.message is not None and result.message["content"] == ("a" if one else "ab")
        assert (len(result.message["tool_calls"]), result.finish_reason) == (1 if one else 3, "eos")
        assert not one or f"a{call}\n{call}".startswith(result.text)
        assert (len(result.token_ids) < len(ids)) is one
