"""meki-run --interactive: turns on one session, or a conversation with --chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Unpack

from ..engine import Session
from ..generation import TextStream
from ..options import GenerationOptions
from .errors import report

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (gives input() line editing and history)


class Conversation:
    """A chat with the face of a `Session`: a turn is a user's message, the text its answer.

    What an interrupted answer has said stays in the conversation; a message without one word of an answer is taken
    back. When the conversation outgrows the context, it begins anew with the message at hand, and `note` is told.
    """

    def __init__(self, session: Session, system: str | None, note: Callable[[str], None]) -> None:
        self._session = session
        self._note = note
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = self._opening
        self._answer: TextStream | None = None  # to the last of the messages

    @property
    def tokens(self) -> list[int]:
        return self._session.tokens

    @property
    def context(self) -> int:
        return self._session.context

    def stream(self, turn: str, **options: Unpack[GenerationOptions]) -> TextStream:
        """The answer to a message. ValueError as of `Session.stream_chat`; the conversation is then as before."""
        message = {"role": "user", "content": turn}
        earlier = self._so_far()
        try:
            messages = [*earlier, message]
            answer = self._session.stream_chat(messages, **options)
        except ValueError as error:
            if earlier == self._opening:
                raise
            messages = [*self._opening, message]
            answer = self._session.stream_chat(messages, **options)
            self._note(f"{error}; a new conversation begins here")
        self._messages, self._answer = messages, answer
        return answer

    def _so_far(self) -> list[dict[str, str]]:
        if self._answer is None:
            return self._messages
        answer = self._answer.result
        if not answer.text and answer.finish_reason is None:
            return self._messages[:-1]
        return [*self._messages, {"role": "assistant", "content": answer.text}]


def converse(
    begin: Callable[[], Session | Conversation],
    options: GenerationOptions,
    show: Callable[[TextStream], None],
    program: str,
) -> None:
    """A line of input is a turn, until the end of input. The text goes on in one session; once its context is full, a
    new one begins. Ctrl-C ends a turn, not the session. In a conversation an empty line is nothing."""
    session = begin()
    chat = isinstance(session, Conversation)
    while True:
        try:
            turn = input("> " if sys.stdin.isatty() else "")
            if chat and not turn.strip():
                continue
            full = _take_turn(session, turn, options, show, program)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)
            full = False
        if full:
            what = "message starts a new conversation" if chat else "turn starts a new session"
            report(program, "note", f"the context of {session.context} tokens is full; the next {what}")
            del session  # its cache goes before the new one comes
            session = begin()


def _take_turn(
    session: Session | Conversation,
    turn: str,
    options: GenerationOptions,
    show: Callable[[TextStream], None],
    program: str,
) -> bool:
    """Generates after one line of input. True if the session can take no more."""
    try:
        stream = session.stream(turn, **options)
    except ValueError as error:
        if not session.tokens:
            raise  # not for want of room: an option out of range, or a turn that no session can take
        report(program, "error", error)
        return len(session.tokens) >= session.context
    show(stream)
    return stream.result.finish_reason == "context"
