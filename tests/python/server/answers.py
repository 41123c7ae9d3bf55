"""Answers that no model gave, for what writes them down."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hypothesis import strategies as st

from meki.answers import AnswerEvent, Content, Reasoning, ToolCallArguments, ToolCallStart
from meki.generation import GenerationResult, GenerationStats
from meki.server.writer import AnswerWriter, Event


def a_result(finish_reason: str, stop: str | None = None) -> GenerationResult:
    """With a prompt of 10 tokens, 4 of them cached, and an answer of 7."""
    stats: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(GenerationStats)}
    stats.update(prompt_tokens=10, cached_tokens=4, new_tokens=7)
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(GenerationResult)}
    values.update(finish_reason=finish_reason, stop=stop, stats=GenerationStats(**stats))
    return GenerationResult(**values)


def _cut(text: str, at: int) -> list[str]:
    return [piece for piece in (text[:at], text[at:]) if piece]


@st.composite
def answers(draw: st.DrawFn) -> list[AnswerEvent]:
    """The parts of an answer in any order; the arguments of its last call may break off."""
    parts: list[AnswerEvent] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from((Content, Reasoning, ToolCallStart)), max_size=6)):
        if kind is not ToolCallStart:
            parts += [kind(text) for text in draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3))]
            continue
        arguments = json.dumps(draw(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3))))
        parts.append(ToolCallStart(calls, draw(st.text(min_size=1, max_size=5))))
        parts += [ToolCallArguments(calls, piece) for piece in _cut(arguments, draw(st.integers(0, len(arguments))))]
        calls += 1
    if parts and isinstance(parts[-1], ToolCallArguments) and draw(st.booleans()):
        parts.pop()
    return parts


def write(writer: AnswerWriter, parts: list[AnswerEvent], result: GenerationResult) -> list[Event]:
    """All events, as a client would see them."""
    events = writer.begin()
    for part in parts:
        events += writer.push(part)
    events += writer.end(result, 3)
    parsed: list[Event] = json.loads(json.dumps(events))
    return parsed


def runs(parts: list[AnswerEvent]) -> list[tuple[str, str]]:
    """What the parts are, neighbours of a kind taken together: ("content" or "reasoning", text), (name, arguments)."""
    found: list[tuple[str, str]] = []
    last: object = None
    for part in parts:
        if isinstance(part, ToolCallStart):
            found.append((f"call {part.name}", ""))
        else:
            kind = type(part)
            if not isinstance(part, ToolCallArguments) and kind is not last:
                found.append((kind.__name__.lower(), ""))
            found[-1] = (found[-1][0], found[-1][1] + part.text)
        last = type(part)
    return found
