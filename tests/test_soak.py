"""A short soak (soak.py): its results do not change; what grows slowly takes the 30 minutes of a long one to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_mixed_sessions() -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "0.5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
