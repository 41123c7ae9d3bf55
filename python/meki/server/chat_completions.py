"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from ..answers import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart, new_call_id
from ..generation import GenerationResult
from ..options import MOST_LOGPROBS, ChatOptions
from ..requests import Requests
from .body import Body
from .endpoint import Call, Endpoint
from .errors import ApiError, error_body
from .generation import Generation, finish_all
from .logprobs import chat_logprobs
from .openai import FINISH_REASONS, GenerationBody, answer_head, choice_chunks, timings, usage
from .sse import EventStream, event
from .state import Model

PATH = "/v1/chat/completions"


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """The chat template sees further members, too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class AnyText(Body):
    type: Literal["text"]


class AnyJson(Body):
    type: Literal["json_object"]


class JsonOfSchema(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[AnyText | AnyJson | JsonOfSchema, Field(discriminator="type")]


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_options(self, model: Model, index: int) -> ChatOptions:
        most = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        # None: until the context is full.
        options: ChatOptions = {**self.options(model, index), "max_new_tokens": most}
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        must_call = self.tool_choice not in (None, "none", "auto")  # then there is no text to have a format
        if isinstance(self.response_format, AnyJson) and not must_call:
            options["json_schema"] = {"type": "object"}
        elif isinstance(self.response_format, JsonOfSchema) and not must_call:
            options["json_schema"] = self.response_format.json_schema.schema_ or True
        if self.tools:
            options["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if self.tool_choice is not None:
            choice = self.tool_choice
            options["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
        if self.parallel_tool_calls is False:
            options["parallel_tool_calls"] = False
        if self.chat_template_kwargs:
            options["chat_template_kwargs"] = self.chat_template_kwargs
        return options

    def chat_messages(self) -> list[dict[str, Any]]:
        """As chat templates know them, which call a developer a system."""
        messages = [message.model_dump(exclude_unset=True) for message in self.messages]
        return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]


async def chat_completions(call: Call, body: ChatBody) -> Response:
    """The answer to a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        why = "top_logprobs are of logprobs; set these to true"
        raise ApiError(400, why, code="invalid_value", param="top_logprobs")
    model = call.server.model(body.model)
    choices = body.n or 1
    if choices > call.server.settings.choices:
        raise ApiError(400, f"n is {choices}, this server gives at most {call.server.settings.choices}", param="n")
    messages = body.chat_messages()
    requests = []
    for choice in range(choices):
        options = body.chat_options(model, choice)
        requests.append(await call.prepare(model, partial(Requests.chat, messages=messages, **options)))
    generations = await call.start(model, requests)
    if body.stream:
        head = answer_head("chat.completion.chunk", "chatcmpl-", model)
        chunks = _chunks(head, generations, body)
        return EventStream(chunks, lambda error: event(error_body(PATH, error)), ping_s=call.server.settings.ping_s)
    head = answer_head("chat.completion", "chatcmpl-", model)
    results = await finish_all(generations)
    answers = [_choice(index, result) for index, result in enumerate(results)]
    return JSONResponse({**head, "choices": answers, "usage": usage(results, choices)})


def _choice(index: int, result: GenerationResult) -> dict[str, Any]:
    assert result.message is not None
    message = {**result.message, "refusal": None}
    reason = _finish_reason(result, "tool_calls" in message)
    logprobs = None if result.logprobs is None else chat_logprobs(result.logprobs)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _chunks(head: dict[str, Any], generations: Sequence[Generation], body: ChatBody) -> AsyncGenerator[str, None]:
    def last() -> dict[str, Any]:
        results = [generation.result for generation in generations]
        return {"usage": usage(results, len(results)), "meki": [timings(result) for result in results]}

    parts = [_choice_parts(generation, body) for generation in generations]
    return choice_chunks(head, parts, last if body.include_usage else None)


async def _choice_parts(generation: Generation, body: ChatBody) -> AsyncIterator[dict[str, Any]]:
    """What the chunks have of one choice: what each adds to its message, and at the end why it ends."""

    def part(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = chat_logprobs(generation.take_logprobs()) if body.logprobs else None
        return {"delta": delta, "logprobs": logprobs, "finish_reason": reason}

    yield part({"role": "assistant", "content": ""})
    calls = False
    async for found in generation.events():
        calls = calls or isinstance(found, ToolCallStart)
        yield part(_delta(found))
    yield part({}, _finish_reason(generation.result, calls))


def _delta(part: AnswerEvent) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, ToolCallArguments):
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    function = {"name": part.name, "arguments": ""}
    return {"tool_calls": [{"index": part.index, "id": new_call_id(), "type": "function", "function": function}]}


def _finish_reason(result: GenerationResult, calls: bool) -> str:
    reason = FINISH_REASONS[result.finish_reason or "stop"]
    return "tool_calls" if calls and reason == "stop" else reason


ENDPOINTS = [Endpoint("POST", PATH, chat_completions, ChatBody)]
