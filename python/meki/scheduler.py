"""Many generations at once, on one thread: who waits, who runs, in which session."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .generation import GenerationResult, TextStream, TokenLogprobs, step_together
from .prefix_cache import PrefixCache
from .requests import Request
from .session import Session
from .session_pool import SessionPool


@dataclass(frozen=True)
class Piece:
    """What one step added to a generation's text."""

    text: str
    logprobs: Sequence[TokenLogprobs]
    """Of the tokens since the piece before; none without the option `logprobs`. Those behind the last piece are in the
    result alone."""


_PART = 64
"""Tokens of a prompt that are computed while other generations wait for their next token: some steps of these."""
_LONG_PART = 256
"""The same where none waits."""

Event = Piece | GenerationResult | Exception
"""What there is of a generation: a piece of its text, or its end, by a result or an error; nothing follows an end."""


class QueueFullError(RuntimeError):
    """As many generations wait as may."""


class GenerationCancelledError(RuntimeError):
    """A generation was cancelled before it began."""


class Job:
    """One generation, waiting or running."""

    def __init__(self, request: Request, deliver: Callable[[Event], None]) -> None:
        self.request = request
        self.deliver = deliver
        self.cancelled = False
        self.reads = True
        """Tokens of its prompt are to be computed, before there is anything to choose from."""
        self.told = 0
        """Tokens whose log-probabilities were delivered."""


class Scheduler:
    """Runs the generations of one engine, up to `parallel` at once. Thread-safe."""

    def __init__(
        self,
        make_session: Callable[[], Session],
        prefix_cache: PrefixCache,
        *,
        parallel: int = 8,
        waiting: int = 64,
    ) -> None:
        """prefix_cache: of the engine. parallel: sessions that run at once. waiting: generations that may wait for
        one."""
        self._make_session = make_session
        self._pool = SessionPool(prefix_cache, parallel)
        self._parallel = parallel
        self._most_waiting = waiting
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._process = os.getpid()
        self._running: list[tuple[Job, Session, TextStream]] = []  # of the thread alone
        self._thread = threading.Thread(target=self._run, name="meki-scheduler", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # Python would end the thread in the midst of a step, and the process with it

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Job:
        """Has `deliver` called with every event of a generation, on the scheduler's thread, which waits meanwhile.
        QueueFullError if too many wait, RuntimeError behind `close` and in a forked process."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the scheduler belongs to process {self._process}, which this one was forked from without its "
                "threads; open an engine here"
            )
        with self._condition:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            free = max(0, self._parallel - len(self._running))
            if len(self._waiting) >= self._most_waiting + free:
                raise QueueFullError(f"{len(self._waiting)} generations wait already; try again later")
            job = Job(request, deliver)
            self._waiting.append(job)
            self._condition.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a generation before its next token; its result is what there is so far. One that waits leaves the
        queue: its end is a GenerationCancelledError."""
        job.cancelled = True
        with self._condition:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            job.deliver(_cancelled())

    def close(self) -> None:
        """Cancels what waits and runs, and waits for the thread."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # where there is no thread, and its lock may be taken for ever
            return
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()
        for job in list(self._waiting):
            self.cancel(job)

    @property
    def waiting(self) -> int:
        """Generations that wait, now."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Generations that run, now."""
        return len(self._running)

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            while self._admit():
                self._round()
        except Exception as error:  # of no generation in particular: nobody is to wait for ever
            failure = error
        for job, _, stream in self._running:
            try:
                stream.close()
                job.deliver(failure or stream.result)
            except Exception as error:
                job.deliver(error)
        if failure:
            with self._condition:
                self._closed = True
                waiting = list(self._waiting)
                self._waiting.clear()
            for job in waiting:
                job.deliver(failure)

    def _round(self) -> None:
        """A part of a prompt, and a token of each generation whose prompt is read."""
        self._read()
        ready = [entry for entry in self._running if entry[0].cancelled or not entry[0].reads]
        with contextlib.suppress(Exception):  # which those that it concerns meet again
            step_together([stream for job, _, stream in ready if not job.cancelled])
        for entry in ready:
            self._advance(entry)

    def _admit(self) -> bool:
        """Starts what waits, as far as sessions are free, and waits for the first. False: the scheduler is closed."""
        with self._condition:
            while not (self._closed or self._waiting or self._running):
                self._condition.wait()
            if self._closed:
                return False
        later: list[Job] = []
        while len(self._running) < self._parallel and len(later) < self._parallel:  # it takes time to find out
            with self._condition:
                if not self._waiting:
                    break
                job = self._waiting.popleft()
            if not self._start(job):
                later.append(job)
        with self._condition:
            self._waiting.extendleft(reversed(later))
        return True

    def _start(self, job: Job) -> bool:
        """False: one that runs is about to compute the beginning of its prompt, which is worth the wait."""
        if job.cancelled:  # on its way from the queue
            job.deliver(_cancelled())
            return True
        session = None
        try:
            running = [session for _, session, _ in self._running]
            session = self._pool.take(job.request.token_ids, self._make_session, running)
            if session is None:
                return False
            self._running.append((job, session, session.run(job.request)))
        except Exception as error:
            if session is not None:
                self._pool.give(session)
            job.deliver(error)
        return True

    def _read(self) -> None:
        """Computes a part of the prompt that is the first of those to be read."""
        reading = [(job, stream) for job, _, stream in self._running if job.reads and not job.cancelled]
        if not reading:
            return
        job, stream = reading[0]
        try:
            job.reads = stream.read(_PART if len(reading) < len(self._running) else _LONG_PART)
        except Exception:  # `advance` meets it again
            job.reads = False

    def _advance(self, entry: tuple[Job, Session, TextStream]) -> None:
        job, session, stream = entry
        try:
            if job.cancelled:
                stream.close()
            elif piece := stream.advance():
                job.deliver(Piece(piece, stream.logprobs[job.told :]))
                job.told = len(stream.logprobs)
            if stream.over:
                job.deliver(stream.result)
        except Exception as error:
            stream.close()
            job.deliver(error)
        if not stream.over:
            return
        self._running.remove(entry)
        self._pool.give(session)


def _cancelled() -> GenerationCancelledError:
    return GenerationCancelledError("cancelled before it began")
