"""The parser of answers: each family's form, told apart the same way however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki.answers import (
    AnswerEvent,
    AnswerForm,
    AnswerParser,
    Content,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    answer_message,
    find_form,
)

# Chat templates in the style of the families', as far as they tell the form of an answer.
QWEN3 = """\
{%- if tools %}{{- "<tools>" }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '</tools>\\nAnswer with <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' }}{% endif %}
{%- for message in messages %}
    {%- if '</think>' in message.content %}{% set content = message.content.split('</think>')[-1] %}{% endif %}
    {%- for call in message.tool_calls %}
        {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}
    {%- endfor %}
{%- endfor %}
"""
LLAMA3 = """\
{%- if tools is not none %}
    {{- 'Call a function with {"name": its name, "parameters": an object of its arguments}.' }}
{%- endif %}
{%- for message in messages if message.tool_calls %}
    {%- set call = message.tool_calls[0].function %}
    {{- '{"name": "' + call.name + '", ' }}{{ '"parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}
{%- endfor %}
"""
LLAMA3_ESCAPED = """{{ "Call with {\\"name\\": name, \\"parameters\\": arguments}" if tools }}{{ messages }}"""
MISTRAL = """\
{%- for message in messages %}
    {%- if message.tool_calls %}{{ "[TOOL_CALLS] [" }}{{ message.tool_calls | tojson }}{{ "]" + eos_token }}
    {%- else %}{{ "[INST]" + message.content + "[/INST]" }}{% endif %}
{%- endfor %}
"""
MAGISTRAL = "{{ 'Think between [THINK] and [/THINK].' }}" + MISTRAL
GEMMA4 = """\
{%- for message in messages %}
    {%- for call in message.tool_calls %}{{ '<|tool_call>call:' + call.function.name + '{' }}{% endfor %}
    {{- message.content.split('<channel|>')[-1] }}
{%- endfor %}
"""
QWEN_CODER = """\
{{- 'Call so: <tool_call>\\n<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>' if tools }}
{{- messages | tojson }}
"""
GEMMA3 = (
    "{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}<end_of_turn>{% endfor %}"
)
DEEPSEEK_DISTILLED = "{{ messages[0].content.split('</think>')[-1] }}<think>\n"

HERMES_FORM = find_form(QWEN3)
LLAMA_FORM = find_form(LLAMA3)
MISTRAL_FORM = find_form(MAGISTRAL)
GEMMA_FORM = find_form(GEMMA4)
CODER_FORM = find_form(QWEN_CODER)
FORMS = {
    "hermes": HERMES_FORM,
    "llama": LLAMA_FORM,
    "mistral": MISTRAL_FORM,
    "gemma": GEMMA_FORM,
    "coder": CODER_FORM,
}


def parse(form: AnswerForm, pieces: Sequence[str]) -> list[AnswerEvent]:
    """The events, those joined that are of the same part."""
    parser = AnswerParser(form)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    merged: list[AnswerEvent] = []
    for event in events:
        assert isinstance(event, ToolCallStart) or event.text
        last = merged[-1] if merged else None
        if isinstance(event, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            assert event.index == last.index
            merged[-1] = ToolCallArguments(last.index, last.text + event.text)
        else:
            merged.append(event)
    return merged


def call(index: int, name: str, arguments: str) -> list[AnswerEvent]:
    return [ToolCallStart(index, name), ToolCallArguments(index, arguments)]


def read(form: AnswerForm, text: str) -> list[AnswerEvent]:
    events = parse(form, list(text))
    assert parse(form, [text]) == events
    return events


@pytest.mark.parametrize(
    ("template", "thinking", "calls"),
    [
        (QWEN3, "<think>", "HermesCalls"),
        (LLAMA3, None, "LlamaCalls"),
        (LLAMA3_ESCAPED, None, "LlamaCalls"),
        (MISTRAL, None, "MistralCalls"),
        (MAGISTRAL, "[THINK]", "MistralCalls"),
        (GEMMA4, "<|channel>thought\n", "GemmaCalls"),
        (QWEN_CODER, None, "QwenCoderCalls"),
        (GEMMA3, None, None),
        (DEEPSEEK_DISTILLED, "<think>", None),
    ],
)
def test_the_form_is_found_in_the_template(template: str, thinking: str | None, calls: str | None) -> None:
    form = find_form(template)
    assert (form.thinking[0] if form.thinking else None) == thinking
    assert (type(form.calls).__name__ if form.calls else None) == calls


WEATHER = '{"city": "Par}{is \\" <", "days": [1, {"x": null}]}'


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", "Hello.\n", [Content("Hello.\n")]),
        ("hermes", "\n\n Hello", [Content("\n\n Hello")]),
        ("hermes", "<think>\nHm,\n yes.\n</think>\n\nHello\n", [Reasoning("Hm,\n yes."), Content("Hello\n")]),
        ("hermes", "<think>\n\n</think>\n\nHello", [Content("Hello")]),
        ("hermes", "<think>Hm, <tool_call>", [Reasoning("Hm, <tool_call>")]),
        ("hermes", "Write <think> and </think>.", [Content("Write <think> and </think>.")]),
        ("hermes", f'<tool_call>\n{{"name": "w", "arguments": {WEATHER}}}\n</tool_call>\n', call(0, "w", WEATHER)),
        ("hermes", f'<tool_call>{{"arguments":{WEATHER},"name":"w"}}</tool_call>', call(0, "w", WEATHER)),
        (
            "hermes",
            'One.\n<tool_call>{"id": [1], "name": "w\\u0061", "arguments": {}, "n": -1.5e3}</tool_call>\n'
            '<tool_call>\n{"name": "v", "parameters": {"a": 1}}\n</tool_call>\nTwo',
            [Content("One."), *call(0, "wa", "{}"), *call(1, "v", '{"a": 1}'), Content("Two")],
        ),
        (
            "hermes",
            '<think>a</think><tool_call>{"name": "w"}{"name": "v", "arguments": null}</tool_call><think>b</think>c',
            [Reasoning("a"), *call(0, "w", "{}"), *call(1, "v", "{}"), Reasoning("b"), Content("c")],
        ),
        ("hermes", '<tool_call>{"name": "w", "arguments": "{\\"a\\": 1}"}', call(0, "w", '{"a": 1}')),
        ("hermes", '[{"name": "w", "arguments": {}}]', [Content('[{"name": "w", "arguments": {}}]')]),
        ("llama", f'\n{{"name": "w", "parameters": {WEATHER}}}\n', call(0, "w", WEATHER)),
        ("llama", '<|python_tag|>{"type": "function", "name": "w", "parameters": {}}', call(0, "w", "{}")),
        (
            "llama",
            '{"name": "w", "parameters": {}}; {"name": "v", "parameters": {"a": 1}};',
            [*call(0, "w", "{}"), *call(1, "v", '{"a": 1}')],
        ),
        (
            "llama",
            '<|python_tag|>{"name": "w", "parameters": {}}\n<|python_tag|>{"name": "v", "parameters": {}}',
            [*call(0, "w", "{}"), *call(1, "v", "{}")],
        ),
        ("llama", '{"name": "Ann", "age": 7} is JSON', [Content('{"name": "Ann", "age": 7} is JSON')]),
        ("llama", "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
        ("llama", 'It is {"name": "w", "parameters": {}}', [Content('It is {"name": "w", "parameters": {}}')]),
        ("llama", '{"name": "w", "parameters": {}} It is.', [*call(0, "w", "{}"), Content("It is.")]),
        (
            "mistral",
            f'[TOOL_CALLS] [{{"name": "w", "arguments": {WEATHER}, "id": "abcdefghi"}}, '
            '{"name": "v", "arguments": {}}]',
            [*call(0, "w", WEATHER), *call(1, "v", "{}")],
        ),
        (
            "mistral",
            f"[THINK]Hm[/THINK]Well.[TOOL_CALLS]w[ARGS]{WEATHER}[TOOL_CALLS]v[CALL_ID]a1b2c3d4e[ARGS]{{}}",
            [Reasoning("Hm"), Content("Well."), *call(0, "w", WEATHER), *call(1, "v", "{}")],
        ),
        ("mistral", '[TOOL_CALLS]w{"a": 1}', call(0, "w", '{"a": 1}')),
        (
            "gemma",
            '<|channel>thought\nHm.\n<channel|><|tool_call>call:w{city:<|"|>Pa"r\\is,}<|"|>,n:[1.5,true,{a:<|"|><|"|>}],'
            "o:{},m:None}<tool_call|><|tool_call>call:v{}<tool_call|>",
            [
                Reasoning("Hm."),
                *call(0, "w", '{"city": "Pa\\"r\\\\is,}", "n": [1.5, true, {"a": ""}], "o": {}, "m": null}'),
                *call(1, "v", "{}"),
            ],
        ),
        ("gemma", "<|channel>thought\n<channel|>Hello", [Content("Hello")]),
        (
            "coder",
            "One.\n<tool_call>\n<function=w>\n<parameter=a>\n1\n2 <\n</parameter>\n"
            '<parameter=b>\n{"c": [1]}\n</parameter>\n'
            "</function>\n</tool_call>\n<tool_call><function=v></function></tool_call>",
            [Content("One."), *call(0, "w", '{"a": "1\\n2 <", "b": {"c": [1]}}'), *call(1, "v", "{}")],
        ),
        ("coder", "<function=w>\n<parameter=a>1</parameter></function>", call(0, "w", '{"a": 1}')),
        (
            "coder",
            "<function=w><parameter=a>NaN</parameter><parameter=b>[-Infinity]</parameter></function>",
            call(0, "w", '{"a": "NaN", "b": "[-Infinity]"}'),
        ),
        ("gemma", "<|tool_call>call:w{a:NaN,b:-Infinity}<tool_call|>", call(0, "w", '{"a": "NaN", "b": "-Infinity"}')),
        ("coder", "<function=w></function>\nTwo", [*call(0, "w", "{}"), Content("Two")]),
        ("coder", f'<tool_call>{{"name": "w", "arguments": {WEATHER}}}</tool_call>', call(0, "w", WEATHER)),
        (
            "gemma",
            '<|tool_call>call:w{<|"|>a b<|"|>:"x\\n", c: Paris }<tool_call|>',
            call(0, "w", '{"a b": "x\\n", "c": "Paris"}'),
        ),
    ],
)
def test_known_answers(form: str, text: str, expected: list[AnswerEvent]) -> None:
    assert read(FORMS[form], text) == expected


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        # Broken off before the arguments: text; later: as far as they go.
        ("hermes", '<tool_call>\n{"name": "w", "argu', [Content('<tool_call>\n{"name": "w", "argu')]),
        ("hermes", 'a <tool_call>\n{"name": "w', [Content('a <tool_call>\n{"name": "w')]),
        ("hermes", "a <tool_c", [Content("a <tool_c")]),
        ("hermes", '<tool_call>{"name": "w", "arguments": {"a": "b', call(0, "w", '{"a": "b')),
        ("hermes", '<tool_call>{"name": "w", "arguments": {"a": 1}', call(0, "w", '{"a": 1}')),
        ("hermes", '<tool_call>{"name": "w", "arguments": {"a": 1}}</tool_', call(0, "w", '{"a": 1}')),
        ("hermes", "<think>Hm\n", [Reasoning("Hm")]),
        ("llama", '{"name": "w", "parameters"', [Content('{"name": "w", "parameters"')]),
        ("llama", "<|python_tag|>", [Content("<|python_tag|>")]),
        ("mistral", "[TOOL_CALLS]w[ARG", [Content("[TOOL_CALLS]w[ARG")]),
        ("mistral", "[TOOL_CALLS] []", [Content("[TOOL_CALLS] []")]),
        ("gemma", '<|tool_call>call:w{city:<|"|>Par', call(0, "w", '{"city": "Par')),
        ("gemma", "<|tool_call>call:w", [Content("<|tool_call>call:w")]),
        # Of another structure.
        ("hermes", '<tool_call>["w"]</tool_call>', [Content('<tool_call>["w"]</tool_call>')]),
        ("hermes", "<tool_call></tool_call>", [Content("<tool_call></tool_call>")]),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}', [Content('<tool_call>{"name": 3, "arguments": {}}')]),
        ("hermes", '<tool_call>{"name": "w", 3}', [Content('<tool_call>{"name": "w", 3}')]),
        ("hermes", '<tool_call> w <tool_call>{"name": "v"}', [Content("<tool_call> w"), *call(0, "v", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "w", "arguments": {"a": [1}} and more',
            [ToolCallStart(0, "w"), ToolCallArguments(0, '{"a": [1'), Content("}} and more")],
        ),
        ("hermes", '<tool_call>{"name": "w", "arguments": {}} or', [*call(0, "w", "{}"), Content("or")]),
        ("mistral", "[TOOL_CALLS]two words{}", [Content("[TOOL_CALLS]two words{}")]),
        ("coder", "<function=w", [Content("<function=w")]),
        (
            "coder",
            "<function=w><parameter=a>1</parameter><parameter=b>2",
            [*call(0, "w", '{"a": 1'), Content("<parameter=b>2")],
        ),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "w", "arguments": {}}, {"name": "v", "argu',
            [*call(0, "w", "{}"), Content(', {"name": "v", "argu')],
        ),
        ("mistral", '[TOOL_CALLS][{"name": "w", "arguments": {}}', call(0, "w", "{}")),
        ("coder", "<function=w>text", [ToolCallStart(0, "w"), Content("text")]),
        ("coder", "<tool_call>w</tool_call>", [Content("<tool_call>w</tool_call>")]),
        ("gemma", "<|tool_call>w{}", [Content("<|tool_call>w{}")]),
        ("gemma", "<|tool_call>call:w{a}b", [ToolCallStart(0, "w"), ToolCallArguments(0, "{"), Content("a}b")]),
    ],
)
def test_what_is_no_call_is_text(form: str, text: str, expected: list[AnswerEvent]) -> None:
    assert read(FORMS[form], text) == expected


def test_thoughts_may_begin_in_the_prompt() -> None:
    form = AnswerForm(HERMES_FORM.thinking, HERMES_FORM.calls, thinks_first=True)
    assert read(form, "\nHm.\n</think>\n\nHello") == [Reasoning("Hm."), Content("Hello")]
    assert read(form, "Hm.") == [Reasoning("Hm.")]


@pytest.mark.parametrize(
    ("form", "text", "kept"),
    [
        ("hermes", 'a<tool_call>{"name": "w", "arguments": {}}</tool_call>\n<tool_call>{"name": "v", "arguments":{', 3),
        ("hermes", '<tool_call>{"name": "w", "arguments": {}}</tool_call>b<think>', 3),
        ("llama", '{"name": "w", "parameters": {}}; {"name": "v", "parameters": {}} c', 2),
        ("mistral", '[TOOL_CALLS][{"name": "w", "arguments": {}}, {"name": "v", "arguments": {}}]', 2),
        ("gemma", "<|tool_call>call:w{}<tool_call|><|tool_call>call:v{}<tool_call|>c", 2),
        ("coder", "<function=w></function><function=v></function>", 2),
    ],
)
def test_an_answer_that_may_have_one_call_is_over_where_another_begins(form: str, text: str, kept: int) -> None:
    events = read(replace(FORMS[form], one_call=True), text)
    assert events == read(FORMS[form], text)[:kept]
    parser = AnswerParser(replace(FORMS[form], one_call=True))
    parser.push(text)
    assert parser.over == any(event == ToolCallStart(1, "v") for event in read(FORMS[form], text))


def test_a_schema_says_what_is_a_string() -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "number"}, "c": {}}
    assert CODER_FORM.calls is not None
    calls = CODER_FORM.calls.of_tools([{"name": "w", "parameters": {"properties": properties}}])
    text = "".join(f"<parameter={key}>1</parameter>" for key in "abcd")
    events = read(AnswerForm(calls=calls), f"<function=w>{text}</function>")
    assert events == call(0, "w", '{"a": "1", "b": 1, "c": 1, "d": 1}')


@pytest.mark.parametrize(
    "parameters", [None, [], {"properties": ["a"]}, {"properties": None}, {"properties": {"a": 1}}]
)
def test_a_schema_that_is_none(parameters: Any) -> None:
    assert CODER_FORM.calls is not None
    calls = CODER_FORM.calls.of_tools([{"name": "w", "parameters": parameters}])
    text = "<function=w><parameter=a>1</parameter></function>"
    assert read(AnswerForm(calls=calls), text) == call(0, "w", '{"a": 1}')


def test_an_answer_that_begins_calls_without_end_is_read_in_time() -> None:
    """Each is a call to its end, or text: without a limit this would take hours."""
    for text in ('<tool_call>{"a":[' * 40_000, '<tool_call>{"arguments":{"a":[' * 40_000 + "}"):
        assert answer_message(text, HERMES_FORM) == {"role": "assistant", "content": text}


def test_all_is_text_by_default() -> None:
    text = '<think>a</think> <tool_call>{"name": "w", "arguments": {}}</tool_call> [TOOL_CALLS]\n '
    assert read(AnswerForm(), text) == [Content(text)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_more_is_held_back_than_may_be_a_marker(form: AnswerForm) -> None:
    parser = AnswerParser(form)
    for word in ("It", " <", "b", "> is", " [", "x", "]", " 1"):
        # A "<" or a "[" may begin a marker, a space may stand before one; what follows decides.
        events = parser.push(word)
        assert events or word in (" <", " [")
    assert parser.finish() == []
    parser = AnswerParser(HERMES_FORM)
    assert parser.push('<tool_call>{"name": "w", "arguments": {') == call(0, "w", "{")
    assert parser.push('"a') == [ToolCallArguments(0, '"a')]
    assert parser.push('": 1}') == [ToolCallArguments(0, '": 1}')]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(min_size=1), JSON, max_size=3)
NAMES = st.text("abc_-.1", min_size=1, max_size=6)


def gemma_value(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f'<|"|>{key}<|"|>:{gemma_value(part)}' for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma_value, value)) + "]"
    return json.dumps(value)


def written_json(name: str, arguments: Any, key: str) -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


WRITERS: dict[str, Callable[[list[tuple[str, Any]]], str]] = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{written_json(*one, 'arguments')}\n</tool_call>" for one in calls),
    "llama": lambda calls: "; ".join(written_json(*one, "parameters") for one in calls),
    "mistral": lambda calls: "[TOOL_CALLS][" + ", ".join(written_json(*one, "arguments") for one in calls) + "]",
    "gemma": lambda calls: "".join(
        f"<|tool_call>call:{name}{gemma_value(values)}<tool_call|>" for name, values in calls
    ),
}


@pytest.mark.parametrize("family", WRITERS)
@given(
    thoughts=st.sampled_from(["", "Hm.", "One\n\ntwo {"]),
    text=st.sampled_from(["", "Let me see.", "Two\n lines"]),
    calls=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3),
)
def test_what_a_model_writes_is_read(
    family: str, thoughts: str, text: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    form = FORMS[family]
    written = WRITERS[family](calls)
    if family == "llama":  # the calls are the whole answer
        thoughts = text = ""
    if thoughts:
        assert form.thinking is not None
        text = form.thinking[0] + thoughts + form.thinking[1] + text
        expected = text.removeprefix(form.thinking[0] + thoughts + form.thinking[1])
    else:
        expected = text
    message = answer_message(f"{text}\n{written}\n", form)
    assert (message["content"] or "", message.get("reasoning_content", "")) == (expected, thoughts)
    functions = [one["function"] for one in message["tool_calls"]]
    assert [(one["name"], json.loads(one["arguments"])) for one in functions] == calls
    if family != "gemma":  # to the letter
        assert [one["arguments"] for one in functions] == [json.dumps(one, ensure_ascii=False) for _, one in calls]
    ids = [one["id"] for one in message["tool_calls"]]
    assert len(set(ids)) == len(calls) and all(len(id) == len("call_") + 24 for id in ids)


CHUNKS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[/THINK]"),
        *("[THINK]", "<|channel>thought\n", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "call:w", "w"),
        *("<function=w>", "<parameter=a>", "</parameter>", "</function>"),
        *('{"name": "w", "arguments": ', '{"name": "w", "parameters": {"a": 1}}', '{"a": "b\\"}"}', "{a:", "{}", "}"),
        *("{", "[", "]", '"', "\\", ",", ";", ":", " ", "\n", "text", "1", "<", "|", "é🦊"),
    ]
)


@pytest.mark.parametrize("thinks_first", [False, True])
@pytest.mark.parametrize("family", FORMS)
@given(chunks=st.lists(CHUNKS, max_size=14), cuts=st.lists(st.integers(0, 100), max_size=8))
def test_any_text_is_read_the_same_however_it_is_cut(
    family: str, thinks_first: bool, chunks: list[str], cuts: list[int]
) -> None:
    form = AnswerForm(FORMS[family].thinking, FORMS[family].calls, thinks_first and FORMS[family].thinking is not None)
    text = "".join(chunks)
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = parse(form, [text[start:end] for start, end in pairwise(at)])
    assert events == read(form, text)
    starts = [event.index for event in events if isinstance(event, ToolCallStart)]
    assert starts == list(range(len(starts)))
    for before, event in pairwise([None, *events]):
        if isinstance(event, ToolCallArguments):
            assert isinstance(before, ToolCallStart) and before.index == event.index
    if "w" in text and not starts and not thinks_first:  # no letter is lost
        assert sum(event.text.count("w") for event in events if not isinstance(event, ToolCallStart)) == text.count("w")


def test_a_message_has_only_what_the_answer_has() -> None:
    assert answer_message("", HERMES_FORM) == {"role": "assistant", "content": ""}
    assert answer_message("<think>a", HERMES_FORM) == {"role": "assistant", "content": "", "reasoning_content": "a"}
    message = answer_message('<tool_call>{"name": "w", "arguments": {"a": 1}}</tool_call>', HERMES_FORM)
    (made,) = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": None}
    assert (made["type"], made["function"]) == ("function", {"name": "w", "arguments": '{"a": 1}'})
