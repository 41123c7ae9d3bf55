"""From the pieces of an answer's text to its parts."""

from __future__ import annotations

from collections.abc import Callable

from .events import AnswerEvent, Content, Reasoning, ToolCallStart
from .forms import AnswerForm
from .parts import MalformedCallError, Parts, Reading, TextEvent


class AnswerParser:
    """Reads one answer, however it is cut into pieces. For one thread at a time.

    Thoughts begin at the beginning of an answer, or behind other thoughts and calls; calls begin anywhere. Text is held
    back only while it may turn out to be a marker, or the spaces before one, and a call until its name and the
    beginning of its arguments are known. What is no call after all, or breaks off before that, is `Content`, markers
    too; of a call that breaks off later there are its arguments as far as they go.
    """

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self.over = False
        """The answer has all that it may have, and more was written: that is left out."""
        self._parts = Parts()
        self._reading = self._read()
        next(self._reading)

    def push(self, piece: str) -> list[AnswerEvent]:
        """The parts, or more of them, that are certain with the next piece."""
        for char in piece:
            self._reading.send(char)
        return self._take()

    def finish(self) -> list[AnswerEvent]:
        """What was held back, once no more can follow."""
        try:
            while True:  # what is no call is read again, up to the end
                self._reading.send("")
        except StopIteration:
            return self._take()

    def _take(self) -> list[AnswerEvent]:
        wanted: list[AnswerEvent] = []
        for part in self._parts.take():
            self.over = self.over or (self._form.one_call and isinstance(part, ToolCallStart) and part.index > 0)
            if not self.over:
                wanted.append(part)
        return wanted

    def _read(self) -> Reading[None]:
        parts, thinking, calls = self._parts, self._form.thinking, self._form.calls
        if self._form.thinks_first:
            yield from self._read_thoughts()
        while opener := (yield from self._read_until(Content, self._openers)):
            if thinking and opener == thinking[0]:
                yield from self._read_thoughts()
            elif calls:
                before = parts.index
                parts.settle()
                try:
                    yield from calls.read(parts, opener)
                except MalformedCallError:
                    if parts.index == before:
                        parts.write(Content, opener)
                    elif parts.over and calls.closer.startswith(parts.unsettled.strip("}];, \n")):
                        parts.settle()  # the end of a call, broken off
                    parts.read_again()
                else:
                    parts.mark()
        parts.end()

    def _openers(self) -> tuple[str, ...]:
        fresh = self._parts.fresh
        thinking = (self._form.thinking[0],) if self._form.thinking and fresh else ()
        return thinking + (self._form.calls.opens(fresh=fresh) if self._form.calls else ())

    def _read_thoughts(self) -> Reading[None]:
        assert self._form.thinking is not None
        closer = self._form.thinking[1]
        self._parts.mark()
        yield from self._read_until(Reasoning, lambda: (closer,))
        self._parts.mark()

    def _read_until(self, make: TextEvent, markers: Callable[[], tuple[str, ...]]) -> Reading[str]:
        """Writes down text up to one of the markers, which it returns; "" at the end."""
        held = ""
        while char := (yield from self._parts.read()):
            held += char
            while held and not any(marker.startswith(held) for marker in markers()):
                self._parts.write(make, held[0])
                held = held[1:]
            self._parts.settle()
            if held and held in markers():
                return held
        for char in held:
            self._parts.write(make, char)
        return ""
