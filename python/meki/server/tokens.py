"""/tokenize, /detokenize, and /health."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import Field
from starlette.responses import JSONResponse, Response

from .body import Body
from .endpoint import Call, Endpoint
from .errors import ApiError, engine_errors


class TokenizeBody(Body):
    model: str
    text: str
    special: bool = False
    """With the tokens that begin a sequence."""


class DetokenizeBody(Body):
    model: str
    tokens: Annotated[list[int], Field(max_length=1 << 20)]


async def tokenize(call: Call, body: TokenizeBody) -> Response:
    """The tokens of a text."""
    engine = call.server.model(body.model).engine
    with engine_errors(engine):
        encode = engine.requests.prompts.encode_text
        tokens = await asyncio.to_thread(encode, body.text, special=body.special)
    return JSONResponse({"tokens": tokens})


async def detokenize(call: Call, body: DetokenizeBody) -> Response:
    """The text of tokens."""
    engine = call.server.model(body.model).engine
    if not all(0 <= token_id < engine.vocab_size for token_id in body.tokens):
        raise ApiError(400, f"a token id is not from 0 to {engine.vocab_size - 1}", param="tokens")
    text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"text": text})


async def health(call: Call, _: None) -> Response:
    """Whether the server can generate: models are opened before it listens."""
    return JSONResponse({"status": "ok"})


ENDPOINTS = [
    Endpoint("POST", "/tokenize", tokenize, TokenizeBody),
    Endpoint("POST", "/detokenize", detokenize, DetokenizeBody),
    Endpoint("GET", "/health", health),
]
