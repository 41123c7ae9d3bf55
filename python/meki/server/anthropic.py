"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response

from ..options import ChatOptions
from ..requests import Requests
from .anthropic_stream import MessageWriter
from .body import Body, absent, of_type
from .conversation import Conversation, thinking_variables
from .endpoint import Call, Endpoint
from .errors import engine_errors
from .openai import sampling
from .state import Model
from .writer import written

PATH = "/v1/messages"
_TEXT_ALONE = 'the model takes text alone, as {"type": "text", "text": ...}'
_CUSTOM_ALONE = "the server runs no tools of its own; give tools of the type custom"


class Block(Body):
    cache_control: Annotated[
        dict[str, Any] | None, Field(description="Means nothing here: what can be kept of a prompt is kept anyway")
    ] = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


TextOnly = Annotated[TextBlock, of_type("text", why=_TEXT_ALONE)]


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextOnly] | None = None
    is_error: bool | None = None
    toolset_name: str | None = None


UserBlock = Annotated[
    Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")],
    of_type("text", "tool_result", why=_TEXT_ALONE),
]
AssistantBlock = Annotated[
    Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")],
    of_type("text", "thinking", "redacted_thinking", "tool_use", why=_TEXT_ALONE),
]


class UserMessage(Body):
    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemMessage(Body):
    role: Literal["system"]
    content: str | list[TextOnly]


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class Tool(Block):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    # Of tools that are searched for or run elsewhere, and of how calls are sent; ignored.
    strict: bool | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[str] | None = None
    input_examples: list[dict[str, Any]] | None = None

    def function(self) -> dict[str, Any]:
        """In OpenAI's form."""
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.input_schema}


class ToolChoice(Body):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonOfSchema(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOfSchema | None = None
    task_budget: dict[str, Any] | None = None


class CountBody(Body):
    """What makes the prompt."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextOnly] | None = None
    tools: list[Annotated[Tool, of_type("custom", default="custom", why=_CUSTOM_ALONE)]] | None = None
    tool_choice: Annotated[ToolChoice | ToolChoiceTool, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # What this server cannot do, at the values that ask for nothing.
    container: Annotated[None, absent("this server runs no code")] = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    # Of accounts, routing and Anthropic's own cache, which there are none of here: ignored.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    inference_geo: str | None = None
    service_tier: str | None = None
    speed: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """As chat templates know it."""
        conversation = Conversation()
        if self.system:
            conversation.say("system", _text_of(self.system))
        for message in self.messages:
            if isinstance(message.content, str):
                conversation.say(message.role, message.content)
                continue
            for block in message.content:
                match block:
                    case TextBlock():
                        conversation.say(message.role, block.text)
                    case ThinkingBlock():
                        conversation.think(block.thinking)
                    case ToolUseBlock():
                        conversation.call(block.id, block.name, block.input)
                    case ToolResultBlock():
                        text = _text_of(block.content or "")
                        conversation.result(block.tool_use_id, f"Error: {text}" if block.is_error else text)
        return conversation.finished()

    def prompt_options(self, model: Model, messages: list[dict[str, Any]]) -> ChatOptions:
        """What of the options changes the prompt."""
        options = ChatOptions()
        if self.tools:
            options["tools"] = [{"type": "function", "function": tool.function()} for tool in self.tools]
        if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            options["continue_final_message"] = True
        if self.tool_choice and self.tool_choice.type == "none":
            options["tool_choice"] = "none"
        thinking = _THINKS.get(self.thinking.type) if self.thinking else None
        if variables := thinking_variables(model, thinking):
            options["chat_template_kwargs"] = variables
        return options


class MessagesBody(CountBody):
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    def options(self, model: Model, messages: list[dict[str, Any]]) -> ChatOptions:
        options: ChatOptions = {
            **self.prompt_options(model, messages),
            **sampling(model, self.temperature, self.top_p),
            "max_new_tokens": self.max_tokens,
        }
        if self.top_k is not None:
            options["top_k"] = self.top_k
        if self.stop_sequences:
            options["stop"] = self.stop_sequences
        if self.tool_choice and self.tool_choice.disable_parallel_tool_use:
            options["parallel_tool_calls"] = False
        if isinstance(self.tool_choice, ToolChoiceTool):
            options["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice and self.tool_choice.type == "any":
            options["tool_choice"] = "required"
        elif self.output_config and self.output_config.format:  # beside a call there is no text to have a format
            options["json_schema"] = self.output_config.format.schema_
        return options


_THINKS = {"enabled": True, "adaptive": True, "disabled": False}


async def messages(call: Call, body: MessagesBody) -> Response:
    """The answer to a conversation, in blocks."""
    model = call.server.model(body.model)
    conversation = body.conversation()
    options = body.options(model, conversation)
    request = await call.prepare(model, partial(Requests.chat, messages=conversation, **options))
    (generation,) = await call.start(model, [request])
    writer = MessageWriter(model.name, len(request.token_ids))
    return await written(call, writer, model, generation, stream=bool(body.stream))


async def count_tokens(call: Call, body: CountBody) -> Response:
    """The tokens of a conversation, as the model would be given it."""
    model = call.server.model(body.model)
    conversation = body.conversation()
    options = body.prompt_options(model, conversation)
    with engine_errors(model.engine):  # also what does not fit the context
        request = await asyncio.to_thread(model.engine.requests.chat, conversation, **options)
    return JSONResponse({"input_tokens": len(request.token_ids)})


def _text_of(content: str | list[TextOnly]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


ENDPOINTS = [
    Endpoint("POST", PATH, messages, MessagesBody),
    Endpoint("POST", f"{PATH}/count_tokens", count_tokens, CountBody),
]
