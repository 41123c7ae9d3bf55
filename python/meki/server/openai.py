"""What OpenAI's endpoints have in common."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from ..generation import GenerationResult
from ..options import GenerationOptions
from .body import Body
from .merge import merged
from .sse import event
from .state import Model

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
"""OpenAI's words for those of GenerationResult."""

TIMINGS = (
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "stall_us_p50",
    "stall_us_p99",
    "rom_requests",
    "rom_hits",
)


TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
"""As a name in JSON."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # against eavesdroppers between the client and OpenAI; ignored


class GenerationBody(Body):
    """What both kinds of completions take."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not of OpenAI's API, but of llama.cpp's and vLLM's.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    # Of accounts, storage and routing, which there are none of here: ignored.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, model: Model, choice: int) -> GenerationOptions:
        """Of one generation. choice: of `n`, which must not be all the same where there is a seed."""
        options = sampling(model, self.temperature, self.top_p)
        if self.presence_penalty is not None:
            options["presence_penalty"] = self.presence_penalty
        if self.frequency_penalty is not None:
            options["frequency_penalty"] = self.frequency_penalty
        if self.logit_bias:
            options["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        if self.top_k is not None:
            options["top_k"] = max(0, self.top_k)
        if self.min_p is not None:
            options["min_p"] = self.min_p
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.seed is not None:
            options["seed"] = (self.seed + choice) % 2**64
        if stop := [self.stop] if isinstance(self.stop, str) else self.stop:
            options["stop"] = stop
        return options


def sampling(model: Model, temperature: float | None, top_p: float | None) -> GenerationOptions:
    """What a caller says comes first, then the package, then the APIs' own defaults."""
    own = model.engine.manifest["sampling"]
    return GenerationOptions(
        temperature=_first(temperature, own.get("temperature"), 1.0), top_p=_first(top_p, own.get("top_p"), 1.0)
    )


def answer_head(kind: str, prefix: str, model: Model) -> dict[str, Any]:
    """What an answer, or each chunk of it, begins with. kind: "object"; prefix: of its id."""
    return {
        "id": new_id(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


async def choice_chunks(
    head: dict[str, Any],
    choices: Sequence[AsyncIterator[dict[str, Any]]],
    last: Callable[[], dict[str, Any]] | None,
) -> AsyncGenerator[str, None]:
    """A stream of chunks. choices: the parts of each; last: makes what the chunk behind them has beside no choices,
    None: there is none."""
    if last is not None:
        head = {**head, "usage": None}
    async for index, part in merged(choices):
        yield event({**head, "choices": [{"index": index, **part}]})
    if last is not None:
        yield event({**head, "choices": [], **last()})
    yield "data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def usage(results: Sequence[GenerationResult], choices: int = 1) -> dict[str, Any]:
    """Tokens of all results. choices: of each prompt, which is counted once; its results follow each other."""
    prompts = [result.stats for result in results[::choices]]
    prompt_tokens = sum(stats.prompt_tokens for stats in prompts)
    new_tokens = sum(result.stats.new_tokens for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in prompts)},
    }


def timings(result: GenerationResult) -> dict[str, Any]:
    """What OpenAI's API does not tell: of one generation, the members of GenerationStats about time and the memory."""
    return {name: getattr(result.stats, name) for name in TIMINGS}


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
