"""The program meki_bench, run as a process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meki import _core
from meki.engine import find_onnxruntime


@dataclass(frozen=True)
class Program:
    command: Path
    onnxruntime: Path
    """The library that it loads."""

    def arguments(self, package: Path, *options: object) -> list[str]:
        """The command line on `package` with one thread."""
        common = [self.command, package, "--onnxruntime", self.onnxruntime, "--threads", 1]
        return [str(argument) for argument in (*common, *options)]

    def run(self, package: Path, *options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.arguments(package, *options), capture_output=True, text=True, timeout=300)

    def report(self, package: Path, *options: object) -> dict[str, Any]:
        """The JSON that a run without errors prints."""
        done = self.run(package, *options)
        assert (done.returncode, done.stderr) == (0, "")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def logits(self, package: Path, ids: Sequence[int], output: Path, *options: object) -> NDArray[np.float32]:
        """float32 [ids, vocab_size]; `output` is the file that they are written to."""
        done = self.run(package, "--token-ids", ",".join(map(str, ids)), "--logits", output, *options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return np.fromfile(output, "<f4").reshape(len(ids), -1)


@pytest.fixture(scope="session")
def make_program() -> Callable[[Path, Path], Program]:
    return Program


@pytest.fixture(scope="session")
def python_logits() -> Callable[..., NDArray[np.float32]]:
    """python_logits(package, ids, **EngineOptions): float32 [ids, vocab_size] from the Python module, on this machine
    and with one thread."""

    def logits(package: Path, ids: Sequence[int], **options: object) -> NDArray[np.float32]:
        settings = _core.EngineOptions(onnxruntime=str(find_onnxruntime()), threads=1, **options)
        session = _core.Session(_core.Engine.open(str(package), settings), _core.SessionOptions(context=len(ids)))
        session.append(ids)
        return session.logits()

    return logits
