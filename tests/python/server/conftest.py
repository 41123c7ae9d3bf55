"""A real server on a free port of this machine, with meki-tiny."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meki import AsyncEngine, Engine
from meki.server.settings import Settings
from meki.server.state import Model, Server

from .running import Running, Serve, running

TEMPLATE = """\
{%- if tools %}{{ "Tools: " + tools | tojson + "\\n" }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + "}\\n</tool_call>\\n" }}
        {%- endfor %}
    {%- else %}
        {{- message.role + ": " + message.content + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}
"""
"""With tools in the form of Hermes."""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def tiny(template: Path) -> Engine:
    return Engine("meki-tiny", threads=1, chat_template=template)


@pytest.fixture(scope="session")
def serve(tiny: Engine) -> Serve:
    """serve(parallel=, waiting=, **settings): a server of its own."""

    def start(parallel: int = 4, waiting: int = 16, **settings: Any) -> contextlib.AbstractContextManager[Running]:
        runner = AsyncEngine(tiny, parallel=parallel, waiting=waiting, context=tiny.context)
        return running(Server([Model("meki-tiny", runner, tiny.context)], Settings(**settings)))

    return start


@pytest.fixture(scope="session")
def served(serve: Serve) -> Iterator[Running]:
    """One for all tests that leave it as it is."""
    with serve() as server:
        yield server
