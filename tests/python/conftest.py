"""A random package for the tests of the Python face, and changed copies of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import Engine


@pytest.fixture(scope="session")
def package(make_package: Callable[..., Path]) -> Path:
    return make_package()


@pytest.fixture(scope="session")
def engine(package: Path) -> Engine:
    return Engine(package, threads=1)


@pytest.fixture
def change_package(package: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies `package`, or another, and lets a function change its manifest. A file that the function put under
    manifest["contents"] replaces the package's own, with its size and checksum made right."""

    def change(edit: Callable[[dict[str, Any]], None], source: Path = package) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(source, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["contents"] = {}
        edit(manifest)
        for name, content in manifest.pop("contents").items():
            (copy / name).write_bytes(content)
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return copy

    return change
