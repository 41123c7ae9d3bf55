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
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "generation": GENERATION, "json": JSON}


@pytest.fixture(scope="module")
def reference() -> Callable[[str, list[dict[str, Any]]], str]:
    """What transformers makes of a template and messages."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)

    def render(template: str, messages: list[dict[str, Any]]) -> str:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
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
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r'messages\[0\]\["content"\] is \[\{'),
    ],
)
def test_messages_of_a_wrong_form(compile_template: Callable[..., ChatTemplate], messages: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        compile_template(CHATML).render(messages)


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
