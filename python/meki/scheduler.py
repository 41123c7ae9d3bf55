"""Many generations at once, on one thread: who waits, who runs, in which session."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from .generation import GenerationResult, TextStream
from .requests import Request
from .session import Session, common_prefix

Event = str | GenerationResult | Exception
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


class Scheduler:
    """Runs the generations of one engine, up to `parallel` at once. Thread-safe."""

    def __init__(self, make_session: Callable[[], Session], *, parallel: int = 8, waiting: int = 64) -> None:
        """parallel: sessions that run at once. waiting: generations that may wait for one."""
        self._make_session = make_session
        self._parallel = parallel
        self._most_waiting = waiting
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._running: list[tuple[Job, Session, TextStream]] = []  # of the thread alone, as the next
        self._idle: list[Session] = []  # the last used at the end
        self._thread = threading.Thread(target=self._run, name="meki-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Job:
        """Has `deliver` called with every event of a generation, on the scheduler's thread, which waits meanwhile.
        QueueFullError if too many wait, RuntimeError behind `close`."""
        with self._condition:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            if len(self._waiting) >= self._most_waiting:
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
            job.deliver(GenerationCancelledError("cancelled before it began"))

    def close(self) -> None:
        """Cancels what waits and runs, and waits for the thread."""
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
        while self._admit():
            for entry in list(self._running):
                self._advance(entry)
        for job, _, stream in self._running:
            stream.close()
            job.deliver(stream.result)

    def _admit(self) -> bool:
        """Starts what waits, as far as sessions are free, and waits for the first. False: the scheduler is closed."""
        with self._condition:
            while not (self._closed or self._waiting or self._running):
                self._condition.wait()
            if self._closed:
                return False
            jobs = [
                self._waiting.popleft() for _ in range(min(self._parallel - len(self._running), len(self._waiting)))
            ]
        for job in jobs:
            self._start(job)
        return True

    def _start(self, job: Job) -> None:
        try:
            session = self._session_for(job.request.token_ids)
            self._running.append((job, session, session.run(job.request)))
        except Exception as error:
            job.deliver(error)

    def _session_for(self, token_ids: list[int]) -> Session:
        """The idle session that has the longest beginning of these tokens, or a new one."""
        if len(self._idle) + len(self._running) < self._parallel:
            return self._make_session()
        best = max(self._idle, key=lambda session: common_prefix(session.tokens, token_ids))
        self._idle.remove(best)
        return best

    def _advance(self, entry: tuple[Job, Session, TextStream]) -> None:
        job, session, stream = entry
        try:
            if job.cancelled:
                stream.close()
            elif piece := stream.advance():
                job.deliver(piece)
            if stream.over:
                job.deliver(stream.result)
        except Exception as error:
            job.deliver(error)
        else:
            if not stream.over:
                return
        self._running.remove(entry)
        self._idle.append(session)
