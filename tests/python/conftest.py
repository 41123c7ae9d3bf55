"""A random package for the tests of the Python face, and changed copies of it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import Engine
from meki.models.tokenizer import END_OF_STORY

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == "system" and not loop.first %}
        {{- raise_exception("a system message comes first") }}
    {%- endif %}
    {{- message.role[0] + ":" + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}a:{% endif %}
"""
"""Few tokens a message, which ends with the token that ends a generation."""


@pytest.fixture(scope="session")
def package(make_package: Callable[..., Path]) -> Path:
    return make_package()


@pytest.fixture(scope="session")
def engine(package: Path) -> Engine:
    return Engine(package, threads=1)


def copy_package(source: Path, copy: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["contents"] = {}
    edit(manifest)
    for name, content in manifest.pop("contents").items():
        (copy / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture
def change_package(package: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies `package`, or another, and lets a function change its manifest. A file that the function put under
    manifest["contents"] replaces the package's own, with its size and checksum made right."""
    return lambda edit, source=package: copy_package(source, tmp_path / "changed", edit)


def without_end(manifest: dict[str, Any]) -> None:
    manifest["tokenizer"]["eos_token_ids"] = []


@pytest.fixture
def endless(change_package: Callable[..., Path]) -> Engine:
    """The model of `package`, but no token ends a text."""
    return Engine(change_package(without_end), threads=1)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stdin(data): what a command reads, from a terminal or not."""

    def set_stdin(data: bytes, *, terminal: bool = False) -> None:
        stream = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    return set_stdin


@pytest.fixture(scope="session")
def with_template() -> Callable[..., Callable[[dict[str, Any]], None]]:
    """with_template(text, variables): what puts a chat template into a package, for `change_package`."""

    def edit_with(text: str = CHAT_TEMPLATE, **variables: str) -> Callable[[dict[str, Any]], None]:
        def edit(manifest: dict[str, Any]) -> None:
            chat = {"file": "chat_template.jinja", "variables": {"eos_token": END_OF_STORY, **variables}}
            manifest["tokenizer"]["chat_template"] = chat
            manifest["contents"]["chat_template.jinja"] = text.encode()

        return edit

    return edit_with


@pytest.fixture(scope="session")
def chat_package(
    make_package: Callable[..., Path], with_template: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model with a chat template and a context of 1024 tokens. Shared: do not modify it."""
    return copy_package(make_package(context=1024), tmp_path_factory.mktemp("package") / "chat", with_template())


@pytest.fixture(scope="session")
def ngrams_chat_package(
    make_package: Callable[..., Path], with_template: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with hashed n-grams, whose convolution has a state of its own. The end of a turn resets them."""
    engram = {"engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50, "engram_reset": (0,)}
    package = make_package(context=1024, memory_dim=0, **engram)
    return copy_package(package, tmp_path_factory.mktemp("package") / "chat", with_template())


@pytest.fixture(scope="session")
def chat_engine(chat_package: Path) -> Engine:
    return Engine(chat_package, threads=1, kv_type="float32")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and an error where somebody reaches for one all the same."""
    import datasets.config
    import huggingface_hub.constants

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tasks that the harness has are those of ARC and PIQA: it takes half a minute to read all."""
    import lm_eval.tasks

    from meki.evaluation import tasks

    root = Path(lm_eval.tasks.__file__).parent
    few = {"include_defaults": False, "include_path": [root / "arc", root / "piqa"]}
    monkeypatch.setattr(tasks, "TaskManager", lambda **arguments: lm_eval.tasks.TaskManager(**{**few, **arguments}))
