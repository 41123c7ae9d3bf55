"""Where a reader of an answer takes its characters from, and puts what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

from .events import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart

T = TypeVar("T")
Reading = Generator[None, str, T]
"""Is sent an answer's characters one at a time, "" at its end, and returns what it read: so nothing can depend on how
the text was cut into pieces."""
PATIENCE = 100_000
"""Characters of an answer that are read again: one that begins call after call and ends none would take for ever."""
TextEvent = type[Content] | type[Reasoning]


class MalformedCallError(Exception):
    """What looked like a tool call is none."""


class Parts:
    """The parts of one answer. Spaces between a part and a marker belong to neither."""

    def __init__(self) -> None:
        self.index = -1
        """Of the last call."""
        self.fresh = True
        """Nothing but spaces was written since the beginning of the answer, or the last marker."""
        self._after_marker = False
        self._spaces = ""
        self._unsettled: list[str] = []  # read, and not yet part of an event
        self._patience = PATIENCE
        self._again: list[str] = []  # to be read once more, the next at the end
        self._events: list[AnswerEvent] = []
        self._make: Callable[[str], AnswerEvent] = Content  # of the text that the next event will have
        self._text: list[str] = []

    def read(self) -> Reading[str]:
        """The next character; "" at the end, and ever after."""
        char = self._again.pop() if self._again else (yield)
        self._unsettled.append(char)
        return char

    def read_behind_spaces(self, more: str = "") -> Reading[str]:
        """The next character that is no space and none of `more`."""
        char = yield from self.read()
        while char and (char.isspace() or char in more):
            char = yield from self.read()
        return char

    def read_text(self, text: str) -> Reading[None]:
        """MalformedCallError if something else follows."""
        for expected in text:
            if (yield from self.read()) != expected:
                raise MalformedCallError

    def settle(self) -> None:
        """What was read is accounted for."""
        self._unsettled.clear()

    @property
    def over(self) -> bool:
        """Whether the end was read."""
        return "" in self._unsettled[-1:]

    @property
    def unsettled(self) -> str:
        """What was read and is not accounted for."""
        return "".join(self._unsettled)

    def read_again(self) -> None:
        """Lets all be read again that is not accounted for; in an answer that had too much of that, writes it down."""
        self._patience -= len(self._unsettled)
        if self._patience >= 0:
            self._again += [char for char in reversed(self._unsettled) if char]
        elif self.unsettled:
            self.write(Content, self.unsettled)
        self.settle()

    def write(self, make: TextEvent, text: str) -> None:
        """A character, or a marker that is none, of a part of this kind."""
        if text.isspace():
            if not (self.fresh and self._after_marker):
                self._spaces += text
            return
        self._add(make, self._spaces + text)
        self._spaces, self.fresh = "", False

    def mark(self) -> None:
        """A marker was read."""
        self.settle()
        self._spaces, self.fresh, self._after_marker = "", True, True

    def end(self) -> None:
        """The answer is over: spaces at the end of a text belong to it."""
        if self._spaces:
            self._add(Content, self._spaces)

    def call(self, name: str) -> None:
        self.mark()
        self._flush()
        self.index += 1
        self._events.append(ToolCallStart(self.index, name))
        self._make = partial(ToolCallArguments, self.index)

    def arguments(self, text: str) -> None:
        """Of the last call."""
        self.settle()
        self._text.append(text)

    def take(self) -> list[AnswerEvent]:
        """What was written since the last time."""
        self._flush()
        events, self._events = self._events, []
        return events

    def _add(self, make: Callable[[str], AnswerEvent], text: str) -> None:
        if make is not self._make:
            self._flush()
            self._make = make
        self._text.append(text)

    def _flush(self) -> None:
        if self._text:
            self._events.append(self._make("".join(self._text)))
            self._text.clear()
