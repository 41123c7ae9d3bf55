"""A compiled package, and a stand-in for AI Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..compiled import compiled_package

if TYPE_CHECKING:
    from .stub import StubHub


@pytest.fixture
def package(tmp_path: Path, make_package: Callable[..., Path]) -> Path:
    """A small package with a memory, compiled with the dense backbone."""
    return compiled_package(make_package(), tmp_path / "package")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    from .case import running_stub  # needs AI Hub's client

    with running_stub(tmp_path, monkeypatch) as server:
        yield server
