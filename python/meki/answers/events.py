"""The parts of an answer, in the order in which the model writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The model calls a function; its arguments follow."""

    index: int
    """Of the calls of this answer, from 0 on."""
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next piece of a call's arguments; all pieces together are a JSON object."""

    index: int
    text: str


AnswerEvent = Content | Reasoning | ToolCallStart | ToolCallArguments
