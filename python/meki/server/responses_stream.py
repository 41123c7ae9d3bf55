"""An answer as OpenAI's /v1/responses has it: the response, and the events of its stream."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..answers import AnswerEvent, Content, ToolCallArguments, ToolCallStart, new_call_id
from ..generation import GenerationResult, TokenLogprobs
from .errors import ApiError
from .logprobs import PartTokens, text_logprobs
from .openai import FINISH_REASONS, new_id
from .responses_tools import Functions
from .writer import AnswerWriter, Event

_TEXTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}

Take = Callable[[], Sequence[TokenLogprobs]]


class ResponseWriter(AnswerWriter):
    """Each run of content, each of thoughts and each call is an item of the response's output."""

    def __init__(self, head: dict[str, Any], functions: Functions, take_logprobs: Take | None = None) -> None:
        """head: what of the response is known from the beginning. functions: that may be called. take_logprobs: of the
        tokens since the last call; None: they are not told."""
        self.answer = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **head,
        }
        self._item: dict[str, Any] | None = None  # the last of the output, while it is written
        self._sequence = 0
        self._functions = functions
        self._tokens = PartTokens(take_logprobs or list)

    def begin(self) -> list[Event]:
        return [self._lifecycle("created"), self._lifecycle("in_progress")]

    def push(self, part: AnswerEvent) -> list[Event]:
        if isinstance(part, ToolCallStart):
            return [*self._close("completed"), *self._open_call(part.name)]
        tokens = self._tokens.of(part)
        if isinstance(part, ToolCallArguments):
            assert self._item is not None
            self._item["arguments"] += part.text
            return [self._of_item("response.function_call_arguments.delta", delta=part.text)]
        kind = "message" if isinstance(part, Content) else "reasoning"
        events = []
        if self._item is None or self._item["type"] != kind:
            events = [*self._close("completed"), *self._open_text(kind)]
        assert self._item is not None
        written = self._item["content"][0]
        written["text"] += part.text
        logprobs = text_logprobs(tokens) if kind == "message" else []
        if logprobs:
            written["logprobs"] += logprobs
        return [*events, self._of_text(f"{_TEXTS[kind]}.delta", logprobs, delta=part.text)]

    def end(self, result: GenerationResult, thinking_tokens: int) -> list[Event]:
        complete = FINISH_REASONS[result.finish_reason or "stop"] == "stop"
        status = "completed" if complete else "incomplete"
        events = []
        if not any(item["type"] != "reasoning" for item in self.answer["output"]):  # an answer of no text is one
            events = [*self._close(status), *self._open_text("message")]
        events += self._close(status)
        stats = result.stats
        self.answer["usage"] = {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": stats.new_tokens,
            "output_tokens_details": {"reasoning_tokens": thinking_tokens},
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
        }
        if complete:
            self.answer["completed_at"] = int(time.time())
        else:  # of the limits that the API knows, the one that is like a full context
            self.answer["incomplete_details"] = {"reason": "max_output_tokens"}
        self.answer["status"] = status
        return [*events, self._lifecycle(status)]

    def ping(self) -> Event:
        """Again, as some clients (Codex) wait for events and pass over comments."""
        return self._lifecycle("in_progress")

    def fail(self, error: ApiError) -> Event:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.answer.update(status="failed", error={"code": code, "message": error.message})
        return self._lifecycle("failed")

    def _open_call(self, name: str) -> list[Event]:
        call = {"id": new_id("fc_"), "call_id": new_call_id(), **self._functions.called(name), "arguments": ""}
        return [self._open({"type": "function_call", **call})]

    def _open_text(self, kind: str) -> list[Event]:
        item: dict[str, Any]
        part: dict[str, Any]
        if kind == "message":
            item = {"type": kind, "id": new_id("msg_"), "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": kind, "id": new_id("rs_"), "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        opened = self._open(item)
        item["content"] = [part]
        return [opened, self._of_text("response.content_part.added", part=copy.deepcopy(part))]

    def _open(self, item: dict[str, Any]) -> Event:
        self._item = item
        item["status"] = "in_progress"
        self.answer["output"].append(item)
        return self._whole_item("added")

    def _close(self, status: str) -> list[Event]:
        if self._item is None:
            return []
        item = self._item
        item["status"] = status
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            events = [self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)]
        else:
            part = item["content"][0]
            events = [
                self._of_text(f"{_TEXTS[item['type']]}.done", part.get("logprobs", ()), text=part["text"]),
                self._of_text("response.content_part.done", part=part),
            ]
        events.append(self._whole_item("done"))
        self._item = None
        return events

    def _lifecycle(self, name: str) -> Event:
        return self._event(f"response.{name}", response=copy.deepcopy(self.answer))

    def _whole_item(self, name: str) -> Event:
        index = len(self.answer["output"]) - 1
        return self._event(f"response.output_item.{name}", output_index=index, item=copy.deepcopy(self._item))

    def _of_item(self, kind: str, **more: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self.answer["output"]) - 1, **more)

    def _of_text(self, kind: str, logprobs: Sequence[dict[str, Any]] = (), **more: Any) -> Event:
        if kind.startswith("response.output_text"):
            more["logprobs"] = list(logprobs)
        return self._of_item(kind, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **more}
        self._sequence += 1
        return event
