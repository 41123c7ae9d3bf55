"""OpenAI's older /v1/completions: texts that are continued."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import JSONResponse, Response

from ..generation import GenerationResult
from ..options import MOST_LOGPROBS
from ..requests import Request
from .endpoint import Call, Endpoint
from .errors import ApiError, error_body
from .generation import Generation, finish_all
from .logprobs import CompletionLogprobs
from .openai import FINISH_REASONS, GenerationBody, answer_head, choice_chunks, usage
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
    head = answer_head("text_completion", "cmpl-", model)
    if body.stream:
        chunks = _chunks(head, generations, choices, body)
        return EventStream(chunks, lambda error: event(error_body(PATH, error)), ping_s=call.server.settings.ping_s)
    results = await finish_all(generations)
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


def _chunks(
    head: dict[str, Any], generations: Sequence[Generation], choices: int, body: CompletionBody
) -> AsyncGenerator[str, None]:
    def last() -> dict[str, Any]:
        return {"usage": usage([generation.result for generation in generations], choices)}

    parts = [_choice_parts(generation, body) for generation in generations]
    return choice_chunks(head, parts, last if body.include_usage else None)


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
