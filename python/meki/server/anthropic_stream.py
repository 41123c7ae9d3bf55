"""An answer as Anthropic's /v1/messages has it: the message, and the events of its stream."""

from __future__ import annotations

import copy
import json
from typing import Any

from pydantic_core import from_json

from ..answers import AnswerEvent, Content, ToolCallArguments, ToolCallStart
from ..generation import GenerationResult
from .errors import ApiError, anthropic_error
from .openai import new_id
from .writer import AnswerWriter, Event

SIGNATURE = "unsigned"
"""Of thoughts. Clients do not send back those without one; here nothing depends on it."""
_STOP_REASONS = {"length": "max_tokens", "context": "model_context_window_exceeded"}
_DELTAS = {"text": "text_delta", "thinking": "thinking_delta"}


class MessageWriter(AnswerWriter):
    """Each run of content, each of thoughts and each call is a block of the message's content."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.answer = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # How many of these were cached is known at the end.
            "usage": _usage(prompt_tokens, 0, 0),
        }
        self._block: dict[str, Any] | None = None  # the last of the content, while it is written
        self._input = ""  # of a call

    def begin(self) -> list[Event]:
        return [{"type": "message_start", "message": copy.deepcopy(self.answer)}, self.ping()]

    def push(self, part: AnswerEvent) -> list[Event]:
        if isinstance(part, ToolCallStart):
            call = {"type": "tool_use", "id": new_id("toolu_"), "name": part.name, "input": {}}
            return [*self._close(), self._open(call)]
        if isinstance(part, ToolCallArguments):
            self._input += part.text
            return [self._delta(type="input_json_delta", partial_json=part.text)]
        kind = "text" if isinstance(part, Content) else "thinking"
        events = []
        if self._block is None or self._block["type"] != kind:
            signature = {} if kind == "text" else {"signature": ""}
            events = [*self._close(), self._open({"type": kind, kind: "", **signature})]
        assert self._block is not None
        self._block[kind] += part.text
        return [*events, self._delta(**{"type": _DELTAS[kind], kind: part.text})]

    def end(self, result: GenerationResult, thinking_tokens: int) -> list[Event]:
        events = self._close()
        called = any(block["type"] == "tool_use" for block in self.answer["content"])
        reason = _STOP_REASONS.get(result.finish_reason or "", "tool_use" if called else "end_turn")
        why = {"stop_reason": reason if result.stop is None else "stop_sequence", "stop_sequence": result.stop}
        stats = result.stats
        usage = _usage(stats.prompt_tokens, stats.cached_tokens, stats.new_tokens)
        usage["output_tokens_details"] = {"thinking_tokens": thinking_tokens}
        self.answer.update(**why, usage=usage)
        return [*events, {"type": "message_delta", "delta": why, "usage": usage}, {"type": "message_stop"}]

    def ping(self) -> Event:
        return {"type": "ping"}

    def fail(self, error: ApiError) -> Event:
        return anthropic_error(error)

    def _open(self, block: dict[str, Any]) -> Event:
        self._block = block
        self.answer["content"].append(block)
        return {"type": "content_block_start", "index": self._index, "content_block": copy.copy(block)}

    def _close(self) -> list[Event]:
        if self._block is None:
            return []
        events = []
        if self._block["type"] == "thinking":
            self._block["signature"] = SIGNATURE
            events = [self._delta(type="signature_delta", signature=SIGNATURE)]
        elif self._block["type"] == "tool_use":
            self._block["input"] = _object(self._input)
            self._input = ""
        self._block = None
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, **delta: Any) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.answer["content"]) - 1


def _usage(prompt_tokens: int, cached_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": new_tokens,
    }


def _object(text: str) -> dict[str, Any]:
    """Arguments of a call; of a call that was cut off, as far as they go. Of what is no JSON, nothing."""
    try:
        value = from_json(text, allow_partial="trailing-strings", allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}
