"""An engine for asyncio: many generations at once, none of which blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack

from .engine import Engine
from .generation import GenerationResult, TokenLogprobs
from .options import ChatOptions, GenerationOptions
from .requests import Request
from .scheduler import Event, Job, Piece, Scheduler


class AsyncEngine:
    """Generations of one engine, from one event loop. Options are those of `Engine.generate` and `Engine.chat`.

    It has a thread, and with it the engine's memory, until it is closed: `async with AsyncEngine(engine) as runner`.
    """

    def __init__(self, engine: Engine, *, parallel: int = 8, waiting: int = 64, context: int = 0) -> None:
        """parallel: generations that run at once, each with a KV cache of `context` tokens (0: the engine's, at most
        4096). waiting: generations that may wait for one of these; more raise QueueFullError."""
        self.engine = engine
        self._scheduler = Scheduler(
            lambda: engine.session(context=context), engine.prefix_cache, parallel=parallel, waiting=waiting
        )
        self._mail: _Mail | None = None

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Continues `prompt`."""
        return await self.stream(prompt, **options).finish()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> AsyncTextStream:
        """The same, piece by piece."""
        return self._stream(lambda: self.engine.requests.text(prompt, first=True, whole=True, **options))

    def run(self, request: Request) -> AsyncTextStream:
        """What `request`, one of `engine.requests`, asks for, piece by piece."""
        return self._stream(lambda: request)

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> GenerationResult:
        """The model's answer to a conversation."""
        return await self.stream_chat(messages, **options).finish()

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> AsyncTextStream:
        """The same, piece by piece."""
        return self._stream(lambda: self.engine.requests.chat(messages, **options))

    def _stream(self, make_request: Callable[[], Request]) -> AsyncTextStream:
        return AsyncTextStream(self._scheduler, self._open_mail, make_request)

    def _open_mail(self) -> _Mail:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = _Mail(loop)
        return self._mail

    @property
    def waiting(self) -> int:
        """Generations that wait, now."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Generations that run, now."""
        return self._scheduler.running

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what waits and runs."""
        await asyncio.to_thread(self._scheduler.close)


class _Mail:
    """Takes events from the scheduler's thread to their queues on an event loop, which is woken once for all that come
    together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._woken = False

    def send(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """From any thread."""
        self._waiting.append((queue, event))
        if self._woken:
            return
        self._woken = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before the queue is found to be empty, so that nothing stays in it
        while self._waiting:
            queue, event = self._waiting.popleft()
            queue.put_nowait(event)


class AsyncTextStream(AsyncIterator[str]):
    """The text of one generation, piece by piece. It begins with the first piece that is asked for; `aclose` ends it
    early. Errors are those of `Session.stream`, and QueueFullError."""

    def __init__(
        self, scheduler: Scheduler, open_mail: Callable[[], _Mail], make_request: Callable[[], Request]
    ) -> None:
        self._scheduler = scheduler
        self._open_mail = open_mail
        self._make_request = make_request
        self.request: Request | None = None
        """What is generated; None before it is asked for. `AnswerParser(request.answer)` tells the parts of an answer
        apart."""
        self.logprobs: list[TokenLogprobs] = []
        """Of the tokens of the pieces so far, at the end of all; none without the option `logprobs`."""
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job: Job | None = None
        self._over = False
        self._result: GenerationResult | None = None

    async def __anext__(self) -> str:
        if self._job is None:
            await self.start()
        if self._over:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Piece):
            self.logprobs += event.logprobs
            return event.text
        self._over = True
        self._events.put_nowait(event)  # for whoever waits, too: `aclose` beside an iteration
        if isinstance(event, Exception):
            raise event
        self._result = event
        self.logprobs += (event.logprobs or [])[len(self.logprobs) :]
        raise StopAsyncIteration

    @property
    def result(self) -> GenerationResult | None:
        """The final result; None before the end."""
        return self._result

    async def start(self) -> None:
        """Puts the generation into the queue. Raises what refuses it."""
        self.request = await asyncio.to_thread(self._make_request)  # a grammar may take seconds
        self._job = self._scheduler.submit(self.request, partial(self._open_mail().send, self._events))

    async def finish(self) -> GenerationResult:
        """Generates what is left."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        assert self._result is not None
        return self._result

    async def aclose(self) -> None:
        """Ends the generation where it stands, if it is not over, and waits until its session is free: for the token at
        hand. `result` is what there was so far; None if the generation had not begun."""
        if self._job is None or self._over:
            return
        self._scheduler.cancel(self._job)
        with contextlib.suppress(Exception):  # which nobody has asked for any more
            while True:
                await anext(self)
