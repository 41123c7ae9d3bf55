"""Storage and memory that fail under an engine: the right tokens or one error that says so, and the next call is right.

A shared library (shim.c) is preloaded into a process of its own; storm.py generates there while reads of the ROM fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler: apt install gcc")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = HERE / "shim.c"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture(scope="module", params=[(a, p) for a in ("pread", "mmap", "direct") for p in ("prefetch", "wait")])
def cases(
    request: pytest.FixtureRequest, shim: Path, make_package: Callable[..., Path]
) -> Callable[[str], list[dict[str, Any]]]:
    """cases(kind): what came of the faults of that kind, for one access mode, with and without the I/O thread."""
    command = [sys.executable, HERE / "storm.py", make_package("int8"), *request.param]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return lambda kind: [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("kind", ["interrupted", "stall"])
def test_what_changes_nothing(cases: Callable[[str], list[dict[str, Any]]], kind: str) -> None:
    for case in cases(kind):
        assert case["failed"] >= 1, case
        assert case["again"], case
        if case["times"] == 1 or kind == "stall":
            assert case["got"] == "right", case


@pytest.mark.parametrize("kind", ["io-error", "again", "nothing", "garbage", "other-file"])
def test_what_is_an_error(cases: Callable[[str], list[dict[str, Any]]], kind: str) -> None:
    for case in cases(kind):
        assert case["failed"] >= 1, case
        assert case["got"].startswith("PackageError: "), case
        assert "memory.rom: " in case["got"], case
        assert case["again"], case


def test_reads_of_a_part(cases: Callable[[str], list[dict[str, Any]]]) -> None:
    """The rest is read by the next call; what is copied from a mapping has no rest."""
    for case in cases("short"):
        assert case["failed"] >= 1, case
        assert case["got"] == "right" or case["got"].startswith("PackageError: "), case
        assert case["again"], case


def test_no_memory(cases: Callable[[str], list[dict[str, Any]]]) -> None:
    errors = [case["got"] for case in cases("no-memory") if case["got"] != "right"]
    assert errors
    for case in cases("no-memory"):
        assert case["got"] == "right" or case["got"].startswith(("RuntimeError: ", "MemoryError: ")), case
        assert case["again"], case
