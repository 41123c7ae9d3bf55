"""Chat templates: from the messages of a conversation to the text that the model goes on with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ._core import PackageError
from .messages import check_messages, check_tools, plain


class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers have it, in the same environment. Immutable and thread-safe.

    It runs in Jinja's sandbox: it reaches neither files nor Python's internals, but may compute as long as it likes.
    """

    def __init__(self, path: Path, variables: Mapping[str, str], *, given: bool = False) -> None:
        """variables: the special tokens by the names that the template knows, as {"eos_token": "</s>"}. given: the
        user's own file in place of the package's. PackageError, of the user's file ValueError, if the file is not a
        template; FileNotFoundError or another OSError if it cannot be read."""
        self._path = path
        self._variables = dict(variables)
        self._given = given
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")  # the mark that some editors put before a text is no part of it
            self._template = parse_template(text)
        except ValueError as error:  # not UTF-8, too
            raise self._broken(f"does not parse: {error}") from error
        self.text = text
        """As it is in the file."""
        self.knows_tool_calls = "tool_calls" in text
        """Whether it writes calls of earlier answers."""
        # Of a message with tool calls alone: some templates ask for a content of none, others take any for a text.
        self._no_content = None if re.search(r"\bcontent\b\W*\bis\s+(not\s+)?none\b", text) else ""
        self._names = meta.find_undeclared_variables(_environment().parse(text))
        self._tools = next((name for name in ("tools", "xml_tools") if name in self._names), None)  # SmolLM3's

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The text of the conversation, up to where the model's answer begins, or goes on (`continue_final_message`).

        Arguments as of `meki.options.ChatOptions`; what else the messages have, the template sees too. ValueError or
        TypeError for arguments of another form, ValueError for what the template refuses, in its words. PackageError,
        of a template that was given ValueError, if the template fails.
        """
        checked = check_messages(messages, self._no_content)
        if not self.knows_tool_calls and any("tool_calls" in message for message in checked):
            raise ValueError(f"{self._path}: the chat template knows no tool_calls; leave those messages out")
        schemas = check_tools(tools)
        if schemas and self._tools is None:
            raise ValueError(f"{self._path}: the chat template knows no tools; leave them out")
        if continue_final_message:
            last = checked[-1]
            if last["role"] != "assistant" or "tool_calls" in last:
                raise ValueError(
                    "continue_final_message goes on with the text of an assistant's message, but the last message is "
                    f"{shown(last)}; end with one, or leave the option out"
                )
            last["content"] += _END
        variables = {
            **self._variables,
            "documents": None,
            **self._check_kwargs(chat_template_kwargs),
            "messages": checked,
            "add_generation_prompt": not continue_final_message,
            "tools": schemas,
        }
        if schemas and self._tools:
            variables[self._tools] = schemas
        try:
            text = self._template.render(variables)
        except _RefusalError as error:
            raise ValueError(f"{self._path}: the chat template refuses these messages: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise self._broken(f"fails on these messages: {error}") from error
        return self._cut(text) if continue_final_message else text

    def knows(self, variable: str) -> bool:
        """Whether it has such a variable, to be set with `chat_template_kwargs`."""
        return variable in self._names

    def _check_kwargs(self, kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if kwargs is None:
            return {}
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise TypeError(f"chat_template_kwargs must map names of variables to values, got {shown(kwargs)}")
        for name in kwargs:
            if name in _CALL_VARIABLES:
                raise ValueError(f"chat_template_kwargs has {name!r}, which the call itself says; leave it out")
            if name not in self._names:
                known = ", ".join(sorted(self._names - {*self._variables, *_CALL_VARIABLES})) or "none"
                raise ValueError(f"{self._path}: the chat template has no variable {name!r}; it has: {known}")
        return dict(plain("chat_template_kwargs", dict(kwargs)))

    def _cut(self, text: str) -> str:
        """`text` up to where the last message ends, without what ends a turn."""
        mark = _END.rstrip()
        before, found, after = text.rpartition(mark)
        if not found:
            raise ValueError(f"{self._path}: the chat template leaves out the last message, which is to be continued")
        return before if (mark + after).startswith(_END) else before.rstrip()  # as it trims the message, if it does

    def _broken(self, what: str) -> Exception:
        problem = f"{self._path}: the chat template {what}"
        if self._given:
            return ValueError(f"{problem}; give one that works")
        return PackageError(
            f"{problem}; give one that works (meki-run --chat-template, Engine's chat_template), or convert the model "
            "again with one"
        )


def parse_template(text: str) -> Template:
    """The template in its environment; ValueError, saying where and why, if the text is not one."""
    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError) as error:  # too much for Python's compiler
        raise ValueError(str(error)) from error


_CALL_VARIABLES = ("messages", "tools", "add_generation_prompt")
_END = "\ue000\ue001\ue000 "
"""Put after a text to find its end again; the space at the end tells whether the template trims."""


class _RefusalError(Exception):
    """What a template says with raise_exception."""


class _Generation(Extension):
    """`{% generation %}`: what a model learns from in training. Here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"**"})  # 9**(9**9) takes for ever: it is not computed while a template is parsed


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: the settings, filters and functions of transformers' apply_chat_template."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML takes for markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise _RefusalError(message)
