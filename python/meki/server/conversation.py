"""A conversation in the forms of other APIs becomes messages that chat templates know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .state import Model


class Conversation:
    """Messages of OpenAI's chat completions, part by part. Parts of one role that follow each other are one message,
    as most templates want it; between their texts is a line break."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def say(self, role: Literal["system", "user", "assistant"], text: str) -> None:
        message = self._last(role)
        before = message["content"]
        message["content"] = text if before is None else f"{before}\n{text}"

    def think(self, text: str) -> None:
        """The assistant's thoughts."""
        message = self._last("assistant")
        before = message.get("reasoning_content")
        message["reasoning_content"] = text if before is None else f"{before}\n{text}"

    def call(self, call_id: str, name: str, arguments: str | Mapping[str, Any]) -> None:
        """The assistant calls a function."""
        self._names[call_id] = name
        function = {"name": name, "arguments": arguments}
        calls = self._last("assistant").setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})

    def result(self, call_id: str, text: str) -> None:
        """What a call gave. Some templates want to know of which function."""
        name = {"name": self._names[call_id]} if call_id in self._names else {}
        self.messages.append({"role": "tool", "tool_call_id": call_id, **name, "content": text})

    def finished(self) -> list[dict[str, Any]]:
        """All messages. One without a text has an empty one; beside calls it has none."""
        for message in self.messages:
            if message["content"] is None and "tool_calls" not in message:
                message["content"] = ""
        return self.messages

    def _last(self, role: str) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": None})
        return self.messages[-1]


def thinking_variables(model: Model, thinks: bool | None) -> dict[str, Any]:
    """The variables of the chat template that have the model think or not. Where it has no such, or `thinks` is None,
    it does as it is used to."""
    template = model.engine.requests.prompts.chat_template
    if thinks is None or template is None or not template.knows("enable_thinking"):
        return {}
    return {"enable_thinking": thinks}
