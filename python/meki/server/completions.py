"""OpenAI's older /v1/completions: texts that are continued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response

from ..generation import GenerationResult
from ..options import MOST_LOGPROBS
from ..requests import Request
from .endpoint import Call, Endpoint
from .errors import ApiError, error_body
from .generation import Generation
from .logprobs import CompletionLogprobs
from .merge import merged
from .openai import FINISH_REASONS, GenerationBody, new_id, usage
from .sse import EventStream, event
from .state import Model

PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionBody(GenerationBody):
    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    # What this server cannot do, at the values that ask for nothing.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if one else list(prompt)


async def completions(call: Call, body: CompletionBody) -> Response:
    """What continues a text."""
    model = call.server.model(body.model)
    prompts, choices, most = body.prompts(), body.n or 1, call.server.settings.choices
    if len(prompts) * choices > most:
        raise ApiError(
            400, f"{len(prompts)} prompts with n {choices}: this server gives at most {most} choices", param="prompt"
        )
    requests = [await _prepare(call, model, body, prompt, choice) for prompt in prompts for choice in range(choices)]
    generations = await call.start(model, requests)
    head = {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }
    if body.stream:
        chunks = _chunks(head, generations, choices, body)
        return EventStream(chunks, lambda error: event(error_body(PATH, error)))
    results = await asyncio.gather(*(generation.finish() for generation in generations))
    answers = [_choice(index, result) for index, result in enumerate(results)]
    return JSONResponse({**head, "choices": answers, "usage": usage(results, choices)})


async def _prepare(call: Call, model: Model, body: CompletionBody, prompt: str | list[int], choice: int) -> Request:
    vocab_size = model.engine.vocab_size
    if not isinstance(prompt, str) and not all(0 <= token_id < vocab_size for token_id in prompt):
        raise ApiError(400, f"a token id of the prompt is not from 0 to {vocab_size - 1}", param="prompt")
    options = body.options(model, choice)
    options["max_new_tokens"] = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    options["logprobs"] = body.logprobs
    return await call.prepare(
        model, lambda requests: requests.text(prompt, first=True, whole=True, **options), param="prompt"
    )


async def _chunks(
    head: dict[str, Any], generations: Sequence[Generation], choices: int, body: CompletionBody
) -> AsyncGenerator[str, None]:
    if body.include_usage:
        head = {**head, "usage": None}
    async for index, choice in merged([_choice_parts(generation, body) for generation in generations]):
        yield event({**head, "choices": [{"index": index, **choice}]})
    if body.include_usage:
        results = [generation.result for generation in generations]
        yield event({**head, "choices": [], "usage": usage(results, choices)})
    yield "data: [DONE]\n\n"


async def _choice_parts(generation: Generation, body: CompletionBody) -> AsyncIterator[dict[str, Any]]:
    """What the chunks have of one choice."""
    logprobs = CompletionLogprobs()

    def part(text: str, reason: str | None = None) -> dict[str, Any]:
        tokens = None if body.logprobs is None else logprobs.take(generation.take_logprobs())
        return {"text": text, "logprobs": tokens, "finish_reason": reason}

    async for piece in generation:
        yield part(piece)
    yield part("", FINISH_REASONS[generation.result.finish_reason or "stop"])


def _choice(index: int, result: GenerationResult) -> dict[str, Any]:
    logprobs = None if result.logprobs is None else CompletionLogprobs().take(result.logprobs)
    reason = FINISH_REASONS[result.finish_reason or "stop"]
    return {"index": index, "text": result.text, "logprobs": logprobs, "finish_reason": reason}


ENDPOINTS = [Endpoint("POST", PATH, completions, CompletionBody)]
