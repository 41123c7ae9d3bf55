"""Chat templates, against transformers: what its users see is what templates are written for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki import Engine, PackageError
from meki.chat import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# Models' own templates have other licences and more tools; these have what makes those hard to render alike.
CHATML = """\
{%- if messages[0].role != "system" -%}
    {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{% for message in messages %}
{{ "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>" + "\\n" }}{% endfor %}
{% if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if tools is not none %}{{ raise_exception("no tools here") }}{% endif %}
{%- set system = messages[0]["content"] | trim if messages[0]["role"] == "system" else "" %}
{%- set rest = messages[1:] if messages[0]["role"] == "system" else messages %}
<|start_header_id|>system<|end_header_id|>

    Today's year: {{ strftime_now("%Y") }}
{{ system }}<|eot_id|>
{%- for message in rest %}
    {# a comment, and blocks on lines of their own #}
    {% set header = "<|start_header_id|>" ~ message["role"] ~ "<|end_header_id|>\\n\\n" %}
    {{- header + message["content"] | trim + "<|eot_id|>" }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}


"""
QWEN3 = """\
{%- set ns = namespace(last_query=messages | length - 1, thinks=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if not message.content and message.role == "system" %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and "</think>" in content %}
        {%- set ns.thinks = true %}
        {%- if loop.index0 < ns.last_query %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}
    {%- if ns.thinks %}{{ "<think>" }}{% endif %}
{%- endif %}
"""
GENERATION = """\
{% macro turn(role, text) %}[{{ role | upper }}] {{ text }}{% endmacro %}
{% for message in messages if message.content is string %}
  {%- if message.role == "assistant" %}
    {% generation %}{% set mine = message.content %}{{ turn("model", mine) }}{{ eos_token }}
    {% endgeneration %}
  {% else %}
{{ turn(message.role, message.content) }}
  {% endif %}
{{ mine is defined }}
{% endfor %}
{{ documents is none }} {{ pad_token is defined }} {{ loop is defined }}
"""
JSON = """\
{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }} {{ messages | tojson(separators=(",", ":"), sort_keys=true) }}
{{ messages[-1].content | tojson(ensure_ascii=true) }} {{ messages | map(attribute="role") | join(", ") }}
"""
TOOLS = """\
{%- if tools is not none %}
    {%- for tool in tools %}{{ tool | tojson }}
{% endfor %}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role }}
    {%- if message.content %}{{ "\n" + message.content | trim }}{% endif %}
    {%- if "tool_calls" in message %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}}
        {%- endfor %}
    {%- endif %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if not date is defined %}{% set date = "today" %}{% endif %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" + date }}{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "generation": GENERATION, "json": JSON}


@pytest.fixture(scope="module")
def reference() -> Callable[[str, list[dict[str, Any]]], str]:
    """What transformers makes of a template and messages."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)

    def render(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
        begins = not arguments.get("continue_final_message", False)
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=begins, **arguments
        )
        assert isinstance(text, str)
        return text

    return render


@pytest.fixture
def compile_template(tmp_path: Path) -> Callable[..., ChatTemplate]:
    def compile_text(text: str | bytes, variables: dict[str, str] = SPECIAL) -> ChatTemplate:
        path = tmp_path / "chat_template.jinja"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ChatTemplate(path, variables)

    return compile_text


@pytest.fixture(scope="module", params=list(TEMPLATES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatTemplate]:
    path = tmp_path_factory.mktemp("template") / "chat_template.jinja"
    path.write_text(TEMPLATES[request.param])
    return TEMPLATES[request.param], ChatTemplate(path, SPECIAL)


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def calls(tool_calls: Any, content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


TEXT_PART = {"type": "text", "text": "Hello"}
SYSTEM = {"role": "system", "content": "  Answer in <b>one</b> word & no more.\n"}
CONVERSATIONS = [
    [user("Hello")],
    [SYSTEM, user("What is the capital of France?")],
    [SYSTEM, user("One?"), assistant("<think>\nHm.\n</think>\n\nTwo."), user("Three?")],
    [user("One?"), assistant("Two."), user("Three?"), assistant("<think>\nunfinished")],
    [{"role": "system", "content": ""}, user(" \n "), {"role": "tool", "content": "4 °C", "name": "weather"}],
    [user("{{ 7 * 7 }} {% raw %} 'quotes' \"too\" \\n 🦊\r\n", extra=[1, {"two": None}])],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_renders_as_transformers_does(
    pair: tuple[str, ChatTemplate], messages: list[dict[str, Any]], reference: Callable[..., str]
) -> None:
    text, template = pair
    assert template.render(messages) == reference(text, messages)


TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["</think>\n\nx", "<|im_end|>", "{{ x }}"])
ROLE = st.sampled_from(["system", "user", "assistant"])


@settings(deadline=None)  # the first rendering compiles the reference
@given(messages=st.lists(st.fixed_dictionaries({"role": ROLE, "content": TEXT}), min_size=1, max_size=6))
def test_renders_any_messages_as_transformers_does(
    pair: tuple[str, ChatTemplate], messages: list[dict[str, Any]], reference: Callable[..., str]
) -> None:
    text, template = pair
    assert template.render(messages) == reference(text, messages)


def test_known_texts(compile_template: Callable[..., ChatTemplate]) -> None:
    """Written out by hand: what both libraries could get wrong alike."""
    messages = [user("One?"), assistant("<think>\nHm.\n</think>\n\nTwo."), user("Three?")]
    assert compile_template(QWEN3).render(messages) == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n<think>"
    )
    # One of the three line breaks at the end of the template belongs to a block, one to the end of the file.
    assert compile_template(LLAMA3).render([user(" Hi ")]) == (
        f"<s><|start_header_id|>system<|end_header_id|>\n\n    Today's year: {datetime.now().year}\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n\n"
    )


def test_the_template_does_not_change_the_callers_messages(compile_template: Callable[..., ChatTemplate]) -> None:
    messages = [user("Hi", tags=["a"])]
    for text in ("{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}", "{{ messages[0].tags.append(1) }}"):
        with pytest.raises(PackageError, match=r"chat_template\.jinja: the chat template fails"):
            compile_template(text).render(messages)
    assert messages == [user("Hi", tags=["a"])]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{% for message in messages %}", "line 1"),
        ("a\nb\n{{ messages | no_such_filter }}", "line 3.*no_such_filter"),
        ("{% include 'other' %}{% endfor %}", "endfor"),
        ("{% generation %}x", "endgeneration"),
        (b"\xff\xfe", "utf-8"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not parse"),
    ],
)
def test_what_does_not_parse(compile_template: Callable[..., ChatTemplate], text: str | bytes, named: str) -> None:
    with pytest.raises(PackageError, match=named) as caught:
        compile_template(text)
    assert "chat_template.jinja: the chat template does not parse: " in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0].nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(indent={}) }}",
        "{% include 'other.jinja' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}{{ raise_exception.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_what_fails_is_the_packages_error(compile_template: Callable[..., ChatTemplate], text: str) -> None:
    with pytest.raises(
        PackageError, match=r"chat_template\.jinja: the chat template fails on these messages: .*convert"
    ):
        compile_template(text).render([user("Hi")])


def test_what_the_template_refuses_is_the_callers_error(compile_template: Callable[..., ChatTemplate]) -> None:
    template = compile_template("{{ raise_exception('Roles must alternate: ' + messages[0].role) }}")
    with pytest.raises(
        ValueError, match=r"chat_template\.jinja: .*refuses these messages: Roles must alternate: user$"
    ):
        template.render([user("Hi")])


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "at least one message"),
        ("Hello", "list of at least one message.*'Hello'"),
        (user("Hello"), "list of at least one message"),
        (None, "list of at least one message"),
        (["Hello"], r"messages\[0\] is 'Hello', expected a message"),
        ([user("a"), {"role": "user"}], r'messages\[1\]\["content"\] is missing, expected a str'),
        ([{"content": "a"}], r'messages\[0\]\["role"\] is missing'),
        ([{"role": None, "content": "a"}], r'messages\[0\]\["role"\] is None'),
        ([{"role": "user", "content": 7}], r'messages\[0\]\["content"\] is 7, expected a str or a list of text parts'),
        ([{"role": "assistant", "content": None}], r'messages\[0\]\["content"\] is None'),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r'messages\[0\]\["content"\] is None'),
        (
            [user("a"), user([TEXT_PART, {"type": "image_url"}])],
            r"messages\[1\].*\[1\] is of type 'image_url'; .*text alone",
        ),
        ([user([{"type": "text"}])], r'messages\[0\]\["content"\]\[0\] is \{'),
        ([user([{"type": "text", "text": None}])], r'messages\[0\]\["content"\]\[0\] is \{'),
        ([user(["a"])], r"""messages\[0\]\["content"\]\[0\] is 'a'"""),
        ([calls("weather")], r"""\["tool_calls"\] is 'weather', expected a list of tool calls"""),
        ([calls(["weather"])], r"""\["tool_calls"\]\[0\] is 'weather', expected a tool call"""),
        ([calls([{"function": {"arguments": "{}"}}])], r"""\[0\]\["function"\]\["name"\] is missing"""),
        ([calls([call("{")])], r"""\["arguments"\] is '\{', expected an object, or the JSON text of one"""),
        ([calls([call("[1]")])], r"""\["arguments"\] is '\[1\]', expected an object"""),
        ([calls([call("[" * 100_000)])], r"""\["arguments"\] is .*, expected an object"""),
    ],
)
def test_messages_of_a_wrong_form(compile_template: Callable[..., ChatTemplate], messages: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        compile_template(CHATML).render(messages)


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def test_tool_calls_as_transformers_renders_them(
    compile_template: Callable[..., ChatTemplate], reference: Callable[..., str]
) -> None:
    """OpenAI's API has the arguments as JSON text; transformers, and so the templates, want the object."""

    def conversation(arguments: Any) -> list[dict[str, Any]]:
        return [
            user("And in Paris?"),
            calls([call(arguments), call({}), {"name": "flat", "arguments": arguments}]),
            {"role": "tool", "content": "4 °C", "tool_call_id": "1"},
            calls([call({"city": "Oslo"})], "Let me see."),
        ]

    template = compile_template(TOOLS)
    expected = reference(TOOLS, conversation({"city": "Paris"}), tools=[WEATHER])
    assert '"arguments": {"city": "Paris"}}' in expected
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        assert template.render(conversation(arguments), tools=[WEATHER]) == expected
    assert template.render(conversation({})) == template.render(conversation("")) == reference(TOOLS, conversation({}))


def test_templates_that_take_arguments_for_text(compile_template: Callable[..., ChatTemplate]) -> None:
    """As DeepSeek's, which ask for a content of none, too; others would fail on that."""
    text = """\
{%- for message in messages %}
    {%- if message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {{- '<call>' + call['function']['name'] + '\n' + call['function']['arguments'] + '</call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<text>' + message['content'] }}
    {%- endif %}
{%- endfor %}"""
    asked = [user("Paris?"), calls([call('{"city": "Zürich"}'), call("")])]
    expected = '<text>Paris?<call>weather\n{"city": "Zürich"}</call><call>weather\n{}</call>'
    assert compile_template(text).render(asked) == expected
    written = compile_template("{% for call in messages[1].tool_calls %}{{ call.function.arguments }}{% endfor %}")
    assert written.render(asked) == '{"city": "Zürich"}{}'


def test_a_template_without_tools_does_not_drop_them(compile_template: Callable[..., ChatTemplate]) -> None:
    template = compile_template(CHATML)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template knows no tools; leave them out"):
        template.render([user("Hi")], tools=[WEATHER])
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template knows no tool_calls; leave"):
        template.render([user("Hi"), calls([call({})]), user("Hi")])


def test_fields_that_clients_send_empty(compile_template: Callable[..., ChatTemplate]) -> None:
    """What OpenAI's clients make of an answer has all fields."""
    template = compile_template(TOOLS)
    for empty in (None, []):
        assert template.render([calls(empty, "Paris")]) == template.render([assistant("Paris")])
    message = calls([call({})])
    del message["content"]
    assert template.render([message]) == template.render([calls([call({})])])
    assert template.render([user("Hi")], tools=[]) == template.render([user("Hi")])


def test_parts_of_a_content_are_joined(compile_template: Callable[..., ChatTemplate]) -> None:
    template = compile_template(CHATML)
    for parts, text in (([], ""), ([TEXT_PART], "Hello"), ((TEXT_PART, {"type": "text", "text": " x"}), "Hello\n x")):
        messages = [{"role": "user", "content": parts}]
        assert template.render(messages) == template.render([user(text)])
        assert messages[0]["content"] is parts


@pytest.mark.parametrize("tools", ["weather", WEATHER, [len], ["weather"], [{"name": len}], 3])
def test_tools_that_are_not_json(compile_template: Callable[..., ChatTemplate], tools: Any) -> None:
    with pytest.raises(TypeError, match=r"tools(\[0\])? (is|must be) "):
        compile_template(TOOLS).render([user("Hi")], tools=tools)


def test_variables_as_transformers_takes_them(
    compile_template: Callable[..., ChatTemplate], reference: Callable[..., str]
) -> None:
    for text, variables in (
        (QWEN3, {"enable_thinking": False}),
        (QWEN3, {"enable_thinking": True}),
        (TOOLS, {"date": "tomorrow"}),
        (GENERATION, {"eos_token": "<end>", "documents": [{"title": "a", "text": "b"}]}),
    ):
        rendered = compile_template(text).render(CONVERSATIONS[2], chat_template_kwargs=variables)
        assert rendered == reference(text, CONVERSATIONS[2], **variables)
    assert (
        compile_template(QWEN3)
        .render([user("Hi")], chat_template_kwargs={"enable_thinking": False})
        .endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    )


@pytest.mark.parametrize(
    ("variables", "error", "named"),
    [
        ({"enable_thinkin": False}, ValueError, "has no variable 'enable_thinkin'; it has: enable_thinking$"),
        ({"loop": 1}, ValueError, "has no variable 'loop'"),
        ({"messages": []}, ValueError, "has 'messages', which the call itself says"),
        ({"add_generation_prompt": False}, ValueError, "has 'add_generation_prompt'"),
        ({"enable_thinking": len}, TypeError, "chat_template_kwargs must be what JSON can hold"),
        ({1: 2}, TypeError, "chat_template_kwargs must map names"),
        ("enable_thinking", TypeError, "chat_template_kwargs must map names"),
    ],
)
def test_variables_that_cannot_be(
    compile_template: Callable[..., ChatTemplate], variables: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        compile_template(QWEN3).render([user("Hi")], chat_template_kwargs=variables)


BEGUN = ["", "Two", " Two, ", "Two,\n\n", "</think>\n\nTwo", "<|im_end|>", "<think>\nHm", "\ue000"]


@pytest.mark.parametrize("begun", BEGUN, ids=range(len(BEGUN)))
@pytest.mark.parametrize("text", [CHATML, LLAMA3, QWEN3, TOOLS, GENERATION], ids=range(5))
def test_a_message_is_continued_as_in_transformers(
    compile_template: Callable[..., ChatTemplate], reference: Callable[..., str], text: str, begun: str
) -> None:
    messages = [SYSTEM, user("One?"), assistant("Two"), user("Again?"), assistant(begun)]
    rendered = compile_template(text).render(messages, continue_final_message=True)
    assert rendered == reference(text, messages, continue_final_message=True)
    assert rendered.rstrip().endswith(begun.split("</think>")[-1].strip())
    parts = [*messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    assert compile_template(text).render(parts, continue_final_message=True) == rendered


def test_what_cannot_be_continued(compile_template: Callable[..., ChatTemplate]) -> None:
    for messages in ([user("Hi")], [user("Hi"), calls([call({})])]):
        with pytest.raises(ValueError, match="text of an assistant's message, but the last message is"):
            compile_template(TOOLS).render(messages, continue_final_message=True)
    with pytest.raises(ValueError, match="the chat template leaves out the last message"):
        compile_template("{{ messages[0].content }}").render([user("a"), assistant("b")], continue_final_message=True)


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ messages[0].nothing.at_all }}")
    with pytest.raises(ValueError, match=r"mine\.jinja: the chat template fails on these messages: .*; give one"):
        ChatTemplate(path, {}, given=True).render([user("Hi")])


def test_variables_do_not_shadow_the_messages(compile_template: Callable[..., ChatTemplate]) -> None:
    template = compile_template("{{ messages | length }}{{ self_token }}", {"messages": "x", "self_token": "<x>"})
    assert template.render([user("Hi")]) == "1<x>"


@given(
    text=st.lists(
        st.sampled_from(["{{", "}}", "{%", "%}", " for ", "x", " in ", "messages", "endfor", "(", "'", "|", "if"])
    )
)
def test_any_text_renders_or_is_an_error(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jinja"
    path.write_text("".join(text))
    try:
        assert isinstance(ChatTemplate(path, {}).render([user("Hi")]), str)
    except PackageError as error:
        assert "any.jinja: the chat template" in str(error)


def test_a_package_with_a_broken_template_does_not_open(
    change_package: Callable[..., Path], with_template: Any
) -> None:
    with pytest.raises(PackageError, match=r"chat_template\.jinja.*does not parse"):
        Engine(change_package(with_template("{% if %}")))


def test_a_damaged_template_is_not_parsed(change_package: Callable[..., Path], with_template: Any) -> None:
    path = change_package(with_template())
    text = (path / "chat_template.jinja").read_bytes()
    (path / "chat_template.jinja").write_bytes(text.replace(b"role", b"rule"))
    with pytest.raises(PackageError, match=r"chat_template\.jinja: SHA-256"):
        Engine(path)


@pytest.mark.parametrize("variables", [None, [], {"eos_token": 3}, {"eos_token": None}])
def test_variables_are_strings(change_package: Callable[..., Path], with_template: Any, variables: object) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        with_template()(manifest)
        manifest["tokenizer"]["chat_template"]["variables"] = variables

    with pytest.raises(PackageError, match=r"tokenizer\.chat_template\.variables is .*expected an object of strings"):
        Engine(change_package(edit))
