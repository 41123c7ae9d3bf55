from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).parents[2] / "python" / "meki" / "_core.pyi"


def test_the_stub_is_what_the_module_documents(tmp_path: Path) -> None:
    pytest.importorskip("pybind11_stubgen", reason="pybind11-stubgen is not installed: pip install 'meki[test]'")
    subprocess.run([sys.executable, "-m", "pybind11_stubgen", "meki._core", "-o", tmp_path], check=True)
    made = (tmp_path / "meki" / "_core.pyi").read_text()
    assert STUB.read_text() == made, "make it again: pybind11-stubgen meki._core -o python"
