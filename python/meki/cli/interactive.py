"""meki-run --interactive: turns on one session."""

from __future__ import annotations

import contextlib
import sys

from ..engine import Engine, Session
from ..generation import GenerationOptions
from .errors import report
from .output import print_stats, print_stream

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (gives input() line editing and history)


def converse(
    engine: Engine, options: GenerationOptions, *, context: int, prefetch: bool, show_stats: bool, program: str
) -> None:
    """A line of input is a turn, until the end of input. The text goes on in one session; once its context is full, a
    new one begins. Ctrl-C ends a turn, not the session."""

    def begin() -> Session:
        return engine.session(context=context, prefetch=prefetch)

    session = begin()
    while True:
        try:
            turn = input("> " if sys.stdin.isatty() else "")
            full = _take_turn(engine, session, turn, options, show_stats=show_stats, program=program)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)
            full = False
        if full:
            report(
                program, "note", f"the context of {session.context} tokens is full; the next turn starts a new session"
            )
            session = begin()


def _take_turn(
    engine: Engine, session: Session, turn: str, options: GenerationOptions, *, show_stats: bool, program: str
) -> bool:
    """Generates after one line of input. True if the session can take no more."""
    try:
        stream = session.stream(turn, **options)
    except ValueError as error:
        if not session.tokens:
            raise  # not for want of room: an option out of range, or a turn that no session can take
        report(program, "error", error)
        return len(session.tokens) >= session.context
    print_stream(stream)
    if show_stats:
        print_stats(engine, stream.result.stats)
    return stream.result.finish_reason == "context"
