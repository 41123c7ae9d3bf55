"""OpenAI's /v1/responses, of which nothing is kept: every request has the whole conversation."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import Response

from ..options import MOST_LOGPROBS, ChatOptions
from ..requests import Requests
from .body import Body, absent, of_type
from .chat_completions import AnyJson, AnyText
from .conversation import Conversation, thinking_variables
from .endpoint import Call, Endpoint
from .errors import ApiError
from .openai import StreamOptions, sampling
from .responses_stream import ResponseWriter
from .responses_tools import Functions, Tool
from .state import Model
from .writer import written

PATH = "/v1/responses"
_STATELESS = "this server keeps no responses; send the whole conversation as `input`"
_TEXT_ALONE = "the model takes text alone, as input_text"
Status = Literal["in_progress", "completed", "incomplete"]
ItemId = Annotated[str | None, Field(description="Means nothing here")]


class InputText(Body):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class OutputText(Body):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Body):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


ContentPart = Annotated[
    Annotated[InputText | OutputText | Refusal, Field(discriminator="type")],
    of_type("input_text", "output_text", "refusal", why=_TEXT_ALONE),
]


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]
    id: ItemId = None
    status: Status | None = None
    phase: str | None = None


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: ItemId = None
    status: Status | None = None
    caller: dict[str, Any] | None = None
    namespace: str | None = None
    async_: Annotated[bool | None, Field(alias="async")] = None


class FunctionCallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]
    id: ItemId = None
    status: Status | None = None
    caller: dict[str, Any] | None = None
    name: str | None = None
    namespace: str | None = None


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None
    id: ItemId = None
    status: Status | None = None


Item = Annotated[
    Annotated[
        MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem,
        Field(discriminator="type"),
    ],
    of_type(
        *("message", "function_call", "function_call_output", "reasoning"),
        default="message",
        why="this server keeps no items and runs no tools; give messages, function calls with their outputs, reasoning",
    ),
]


class NamedFunction(Body):
    type: Literal["function"]
    name: str


class JsonOfSchema(Body):
    type: Literal["json_schema"]
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    format: Annotated[AnyText | AnyJson | JsonOfSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None


class ResponsesBody(Body):
    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    # What this server cannot do, at the values that ask for nothing.
    previous_response_id: Annotated[None, absent(_STATELESS)] = None
    conversation: Annotated[None, absent(_STATELESS)] = None
    prompt: Annotated[None, absent("this server keeps no prompts; send the text itself")] = None
    context_management: Annotated[None, absent("this server leaves nothing out of a conversation")] = None
    moderation: Annotated[None, absent("this server moderates nothing")] = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    # The first asks for log-probabilities; the others are of things that there are none of here, and are ignored.
    include: (
        list[
            Literal[
                "message.output_text.logprobs",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
                "reasoning.encrypted_content",
            ]
        ]
        | None
    ) = None
    # Of accounts, storage and routing, or that change no text: ignored.
    store: bool | None = None
    max_tool_calls: int | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None  # of Codex

    @property
    def logprobs(self) -> bool:
        """Whether they are wanted."""
        return "message.output_text.logprobs" in (self.include or ())

    @cached_property
    def functions(self) -> Functions:
        """Those of its tools."""
        return Functions(self.tools or ())

    def messages(self) -> list[dict[str, Any]]:
        """As chat templates know them."""
        conversation, functions = Conversation(), self.functions
        if self.instructions:
            conversation.say("system", self.instructions)
        if isinstance(self.input, str):
            conversation.say("user", self.input)
            return conversation.finished()
        for item in self.input:
            if isinstance(item, MessageItem):
                role = "system" if item.role == "developer" else item.role
                conversation.say(role, _text_of(item.content))
            elif isinstance(item, FunctionCallItem):
                conversation.call(item.call_id, functions.full_name(item.name, item.namespace), item.arguments)
            elif isinstance(item, FunctionCallOutputItem):
                conversation.result(item.call_id, _text_of(item.output))
            else:
                for part in item.content or ():
                    conversation.think(part.text)
        return conversation.finished()

    def options(self, model: Model) -> ChatOptions:
        # max_new_tokens None: until the context is full.
        options: ChatOptions = {
            **sampling(model, self.temperature, self.top_p),
            "max_new_tokens": self.max_output_tokens,
        }
        must_call = self.tool_choice not in (None, "none", "auto")  # then there is no text to have a format
        form = self.text.format if self.text and not must_call else None
        if isinstance(form, AnyJson):
            options["json_schema"] = True
        elif isinstance(form, JsonOfSchema):
            options["json_schema"] = form.schema_
        if functions := self.functions.described():
            options["tools"] = functions
        if isinstance(self.tool_choice, NamedFunction):
            options["tool_choice"] = {
                "type": "function",
                "function": {"name": self.functions.full_name(self.tool_choice.name)},
            }
        elif self.tool_choice is not None:
            options["tool_choice"] = self.tool_choice
        if self.parallel_tool_calls is False:
            options["parallel_tool_calls"] = False
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        effort = self.reasoning.effort if self.reasoning else None
        if variables := thinking_variables(model, None if effort is None else effort != "none"):
            options["chat_template_kwargs"] = variables
        return options

    def echo(self, options: ChatOptions) -> dict[str, Any]:
        """What a response says of its request."""
        choice = self.tool_choice or "auto"
        reasoning, text = self.reasoning or ReasoningConfig(), self.text or TextConfig()
        form = text.format or AnyText(type="text")
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": options["temperature"],
            "text": {"format": form.model_dump(by_alias=True), "verbosity": text.verbosity or "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": self.functions.echo(),
            "top_logprobs": self.top_logprobs or 0,
            "top_p": options["top_p"],
            "truncation": "disabled",
            "user": self.user,
        }


async def responses(call: Call, body: ResponsesBody) -> Response:
    """The answer to a conversation, in items."""
    if body.top_logprobs and not body.logprobs:
        why = "top_logprobs are of logprobs; include message.output_text.logprobs"
        raise ApiError(400, why, code="invalid_value", param="top_logprobs")
    model = call.server.model(body.model)
    options = body.options(model)
    request = await call.prepare(model, partial(Requests.chat, messages=body.messages(), **options), param="input")
    (generation,) = await call.start(model, [request])
    take_logprobs = generation.take_logprobs if body.logprobs else None
    writer = ResponseWriter({"model": model.name, **body.echo(options)}, body.functions, take_logprobs)
    return await written(call, writer, model, generation, stream=bool(body.stream))


def _text_of(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


ENDPOINTS = [Endpoint("POST", PATH, responses, ResponsesBody)]
