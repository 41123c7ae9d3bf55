"""The programs in examples/, run as anybody would; MEKI_HELLO names the C++ one, built against an installed library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meki import Engine
from meki.engine import find_onnxruntime

ROOT = Path(__file__).parents[2]


def test_hello_py(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/hello.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    expected = Engine("meki-tiny").generate("Once upon a time", max_new_tokens=64, temperature=0)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected.text}\n", "")


@pytest.mark.skipif("MEKI_HELLO" not in os.environ, reason="MEKI_HELLO does not name the built examples/hello.cc")
def test_hello_cc() -> None:
    engine = Engine("meki-tiny")
    prompt = engine.tokenizer.encode("Once upon a time").ids

    def hello(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [os.environ["MEKI_HELLO"], *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = hello(engine.path, find_onnxruntime(), *prompt)
    expected = engine.generate("Once upon a time", max_new_tokens=16, temperature=0)
    assert (done.returncode, done.stderr) == (0, "")
    assert engine.tokenizer.decode([int(token) for token in done.stdout.split()]) == expected.text

    done = hello("nowhere", find_onnxruntime(), 1)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("hello: error: nowhere/manifest.json")
    assert hello().returncode == 2
