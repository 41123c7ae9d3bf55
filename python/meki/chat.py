"""Chat templates: from the messages of a conversation to the text that the model goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ._core import PackageError


class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers have it, in the same environment. Immutable and thread-safe.

    It runs in Jinja's sandbox: it reaches neither files nor Python's internals, but may compute as long as it likes.
    """

    def __init__(self, path: Path, variables: Mapping[str, str]) -> None:
        """variables: the special tokens by the names that the template knows, as {"eos_token": "</s>"}. PackageError if
        the file is not a template."""
        self._path = path
        self._variables = dict(variables)
        try:
            self._template = parse_template(path.read_bytes().decode())
        except ValueError as error:  # not UTF-8, too
            raise _broken(path, f"does not parse: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of the conversation, up to where the model's answer begins.

        messages: at least one, each with the str `role` and `content`; what else they have, the template sees too.
        ValueError for messages of another form, and for what the template refuses, in its words. PackageError if the
        template fails.
        """
        variables = {
            **self._variables,
            "messages": check_messages(messages),
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        try:
            return self._template.render(variables)
        except _RefusalError as error:
            raise ValueError(f"{self._path}: the chat template refuses these messages: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            raise _broken(self._path, f"fails on these messages: {error}") from error


def parse_template(text: str) -> Template:
    """The template in its environment; ValueError, saying where and why, if the text is not one."""
    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError) as error:  # too much for Python's compiler
        raise ValueError(f"chat template: {error}") from error


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the messages; ValueError, naming the message, if they are not what `ChatTemplate.render` takes."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            'messages must be a list of at least one message, as [{"role": "user", "content": "Hello"}], '
            f"got {messages!r}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f'messages[{index}] is {message!r}, expected a message, as {{"role": "user", "content": "Hello"}}'
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = repr(message[key]) if key in message else "missing"
                raise ValueError(f'messages[{index}]["{key}"] is {got}, expected a str')
    return [dict(message) for message in messages]


class _RefusalError(Exception):
    """What a template says with raise_exception."""


class _Generation(Extension):
    """`{% generation %}`: what a model learns from in training. Here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: the settings, filters and functions of transformers' apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
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


def _broken(path: Path, what: str) -> PackageError:
    return PackageError(f"{path}: the chat template {what}; convert the model again with a template that works")
