"""An answer written as typed events, or as the object that these add up to."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from ..answers import AnswerEvent, Reasoning
from ..generation import GenerationResult
from .endpoint import Call
from .errors import ApiError
from .generation import Generation
from .sse import EventStream, event
from .state import Model

Event = dict[str, Any]
"""What is sent of it; "type" is its name."""


class AnswerWriter(ABC):
    """Writes down one answer: `answer` is what there is so far, and every step returns the events that tell of it."""

    answer: dict[str, Any]

    @abstractmethod
    def begin(self) -> list[Event]:
        """Before the first part."""

    @abstractmethod
    def push(self, part: AnswerEvent) -> list[Event]:
        """The next part."""

    @abstractmethod
    def end(self, result: GenerationResult, thinking_tokens: int) -> list[Event]:
        """Behind the last part. thinking_tokens: those of the result's that were thoughts."""

    @abstractmethod
    def ping(self) -> Event:
        """What a stream has while nothing else comes."""

    @abstractmethod
    def fail(self, error: ApiError) -> Event:
        """In place of the end."""


async def written(call: Call, writer: AnswerWriter, model: Model, generation: Generation, *, stream: bool) -> Response:
    """The response to a call."""
    events = _events(writer, model, generation)
    if stream:
        ping_s = call.server.settings.ping_s
        return EventStream(
            _sent(events), lambda error: _text(writer.fail(error)), ping_s=ping_s, ping=lambda: _text(writer.ping())
        )
    async for _ in events:
        pass
    return JSONResponse(writer.answer)


async def _sent(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(events):
        async for data in events:
            yield _text(data)


async def _events(writer: AnswerWriter, model: Model, generation: Generation) -> AsyncGenerator[Event, None]:
    for data in writer.begin():
        yield data
    thoughts = ""
    async for part in generation.events():
        if isinstance(part, Reasoning):
            thoughts += part.text
        for data in writer.push(part):
            yield data
    # A token of the answer may be half of a thought: they are counted as the tokenizer would cut them.
    encode = model.engine.requests.prompts.encode_text
    thinking_tokens = len(await asyncio.to_thread(encode, thoughts, special=False)) if thoughts else 0
    result = generation.result
    for data in writer.end(result, min(thinking_tokens, result.stats.new_tokens)):
        yield data


def _text(data: Event) -> str:
    return event(data, data["type"])
