"""A generation as a protocol sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from ..answers import AnswerEvent, AnswerParser
from ..generation import GenerationResult, TokenLogprobs
from ..requests import Request
from .errors import engine_errors
from .state import Model, Server


class Generation(AsyncIterator[str]):
    """The pieces of one generation's text, counted. Errors are ApiErrors; a failure stays what it is."""

    def __init__(self, server: Server, model: Model, request: Request) -> None:
        self._request = request
        self._model = model
        self._metrics = server.metrics
        self._stream = model.runner.run(request)
        self._start_s = time.monotonic()
        self._begun = False
        self._taken = 0

    @property
    def result(self) -> GenerationResult:
        """The final result, once the text is over."""
        assert self._stream.result is not None
        return self._stream.result

    def take_logprobs(self) -> list[TokenLogprobs]:
        """Of the tokens of the pieces since the last call; once the text is over, of all that are left."""
        tokens = self._stream.logprobs[self._taken :]
        self._taken += len(tokens)
        return tokens

    async def start(self) -> None:
        with engine_errors(self._model.engine):
            await self._stream.start()

    async def __anext__(self) -> str:
        with engine_errors(self._model.engine):
            piece = await anext(self._stream)
        if not self._begun:
            self._begun = True
            self._metrics.first_token.observe(time.monotonic() - self._start_s)
        return piece

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """The parts of a chat's answer."""
        assert self._request.answer is not None
        parser = AnswerParser(self._request.answer)
        async for piece in self:
            for part in parser.push(piece):
                yield part
        for part in parser.finish():
            yield part

    async def finish(self) -> GenerationResult:
        """Waits for the result."""
        async for _ in self:
            pass
        return self.result

    async def close(self) -> None:
        """Ends it where it stands, if it is not over, and counts it."""
        await self._stream.aclose()
        if self._stream.result is not None:
            self._metrics.count(self._stream.result)


async def finish_all(generations: Sequence[Generation]) -> list[GenerationResult]:
    """Waits for all results. An error of one ends the others."""
    tasks = [asyncio.create_task(generation.finish()) for generation in generations]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
