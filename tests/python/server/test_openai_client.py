"""The real client of OpenAI's API against a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from meki import Engine

from .running import Running, Serve

MESSAGES: list[Any] = [
    {"role": "developer", "content": "You tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "of a fox."}]},
]
PLAIN = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": "Tell me\nof a fox."},
]
CHAT: dict[str, Any] = {"model": "meki-tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


def test_a_chat(served: Running, tiny: Engine) -> None:
    expected = tiny.chat(PLAIN, max_new_tokens=12, temperature=0)
    answer = served.openai.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "meki-tiny"
    assert answer.usage is not None and answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, 12 + expected.stats.prompt_tokens)
    again = served.openai.chat.completions.create(**CHAT)
    assert again.system_fingerprint == answer.system_fingerprint and again.id != answer.id


def test_what_was_not_computed_again(serve: Serve) -> None:
    with serve(parallel=1) as served:
        usages = [served.openai.chat.completions.create(**CHAT).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached == [0, usages[0].prompt_tokens - 1]


def test_a_chat_piece_by_piece(served: Running) -> None:
    whole = served.openai.chat.completions.create(**CHAT)
    chunks = list(served.openai.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 4
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_without_usage_the_last_chunk_has_the_finish_reason(served: Running) -> None:
    chunks = list(served.openai.chat.completions.create(**CHAT, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage is None


def test_options_arrive(served: Running, tiny: Engine) -> None:
    """Each changes what is sampled with this seed; together they are those of the engine."""
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}
    answer = served.openai.chat.completions.create(
        **{**CHAT, "temperature": 1.2}, top_p=0.9, seed=7, stop=["."], extra_body=extra
    )
    expected = tiny.chat(
        PLAIN,
        max_new_tokens=12,
        temperature=1.2,
        top_p=0.9,
        top_k=40,
        min_p=0.01,
        repetition_penalty=1.3,
        seed=7,
        stop=["."],
    )
    assert answer.choices[0].message.content == expected.text


def test_several_choices_have_seeds_that_follow(served: Running, tiny: Engine) -> None:
    sampled = {**CHAT, "temperature": 1.0, "seed": 5, "n": 3}
    answer = served.openai.chat.completions.create(**sampled)
    expected = [tiny.chat(PLAIN, max_new_tokens=12, temperature=1.0, top_p=1.0, seed=seed).text for seed in (5, 6, 7)]
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens == 36
    texts = ["", "", ""]
    for chunk in served.openai.chat.completions.create(**sampled, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_a_negative_seed_is_one(served: Running) -> None:
    texts = [
        served.openai.chat.completions.create(**{**CHAT, "temperature": 1.0}, seed=-1).choices[0].message.content
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_without_a_limit_an_answer_fills_the_context(served: Running, tiny: Engine) -> None:
    answer = served.openai.chat.completions.create(model="meki-tiny", messages=MESSAGES, temperature=0)
    assert answer.usage is not None
    assert answer.choices[0].finish_reason == "stop" or answer.usage.total_tokens >= tiny.context


def test_json(served: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer = served.openai.chat.completions.create(
        **{**CHAT, "max_tokens": 60},
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "") in ({"a": 1}, {"a": 2})
    assert answer.choices[0].finish_reason == "stop"
    answer = served.openai.chat.completions.create(**{**CHAT, "max_tokens": 1}, response_format={"type": "json_object"})
    assert (answer.choices[0].message.content or "").lstrip()[:1] in ("", "{")


def test_a_schema_that_cannot_be_used(served: Running) -> None:
    wrong = {"type": "object", "properties": {"a": {"pattern": "(?=x)y", "type": "string"}}}
    with pytest.raises(openai.BadRequestError, match="json_schema cannot be used"):
        served.openai.chat.completions.create(
            **CHAT, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": wrong}}
        )


PROMPTS: list[Any] = ["Once upon a time", ["The fox said", "Once upon a time"]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions(served: Running, tiny: Engine, prompt: Any) -> None:
    answer = served.openai.completions.create(model="meki-tiny", prompt=prompt, max_tokens=8, temperature=0)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    expected = [tiny.generate(text, max_new_tokens=8, temperature=0).text for text in prompts]
    assert [choice.text for choice in answer.choices] == expected
    ids = [tiny.tokenizer.encode(text).ids for text in prompts]
    same = served.openai.completions.create(
        model="meki-tiny", prompt=ids if len(ids) > 1 else ids[0], max_tokens=8, temperature=0
    )
    assert [choice.text for choice in same.choices] == expected
    assert same.usage is not None and same.usage.prompt_tokens == sum(map(len, ids))


def test_completions_piece_by_piece(served: Running, tiny: Engine) -> None:
    texts, reasons = ["", ""], {}
    for chunk in served.openai.completions.create(
        model="meki-tiny", prompt=["The fox said", "The cat"], max_tokens=8, temperature=0, stream=True
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [tiny.generate(text, max_new_tokens=8, temperature=0).text for text in ("The fox said", "The cat")]
    assert reasons == {0: "length", 1: "length"}


def test_completions_have_openais_default_length(served: Running) -> None:
    answer = served.openai.completions.create(model="meki-tiny", prompt="Once upon", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_models(served: Running) -> None:
    assert [model.id for model in served.openai.models.list()] == ["meki-tiny"]
    assert served.openai.models.retrieve("meki-tiny").owned_by == "meki"
    with pytest.raises(openai.NotFoundError) as error:
        served.openai.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_several_at_once(served: Running, tiny: Engine) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(client.chat.completions.create(**CHAT, stop=[str(i)]) for i in range(8)))
        return [answer.choices[0].message.content for answer in answers]

    expected = [tiny.chat(PLAIN, max_new_tokens=12, temperature=0, stop=[str(i)]).text for i in range(8)]
    assert asyncio.run(ask()) == expected


def test_a_client_that_leaves_ends_the_generation(served: Running) -> None:
    with served.openai.chat.completions.create(model="meki-tiny", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    served.wait_until_idle()

    async def give_up() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            task = asyncio.create_task(client.chat.completions.create(model="meki-tiny", messages=MESSAGES))
            while not served.runner.running:
                await asyncio.sleep(0.001)
            task.cancel()

    asyncio.run(give_up())
    served.wait_until_idle()


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "other"}, "model_not_found", "model"),
        ({"n": 17}, None, "n"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "invalid_value", None),
        ({"messages": [{"role": "user", "content": "fox " * 1000}]}, "context_length_exceeded", "messages"),
        ({"stop": ["", "a"]}, "invalid_value", None),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"extra_body": {"unheard_of": 1}}, "unknown_parameter", "unheard_of"),
        ({"extra_body": {"chat_template_kwargs": {"unheard_of": 1}}}, "invalid_value", None),
    ],
)
def test_what_is_refused(served: Running, change: dict[str, Any], code: str | None, param: str | None) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        served.openai.chat.completions.create(**{**CHAT, **change})
    assert error.value.status_code == (404 if code == "model_not_found" else 400)
    assert (error.value.code, error.value.param) == (code, param)
    assert str(served.runner.engine.path) not in str(error.value)


def test_images_are_refused(served: Running) -> None:
    content: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    with pytest.raises(openai.BadRequestError, match="the model takes text alone"):
        served.openai.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize("change", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"prompt": [10**6]}])
def test_what_completions_refuse(served: Running, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        served.openai.completions.create(**{"model": "meki-tiny", "prompt": "x", **change})
    assert error.value.param == next(iter(change))


def test_what_openai_ignores_is_ignored(served: Running) -> None:
    ignored = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s"}
    assert served.openai.chat.completions.create(**CHAT, **ignored).choices
