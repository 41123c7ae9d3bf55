"""meki-run --interactive: turns on one session, or a conversation with --chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Unpack

from ..engine import Session
from ..generation import TextStream
from ..options import GenerationOptions
from .arguments import text_of
from .errors import report

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 (gives input() line editing and history)


class Conversation:
    """A chat with the face of a `Session`: a turn is a user's message, the text its answer.

    What an interrupted answer has said stays in the conversation; a message without one word of an answer is taken
    back. When the conversation outgrows the context, it begins anew with the message at hand, and `note` is told.
    """

    def __init__(
        self,
        session: Session,
        system: str | None,
        note: Callable[[str], None],
        *,
        answer: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """answer: how every answer begins."""
        self._session = session
        self._note = note
        self._begun = answer
        self._variables = chat_template_kwargs
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
            answer = self._begin(messages, options)
        except ValueError as error:
            if earlier == self._opening:
                raise
            messages = [*self._opening, message]
            answer = self._begin(messages, options)
            self._note(f"{error}; a new conversation begins here")
        self._messages, self._answer = messages, answer
        return answer

    def _begin(self, messages: list[dict[str, str]], options: GenerationOptions) -> TextStream:
        begun = [] if self._begun is None else [{"role": "assistant", "content": self._begun}]
        return self._session.stream_chat(
            [*messages, *begun],
            chat_template_kwargs=self._variables,
            continue_final_message=bool(begun),
            **options,
        )

    def _so_far(self) -> list[dict[str, str]]:
        if self._answer is None:
            return self._messages
        answer = self._answer.result
        if not answer.text and answer.finish_reason is None:
            return self._messages[:-1]
        return [*self._messages, {"role": "assistant", "content": (self._begun or "") + answer.text}]


def converse(
    begin: Callable[[], Session | Conversation],
    options: GenerationOptions,
    show: Callable[[TextStream], None],
    program: str,
) -> None:
    """Takes turns (`_read_turn`) until the end of input. The text goes on in one session; once its context is full, a
    new one begins. Ctrl-C ends a turn, not the session. In a conversation an empty turn is nothing."""
    session = begin()
    chat = isinstance(session, Conversation)
    while True:
        try:
            turn = _read_turn()
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


_QUOTES = '"""'


def _read_turn() -> str:
    """A line, or what stands between three double quotes before a line and three after one. EOFError at the end of
    input, ValueError inside of quotes."""
    lines = [_read_line("> ")]
    if not lines[0].startswith(_QUOTES):
        return lines[0]
    lines[0] = lines[0].removeprefix(_QUOTES)
    while not lines[-1].endswith(_QUOTES):
        try:
            lines.append(_read_line("... "))
        except EOFError:
            raise ValueError(f"standard input: a turn begins with {_QUOTES}, but does not end with them") from None
    # Quotes on lines of their own are no lines of the turn.
    return "\n".join(lines).removesuffix(_QUOTES).removeprefix("\n").removesuffix("\n")


def _read_line(sign: str) -> str:
    if sys.stdin.isatty():
        return input(sign)
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    return text_of("standard input", data)


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
