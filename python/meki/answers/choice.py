"""Which tools an answer may call, and which it has to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from ..messages import function_of
from ..options import ToolChoice
from ..structured import WHITESPACE
from .forms import AnswerForm

MOST_CALLS = 8
"""In an answer that has to be calls: a small model may not find an end."""
_GUIDANCE = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
_COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}
"""Keywords by which a schema names properties elsewhere."""
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RequiredCalls:
    """What an answer has to be."""

    tools: Tools
    """One of these is called, or several."""
    several: bool
    or_json: str | None = None
    """Or else JSON of this schema, a JSON text."""


def choose_tools(
    tools: Tools | None, choice: ToolChoice | None, *, one_call: bool
) -> tuple[Tools | None, RequiredCalls | None]:
    """The tools that the model is told of, and the calls that its answer has to be, if it has to. one_call: at most.
    ValueError for a choice that is none, or of a tool that is not there."""
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return None, None
    if choice == "required" and tools:
        return tools, RequiredCalls(tools, several=not one_call)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice != "required" and not isinstance(name, str):
        raise ValueError(
            'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}, '
            f"got {shown(choice)}"
        )
    chosen = [tool for tool in tools or () if function_of(tool)["name"] == name]
    if not chosen:
        known = ", ".join(function_of(tool)["name"] for tool in tools or ()) or "none"
        raise ValueError(f"tool_choice {shown(choice)} needs a tool that is there; tools: {known}")
    return tools, RequiredCalls(chosen[:1], several=False)


def call_grammar(form: AnswerForm, calls: RequiredCalls, special_tokens: Mapping[str, int]) -> str:
    """A grammar, as llguidance reads it, of the answers that are these calls: in the model's form, with arguments of
    the tools' schemas. special_tokens: the tokenizer's, ids by their texts. ValueError if the form is not known."""
    if form.calls is None:
        raise ValueError('tool_choice can be "auto" or "none" alone: in which form this model calls tools is not known')
    special = form.special_tokens(special_tokens)
    before, after = form.calls.around
    more = f"({_text(form.calls.between, special)} call){{0,{MOST_CALLS - 1}}}" if calls.several else ""
    rules = [f"calls: {_text(before, special)} call {more} {_text(after, special)}"]
    alternatives = []
    for index, tool in enumerate(calls.tools):
        function = function_of(tool)
        before, after = form.calls.around_arguments(function["name"])
        alternatives.append(f"{_text(before, special)} arguments{index} {_text(after, special)}")
        rules.append(f"arguments{index}: %json {json.dumps(_schema(function.get('parameters') or {}))}")
    rules.append(f"call: {' | '.join(alternatives)}")
    answer = "calls"
    if calls.or_json is not None:
        answer = "answer"
        begins = form.calls.around[0] + form.calls.around_arguments("")[0]
        # What begins with a bracket either way would never be the second: llguidance decides by the first byte.
        opener = "" if begins.startswith(form.calls.opener) else _text(form.calls.opener, special)
        rules.append(f"answer: {opener} calls | content")
        rules.append(f"content: %json {json.dumps({**json.loads(calls.or_json), **_GUIDANCE})}")
    start = answer
    if form.thinking is not None:
        begin, closer = form.thinking
        if closer in special:
            rules.append(f"thoughts: /(?s:.*)/ {_text(closer, special)}")
        else:
            rules.append(f"thoughts[suffix={json.dumps(closer)}]: /(?s:.*)/")
        rules.append(r"SPACE: /[ \n]{1,2}/")
        thoughts = "thoughts SPACE?" if form.thinks_first else f"({_text(begin, special)} thoughts SPACE?)?"
        start = f"{thoughts} {answer}"
    return "\n".join([f"start: {start}", *rules, ""])


def _schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A function has no parameters but those that its schema names, unless it says so: small models make up more."""
    closed = {} if parameters.keys() & _COMBINED else {"additionalProperties": False}
    return {"type": "object", **closed, **parameters, **_GUIDANCE}


def _text(text: str, special: Mapping[str, int]) -> str:
    """In a rule of a grammar."""
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)
